"""`torch-rtx build`: an engine from an ONNX model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("onnx_ir")

import onnx

import torch_rtx
from tests.onnx.models import INT64, graph, linear, model, node, value
from torch_rtx.cli.app import app
from torch_rtx.cli.build import values_given
from torch_rtx.cli.shapes import sizes_given
from torch_rtx.errors import SettingsError
from torch_rtx.profiles import Range


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
    with pytest.raises(SettingsError, match="'batch=3' is not a size, or is given twice"):
        sizes_given(["batch=8", "batch=3"])


def test_profiles(tmp_path: Path) -> None:
    """By sizes and by shapes, the same; as many as are given."""
    onnx.save(linear(), tmp_path / "model.onnx")
    given = ["build", str(tmp_path / "model.onnx"), "--device", "cpu"]
    by_shapes = ["--min-shapes", "x:1x3x4", "--max-shapes", "x:1x3x4", "--min-shapes", "x:2x3x4"]
    by_shapes += ["--opt-shapes", "x:1x3x4", "--opt-shapes", "x:3x3x4", "--max-shapes", "x:8x3x4"]
    found = []
    for options in (["--profile", "batch=1", "--profile", "batch=2:3:8"], by_shapes):
        done = CliRunner().invoke(app, [*given, *options, "--no-strip", "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["engine"] == str(tmp_path / "model.rtx")
        found.append(torch_rtx.load(tmp_path / "model.rtx").profiles)
    (name,) = found[0][0]
    assert [profile[name][0] for profile in found[0]] == [Range(1, 1, 1), Range(2, 3, 8)]
    assert found[0] == found[1]
    wrong = {"y:1x3x4": "the model has no input 'y'", "x:1x3x5": "has 5 in place of 4", "x:1x": "no list of shapes"}
    for shapes, message in wrong.items():
        done = CliRunner().invoke(app, [*given, "--opt-shapes", shapes])
        assert (done.exit_code, message in done.output) == (1, True), done.output


def test_dtype(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "model.onnx")
    given = ["build", str(tmp_path / "model.onnx"), "--device", "cpu", "--size", "batch=1"]
    done = CliRunner().invoke(app, [*given, "--dtype", "float16", "-O", 'disabled_passes=["fuse"]'])
    assert done.exit_code == 0, done.output
    found = torch_rtx.inspect(tmp_path / "model.rtx")
    assert {parameter.dtype for parameter in found.parameters} == {"f16"}
    assert set(found.inputs.values()) == {"f16[1, 3, 4]"}
    for option, message in (("--dtype", "no dtype of models"), ("-O", "unknown option half")):
        done = CliRunner().invoke(app, [*given, option, "half" if option == "--dtype" else "half=1"])
        assert (done.exit_code, message in done.output) == (1, True), done.output


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
