"""`torch-rtx build`: an engine from an ONNX model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("onnx_ir")

import onnx

import torch_rtx
from tests.onnx.models import INT64, graph, linear, model, node, value
from torch_rtx.cli.app import app
from torch_rtx.cli.build import sizes_given, values_given
from torch_rtx.errors import SettingsError


def test_build(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "model.onnx")
    given = ["build", str(tmp_path / "model.onnx"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*given, "--size", "batch=1:2:8", "--weights"])
    assert done.exit_code == 0, done.output
    loaded = torch_rtx.load(tmp_path / "model.rtx")
    x = torch.ones(3, 3, 4)
    torch.testing.assert_close(loaded(x), torch_rtx.from_onnx(tmp_path / "model.onnx")(x))
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 1
    assert "leaves the sizes batch open" in refused.output
    lost = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "none" / "model.rtx")])
    assert (lost.exit_code, "no such folder" in lost.output) == (1, True)


def test_sizes() -> None:
    assert sizes_given(["batch=8", "2 * n=1:2:3"]) == {"batch": 8, "2 * n": (1, 2, 3)}
    for text in ("batch", "=3", "batch=", "batch=1:2", "batch=a", "batch=-1"):
        with pytest.raises(SettingsError, match="is not a size"):
            sizes_given([text])


def test_fixed_inputs(tmp_path: Path) -> None:
    nodes = [node("Expand", "x shape", "wide"), node("Pow", "wide power", "y")]
    inputs = [value("x", [1]), value("shape", [2], INT64), value("power", [], INT64)]
    onnx.save(model(graph(nodes, inputs, [value("y")])), tmp_path / "model.onnx")
    given = ["build", str(tmp_path / "model.onnx"), "--device", "cpu", "--fix", "shape=[2,3]"]
    done = CliRunner().invoke(app, [*given, "--fix", "power=2"])
    assert done.exit_code == 0, done.output
    assert torch_rtx.load(tmp_path / "model.rtx")(torch.tensor([3.0])).tolist() == [[9.0] * 3] * 2
    refused = CliRunner().invoke(app, [*given, "--fix", "other=2"])
    assert (refused.exit_code, "no input 'other'" in refused.output) == (1, True)


def test_values() -> None:
    assert values_given(["sr=16000", "a = b=[1.5, true]", "c=[]"]) == {"sr": 16000, "a = b": [1.5, True], "c": []}
    for text in ("sr", "=3", "sr=", "sr=a", 'sr="a"', 'sr={"a": 1}', "sr=[[1], null]", "sr=1,2"):
        with pytest.raises(SettingsError, match="is not the value of an input"):
            values_given([text])
