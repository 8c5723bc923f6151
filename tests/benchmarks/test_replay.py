"""Kernel replay: equal records of equal code, and what a change of code generation shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import replay
from torch_rtx.ir import Graph, Node
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.kernel import Kernel

# A softmax, a product that is best divided, and a product that is not.
GRAPH = """\
graph fused {
  input x: f16[4, 8192]
  input w: f16[64, 8192]
  a: f16[4, 8192] = kernel softmax(in0=x)  # model @ model.py:3 graph import {
    input in0: f16[4, 8192]
    a: f16[4, 8192] = op aten._softmax.default(self=in0, dim=-1, half_to_float=False)
    return [a]
  }
  b: f16[4, 64] = kernel deep(in0=a, in1=w) graph import {
    input in0: f16[4, 8192]
    input in1: f16[64, 8192]
    b: f16[4, 64] = op aten.linear.default(input=in0, weight=in1)
    return [b]
  }
  c: f16[4, 4] = kernel square(in0=b, in1=b) graph import {
    input in0: f16[4, 64]
    input in1: f16[4, 64]
    c: f16[4, 4] = op aten.linear.default(input=in0, weight=in1)
    return [c]
  }
  return [c]
}
"""
Offered = Callable[[Node, int], Iterator[tuple[str, Kernel | Graph | str]]]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A record of `GRAPH`."""
    folder = tmp_path / "before"
    folder.mkdir()
    replay.write(replay.record(parse(GRAPH)), folder / f"model-f16-small{replay.SUFFIX}")
    return folder


def again(before: Path, *options: str) -> Path:
    """A record of the graphs of another one."""
    folder = before.parent / "after"
    arguments = ["record", str(folder), "--graphs", str(before), *options]
    assert replay.main(arguments) == 0
    return folder


@pytest.mark.quick
def test_equal_code_gives_equal_files(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = again(before, "--workers", "1")
    (one,), (two,) = before.iterdir(), after.iterdir()
    assert one.read_bytes() == two.read_bytes()
    assert replay.main(["diff", str(before), str(after)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("no differences")
    found = replay.read(one)
    assert "model.py" not in found.graph
    assert found.forms.keys() > {"softmax", "deep", "square"}  # and the two kernels of what is divided
    assert found.forms["deep"].keys() == {f"sm_{sm}" for sm in replay.SMS}
    assert "split" in found.forms["deep"]["sm_90"]
    assert "split" not in found.forms["square"]["sm_90"]
    kernels = found.forms["square"]["sm_80"]["kernel"]
    assert len(kernels) > 1
    assert found.texts[kernels[0]].startswith("# pointers: f16, f16, f16\n# scalars: \n# grid: ")


def changed(offered: Offered) -> Offered:
    """Code generation after a change: one more warp in one configuration on one SM version, and one kernel less."""

    def offer(node: Node, sm: int) -> Iterator[tuple[str, Kernel | Graph | str]]:
        forms = list(offered(node, sm))
        if (node.op, sm) == ("square", 86):
            kind, kernel = forms[1]
            assert isinstance(kernel, Kernel)
            forms[1] = kind, replace(kernel, num_warps=32)
        elif (node.op, sm) == ("softmax", 120):
            del forms[sum(kind == "kernel" for kind, _ in forms) - 1]
        yield from forms

    return offer


def test_a_change_is_shown(before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(replay, "offered", changed(replay.offered))
    after = again(before, "--workers", "1")
    capsys.readouterr()
    assert replay.main(["diff", str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model-f16-small: square sm_86: kernel 1 differs" in lines
    (removed,) = (line for line in lines if line.startswith("model-f16-small: softmax"))
    assert removed.startswith("model-f16-small: softmax sm_120: kernel ")
    assert removed.endswith(" removed")
    assert any(line.startswith("+# options: 32 warps") for line in lines)
    assert lines[-1].endswith(": 2 differences")
    assert replay.main(["diff", "--shown", "0", str(before), str(after)]) == 1
    assert not any(line.startswith(("+", "-")) for line in capsys.readouterr().out.splitlines())


def test_what_is_missing(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert replay.main(["diff", str(before), str(tmp_path / "empty")]) == 1
    assert "model-f16-small: not in" in capsys.readouterr().out
    assert replay.main(["diff", str(tmp_path / "empty"), str(tmp_path / "none")]) == 2
    assert replay.main(["record", str(tmp_path / "after"), "--graphs", str(before), "--models", "other"]) == 2


def test_the_zoo(tmp_path: Path) -> None:
    """A captured model: the same twice, also in processes of their own."""
    pytest.importorskip("transformers")
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--models", "gpt2_decode", "--dtypes", "bf16"]
    assert replay.main(["record", str(first), "--workers", "1", *options]) == 0
    assert replay.main(["record", str(second), "--graphs", str(first), "--workers", "2"]) == 0
    assert replay.main(["diff", str(first), str(second)]) == 0
    names = [case.name for case in replay.cases(["bert_base"], [])]
    assert names[:2] == ["bert_base-f16-full", "bert_base-f16-small"]
    assert "bert_base-f16-small-batch" in names
