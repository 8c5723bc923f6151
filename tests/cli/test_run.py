"""`torch-rtx run`: one call, its results in files, and what is compared with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import torch_rtx
from torch_rtx.cli import run
from torch_rtx.cli.app import app

DIMS = {"x": {0: torch.export.Dim("batch", min=1, max=9)}, "scale": None, "mask": None}


class Model(nn.Module):
    """A dictionary of results, an argument by name, and one that captures fix."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: int = 2, *, mask: torch.Tensor) -> dict[str, Any]:
        y = self.layer(x) * scale
        return {"y": y, "more": (torch.where(mask, y, 0.0).half(), y.argmax(-1))}


def model() -> nn.Module:
    """What `--model` names."""
    torch.manual_seed(0)
    return Model()


def other() -> nn.Module:
    """The same program with other weights."""
    torch.manual_seed(1)
    return Model()


class Rounding(Model):
    """Its results are less exact than their dtype allows."""

    def forward(self, x: torch.Tensor, scale: int = 2, *, mask: torch.Tensor) -> dict[str, Any]:
        found = super().forward(x, scale, mask=mask)
        return {**found, "y": found["y"] + 1e-3}


def rounding() -> nn.Module:
    """A model that is not what the engine computes."""
    torch.manual_seed(0)
    return Rounding()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    made = model()
    example = (torch.randn(2, 4), 2), {"mask": torch.tensor([True, False, True])}
    torch_rtx.save(torch_rtx.compile(made, *example, dynamic_shapes=DIMS), folder / "model.rtx")
    save_file(made.state_dict(), folder / "model.safetensors")
    inputs = {"x": torch.randn(5, 4), "mask": torch.tensor([True, True, False])}
    save_file(inputs, folder / "in.safetensors")
    np.savez(folder / "in.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    return folder


def call(folder: Path, *given: object) -> Result:
    return CliRunner().invoke(app, ["run", str(folder / "model.rtx"), *map(str, given)])


@pytest.mark.parametrize("inputs", ["in.npz", "in.safetensors"])
@pytest.mark.parametrize("out", ["out.npz", "out.safetensors"])
def test_results_in_a_file(folder: Path, inputs: str, out: str, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    done = call(folder, "--weights", weights, "--inputs", folder / inputs, "--out", tmp_path / out)
    assert done.exit_code == 0, done.output
    given = load_file(folder / "in.safetensors")
    right = model()(**given)
    y, half, index = right["y"], *right["more"]
    found: Any = np.load(tmp_path / out) if out.endswith("npz") else load_file(tmp_path / out)
    for name, tensor in (("y", y), ("more.0", half), ("more.1", index)):
        torch.testing.assert_close(torch.as_tensor(found[name]), tensor.detach())
        assert f"{name}: {str(tensor.dtype)[6:]}{list(tensor.shape)}" in done.output


def test_compared_with_a_file(folder: Path, tmp_path: Path) -> None:
    weights, inputs = ("--weights", folder / "model.safetensors"), ("--inputs", folder / "in.npz")
    right = tmp_path / "right.safetensors"
    assert call(folder, *weights, *inputs, "--out", right).exit_code == 0
    done = call(folder, *weights, *inputs, "--compare", right, "--json")
    assert done.exit_code == 0
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["y", "more.0", "more.1"]
    assert not any(row["error"] or row["wrong"] for row in rows)
    changed = load_file(right)
    changed["y"] *= 1.001
    changed["more.1"] = (changed["more.1"] + 1) % 3
    save_file(changed, right)
    done = call(folder, *weights, *inputs, "--compare", right)
    assert done.exit_code == 1
    assert done.output.count("WRONG") == 2
    assert "wrong results: y, more.1" in done.output
    assert call(folder, *weights, *inputs, "--compare", right, "--tolerance", 1).exit_code == 0
    save_file({"y": changed["y"]}, right)
    done = call(folder, *weights, *inputs, "--compare", right)
    assert "the results are more.0, more.1, y, those to compare with y" in done.output
    save_file(changed | {"y": changed["y"][:2].clone()}, right)
    assert "the shape of the result y is [5, 3]" in call(folder, *weights, *inputs, "--compare", right).output


def test_compared_with_the_model(folder: Path) -> None:
    """Its weights are the engine's, unless others are given; the seed decides what is drawn."""
    assert call(folder, "--model", f"{__name__}:model", "--size", "batch=7").exit_code == 0
    wrong = call(folder, "--model", f"{__name__}:other", "--weights", folder / "model.safetensors", "--size", "batch=7")
    assert (wrong.exit_code, "WRONG" in wrong.output) == (1, True)
    assert call(folder, "--model", f"{__name__}:rounding", "--size", "batch=7").exit_code == 1


def test_seeds(folder: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((3, 3, 4)):
        given = ("--weights", folder / "model.safetensors", "--size", "batch=2", "--seed", seed)
        assert call(folder, *given, "--out", tmp_path / f"{number}.safetensors").exit_code == 0
        found.append(load_file(tmp_path / f"{number}.safetensors")["y"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--size", "batch=2"), "has no weights in it"),
        (("-w", "model.safetensors"), "the dynamic sizes are: --size batch="),
        (("-w", "model.safetensors", "-i", "in.npz", "--size", "batch=2"), "--size and --shapes are for random inputs"),
        (
            ("-w", "model.safetensors", "-i", "model.safetensors"),
            "missing inputs x, mask, unexpected",
        ),
        (("-w", "model.safetensors", "-i", "none.npz"), "No such file"),
        (("-w", "model.safetensors", "-i", "model.rtx"), "none of the endings"),
        (("-w", "model.safetensors", "--size", "batch=2", "-o", "none/out.npz"), "there is no such folder"),
        (("-w", "model.safetensors", "--size", "batch=2", "-o", "out.txt"), "none of the endings"),
        (("-w", "model.safetensors", "--size", "batch=2", "--tolerance", "1"), "--tolerance needs right results"),
        (("--model", "a:b", "--compare", "in.npz"), "give one of them"),
        (("--model", "a.onnx:"), "is no model"),
    ],
)
def test_mistakes(folder: Path, given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = call(folder, *given)
    assert done.exit_code == 1
    assert message in done.output
    assert not done.exception or isinstance(done.exception, SystemExit)


def test_files_that_hold_no_tensors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name in ("a.npz", "a.safetensors", "objects.npz"):
        done = call(folder, "-w", folder / "model.safetensors", "-i", tmp_path / name)
        assert (done.exit_code, "can't be read" in done.output) == (1, True), done.output


def test_an_error_that_is_no_number_is_wrong() -> None:
    (found,) = run._compared({"y": torch.tensor([float("nan")])}, *[{"y": torch.ones(1)}] * 2, None)
    assert found.wrong
