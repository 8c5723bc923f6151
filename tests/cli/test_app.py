"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.lowering.pipeline import PASSES


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    module = torch_rtx.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.ones(2, 4),))
    path = tmp_path_factory.mktemp("engines") / "model.rtx"
    torch_rtx.save(module, path)
    return path


def call(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.mark.quick
def test_inspect(path):
    result = call("inspect", path)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == str(torch_rtx.inspect(path))
    producer = f"built by torch_rtx {torch_rtx.__version__}"
    for text in (producer, "inputs input", "stripped", "'0.weight': f32[8, 4]", "relu"):
        assert text in result.stdout


def test_module_is_the_command_line(path):
    """`python -m torch_rtx` needs no installation."""
    command = [sys.executable, "-m", "torch_rtx", "inspect", path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == call("inspect", path).stdout


def test_inspect_json(path):
    found = json.loads(call("inspect", path, "--json").stdout)
    assert found["manifest"]["inputs"] == ["input"]
    assert found["weight_bytes"] == 4 * (8 * 4 + 8)
    assert found["engine_bytes"] == path.stat().st_size
    assert [p["name"] for p in found["parameters"]] == ["0.weight", "0.bias"]
    assert "graph_text" not in found


def test_inspect_graph(path):
    result = call("inspect", path, "--graph")
    assert result.stdout == torch_rtx.inspect(path).graph_text
    assert result.stdout.startswith("graph fused {")


def test_what_is_no_engine(path, tmp_path):
    damaged = tmp_path / "damaged.rtx"
    damaged.write_bytes(path.read_bytes()[:500])
    (tmp_path / "text.rtx").write_text("hello")
    messages = {
        damaged: "its header is incomplete",
        tmp_path / "text.rtx": "not an .rtx file",
        tmp_path / "absent.rtx": "No such file",
        tmp_path: "this is a folder, not an .rtx file",
    }
    for file, message in messages.items():
        for option in ((), ("--json",), ("--graph",)):
            result = call("inspect", file, *option)
            assert result.exit_code == 1
            assert "error: " in result.stderr
            assert message in result.stderr
            assert result.stdout == ""


def test_usage():
    assert "inspect" in call("--help").stdout
    assert "--json" in call("inspect", "--help").stdout
    assert call("inspect").exit_code == 2
    both = call("inspect", "model.rtx", "--graph", "--json")
    assert (both.exit_code, "--json the summary" in both.stderr) == (2, True)
    assert call("nonsense").exit_code == 2


def test_in_a_process_of_its_own_without_torch(path):
    code = "import sys; sys.modules['torch'] = None; from torch_rtx.cli.app import app; app()"
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == str(torch_rtx.inspect(path))


# torch-rtx opt --------------------------------------------------------------------------------------------------------

GRAPH = """\
graph import {
  input x: f32[2, 3]
  a: f32[2, 3] = op aten.exp.default(self=x)
  b: f32[2, 3] = op aten.exp.default(self=x)
  c: f32[2, 3] = op aten.add.Tensor(self=a, other=b)
  return [c]
}
"""


def opt(*args, text=GRAPH):
    return CliRunner().invoke(app, ["opt", *map(str, args)], input=text)


def test_opt_runs_passes_in_order(tmp_path):
    assert opt("-").stdout == GRAPH
    merged = opt("-", "-p", "cse", "-p", "dce")
    assert "aten.add.Tensor(self=a, other=a)" in merged.stdout
    assert "b: f32" not in merged.stdout
    (tmp_path / "graph.rtxir").write_text(GRAPH)
    fused = opt(
        tmp_path / "graph.rtxir", "-p", "cse", "-p", "dce", "-p", "fuse", "-t", "sm_90", "-o", tmp_path / "out.rtxir"
    )
    assert fused.exit_code == 0
    assert fused.stdout == ""
    assert "kernel exp_add_" in (tmp_path / "out.rtxir").read_text()
    assert opt(tmp_path / "out.rtxir", "-p", "finish").stdout.startswith("graph fused {")


def test_opt_lists_the_passes():
    assert opt("--list").stdout.splitlines() == list(PASSES)


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (("-t", "sm_13"), GRAPH, "unknown target 'sm_13'"),
        (("-p", "fuze"), GRAPH, "error: -: unknown passes fuze\n  the passes are simplify, cse"),
        ((), GRAPH.replace("f32[2, 3] = op aten.add", "f32[2, = op aten.add"), "error: -: line 5: "),
        ((), GRAPH.replace("other=b", "other=d"), "error: -: line 5: "),
        ((), GRAPH.replace("aten.exp.default", "aten.expo.default"), "aten.expo.default"),
        (
            ("-p", "cse"),
            GRAPH.replace("graph import", "graph fused").replace("op ", "extern "),
            "pass cse changed the level",
        ),
    ],
)
def test_opt_says_what_is_wrong(args, text, message):
    result = opt("-", *args, text=text)
    assert result.exit_code == 1
    assert message in result.stderr


def test_opt_checks_no_more_than_it_is_told(tmp_path):
    text = GRAPH.replace("c: f32[2, 3]", "c: f32[2, 4]").replace("aten.exp", "aten.expo")
    assert opt("-", text=text).exit_code == 1
    assert opt("-", "--verify", "none", text=text).stdout == text
    assert opt(tmp_path / "none.rtxir").exit_code == 1
