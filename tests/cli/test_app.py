"""The command line."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.cli.inspect import with_names
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

    assert json.loads(call("inspect", path, "--graph", "--json").stdout) == {"graph": result.stdout}


def test_inspect_says_the_users_names(tmp_path):
    dims = ({0: torch.export.Dim("batch", min=1, max=9)},)
    torch_rtx.save(torch_rtx.compile(nn.ReLU(), (torch.ones(2, 4),), dynamic_shapes=dims), tmp_path / "a.rtx")
    assert "input input: f32[batch, 4]" in call("inspect", tmp_path / "a.rtx").stdout
    text = call("inspect", tmp_path / "a.rtx", "--graph").stdout
    assert "  dim batch = 1, 9, 1" in text
    assert not re.search(r"\bs\d", text)
    assert opt("-", text=text).stdout == text


def test_names_that_the_program_has():
    text = "dim s1 = 1, 9, 1\ninput batch: f32[s1, s2, s11]"
    assert with_names(text, {"s1": "batch", "s2": "rows"}) == text.replace("s2", "rows")


def test_inspect_selects(path):
    lines = call("inspect", path, "--limit", 1).stdout.splitlines()
    assert lines[-3:] == ["parameters: 2", "  '0.weight': f32[8, 4], 128 B", "  and 1 more"]
    assert call("inspect", path, "--layers").stdout.splitlines() == ["layers: 1", "  0: f32 x f32 -> f32"]
    (layer,) = json.loads(call("inspect", path, "--layers", "--json").stdout)
    assert layer["operands"] == ["f32", "f32"]
    found = call("inspect", path, "--search", "bias")
    assert "layers: 1, 0 with 'bias'" in found.stdout
    assert "weight" not in found.stdout[found.stdout.index("parameters: ") :]
    found = json.loads(call("inspect", path, "--search", "bias", "--limit", 1, "--json").stdout)
    assert [one["name"] for one in found["parameters"]] == ["0.bias"]


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
    both = call("inspect", "model.rtx", "--graph", "--layers")
    assert (both.exit_code, "--layers its layers" in both.stderr) == (2, True)
    assert call("nonsense").exit_code == 2


def test_in_a_process_of_its_own_without_torch(path):
    """So is the help of all commands, which is quick for that."""
    code = "import sys; sys.modules['torch'] = None; from torch_rtx.cli.entry import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == str(torch_rtx.inspect(path))
    result = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


# what all commands share ----------------------------------------------------------------------------------------------


def commands(group: Any = None, *path: str) -> dict[str, Any]:
    """Every command, by its words."""
    group = group or typer.main.get_command(app)
    found = {}
    for name, one in group.commands.items():
        found |= commands(one, *path, name) if hasattr(one, "commands") else {" ".join((*path, name)): one}
    return found


@pytest.mark.quick
def test_every_command_has_json_and_v():
    found = commands()
    assert {"build", "cache ls", "cache runtime generate"} <= set(found)
    for name, one in found.items():
        flags = {flag for parameter in one.params for flag in parameter.opts}
        assert {"--json", "--verbose", "-v"} <= flags, name


@pytest.mark.parametrize("name", commands())
def test_exit_status(name):
    """2 where the command line is wrong, and nothing on stdout."""
    done = call(*name.split(), "--no-such-option")
    assert (done.exit_code, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("cache prune", {"removed", "bytes", "left"}),
        ("cache verify", {"entries", "damaged"}),
        ("cache runtime prune", {"removed", "left"}),
        ("cache runtime clear", {"removed"}),
    ],
)
def test_results_as_json(given, keys):
    done = call(*given.split(), "--json")
    assert (done.exit_code, set(json.loads(done.stdout))) == (0, keys)


def test_messages_of_a_command(path, tmp_path, caplog):
    """-v after the command shows them; without it, there is a line for each stage, beside the results."""
    weights = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.ones(8, 4), "0.bias": torch.ones(8)}, weights)
    done = call("run", path, "-w", weights)
    assert re.fullmatch(r"\[ *[0-9.]+ s\] loading .*model.rtx\n", done.stderr)
    assert done.stdout == "result: float32[2, 8]\n"
    log = logging.getLogger("torch_rtx")
    before = log.level
    try:
        done = call("run", path, "-w", weights, "-v")
    finally:
        log.setLevel(before)
    assert [record.message for record in caplog.records if record.name == "torch_rtx.stages"] == [f"loading {path}"]
    assert " s] loading" not in done.stderr


def test_readers_may_stop(path):
    """A reader that has seen enough is no error."""
    command = f"{sys.executable} -m torch_rtx inspect {path} --graph | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


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
        (("-t", "sm_13"), GRAPH, "targets: 'sm_13' is older than the GPUs"),
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
