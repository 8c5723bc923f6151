"""What `torch-rtx build` builds from besides ONNX models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.cli.sources import file_of

FACTORIES = """
import torch
from torch import nn

def plain():
    torch.manual_seed(0)
    return nn.Linear(4, 3), (torch.ones(2, 4),)

def dynamic():
    return *plain(), {}, ({0: torch.export.Dim("batch", min=1, max=8)},)

def nothing():
    return 3

value = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_tests.py").write_text(FACTORIES)
    (tmp_path / "needs_another.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def build(*given: str) -> Result:
    return CliRunner().invoke(app, ["build", *given, "--device", "cpu"])


def expected(x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return nn.Linear(4, 3)(x)


def test_function(folder: Path) -> None:
    done = build("factories_of_tests:dynamic", "--weights")
    assert done.exit_code == 0, done.output
    assert done.stdout == "wrote dynamic.rtx\n"
    stages = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert stages[:2] == ["reading factories_of_tests:dynamic", "capturing the model"]
    assert stages[-1] == "writing dynamic.rtx"
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch_rtx.load(folder / "dynamic.rtx")(x), expected(x))


def test_exported_program(folder: Path) -> None:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(nn.Linear(4, 3), (torch.ones(2, 4),)), folder / "model.pt2")
    assert build("model.pt2", "--weights").exit_code == 0
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch_rtx.load(folder / "model.rtx")(x), expected(x))


def test_shapes_of_a_function(folder: Path) -> None:
    done = build(
        "factories_of_tests:plain", "--min-shapes", "input:1x4", "--max-shapes", "input:8x4", "--dtype", "float64"
    )
    assert done.exit_code == 0, done.output
    found = torch_rtx.inspect(folder / "plain.rtx")
    assert found.inputs["input"].startswith("f64[")
    assert found.profiles[0]["input"][0] == (1, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("model.txt",), "'model.txt' is no model"),
        (("factories_of_tests",), "is no model"),
        (("factories_of_tests:",), "is no model"),
        (("factories_of_tests:missing",), "has no function 'missing'"),
        (("factories_of_tests:value",), "has no function 'value'"),
        (("factories_of_tests:nothing",), "returned no model"),
        (("not_there:make",), "there is no module 'not_there'"),
        (("model.pt2",), "No such file"),
        (("factories_of_tests:plain", "--size", "batch=2"), "--size is for ONNX models"),
        (("factories_of_tests:plain", "--profile", "batch=2"), "--profile is for ONNX models"),
        (("factories_of_tests:plain", "--opt-shapes", "x:2x4"), "the model has no input 'x'\n  its inputs are input"),
        (("factories_of_tests:dynamic", "--opt-shapes", "input:2x4"), "are given where it is made"),
        (("model.pt2", "--dtype", "float16"), "an exported program has its dtypes"),
        (("factories_of_tests:plain", "--fix", "x=2"), "--fix is for ONNX models"),
        (("factories_of_tests:plain", "--out", "none/a.rtx"), "there is no such folder"),
    ],
)
def test_mistakes(folder: Path, given: tuple[str, ...], message: str) -> None:
    done = build(*given)
    assert (done.exit_code, message in done.output) == (1, True), done.output


def test_a_damaged_program(folder: Path) -> None:
    (folder / "model.pt2").write_bytes(b"no archive")
    done = build("model.pt2")
    assert (done.exit_code, "model.pt2 is no exported program" in done.output) == (1, True)


def test_what_the_users_module_lacks_is_its_own_error(folder: Path) -> None:
    done = build("needs_another:make")
    assert isinstance(done.exception, ModuleNotFoundError)


def test_where_engines_go() -> None:
    assert file_of("a/b.onnx", ".rtx") == Path("a/b.rtx")
    assert file_of("a.b:make", ".rtx") == Path("make.rtx")
