"""`torch-rtx refit`: an engine with the weights of a file in it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from torch_rtx.cli.app import app


def test_refit(tmp_path: Path) -> None:
    built, other = nn.Linear(4, 2), nn.Linear(4, 2)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(built, (x,)), tmp_path / "a.rtx")
    state = other.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    for name in ("weight", "bias"):
        save_file({name: state[name]}, tmp_path / f"{name}.safetensors")
    save_file(state | {"more": x}, tmp_path / "more.safetensors")
    stripped = (tmp_path / "a.rtx").read_bytes()

    def refit(*arguments: str) -> str:
        given = [argument.replace("@", f"{tmp_path}/") for argument in arguments]
        done = CliRunner().invoke(app, ["refit", *given])
        return f"{done.exit_code} {done.output}"

    assert refit("@a.rtx", "-w", "@more.safetensors", "-o", "@b.rtx").startswith("1 error: weights do not fit")
    assert refit("@a.rtx", "-w", "@bias.safetensors").startswith("1 error: weights do not fit")
    assert refit("@a.rtx", "-w", "@none.safetensors").startswith("1 error: ")
    assert "no such folder" in refit("@a.rtx", "-w", "@whole.safetensors", "-o", "@none/b.rtx")
    assert (tmp_path / "a.rtx").read_bytes() == stripped
    assert {path.name for path in tmp_path.glob("*.rtx*")} == {"a.rtx"}
    calls = (
        ("-w", "@whole.safetensors", "-o", "@b.rtx"),
        ("-w", "@bias.safetensors", "--weights", "@weight.safetensors", "-o", "@b.rtx"),
        ("-w", "@more.safetensors", "--no-strict", "-o", "@b.rtx"),
    )
    for arguments in calls:
        assert refit("@a.rtx", *arguments).startswith("0 wrote")
        torch.testing.assert_close(torch_rtx.load(tmp_path / "b.rtx")(x), other(x))
    assert refit("@b.rtx", "-w", "@b.rtx").startswith("1 error: ")
    gc.collect()  # the traceback of this error has the file mapped, as no new process of the command has
    save_file(built.state_dict(), tmp_path / "whole.safetensors")
    assert refit("@b.rtx", "-w", "@whole.safetensors").startswith("0 wrote")  # in place, and again
    torch.testing.assert_close(torch_rtx.load(tmp_path / "b.rtx")(x), built(x))


def test_refit_from_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from tests.onnx.models import linear

    model = linear()
    onnx.save(model, tmp_path / "a.onnx")
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(tmp_path / "a.onnx", dynamic_shapes={"batch": 2}), tmp_path / "a.rtx")
    model.graph.initializer[0].name = model.graph.node[-1].input[1] = "onnx::MatMul_1"
    onnx.save(model, tmp_path / "b.onnx")
    done = CliRunner().invoke(app, ["refit", f"{tmp_path}/a.rtx", "--weights", f"{tmp_path}/b.onnx"])
    assert done.exit_code == 0, done.output
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch_rtx.load(tmp_path / "a.rtx")(x), torch_rtx.from_onnx(model)(x))
