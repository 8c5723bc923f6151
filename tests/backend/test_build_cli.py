"""`torch-rtx build`: an engine from an ONNX model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("onnx_ir")

import onnx

import torch_rtx
from tests.onnx.models import linear
from torch_rtx.backend.build_cli import sizes_given
from torch_rtx.backend.cli import app
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
