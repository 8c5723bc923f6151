"""`torch-rtx calibrate`, and `build --quantize`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.cli.calls import read_tensors

FACTORIES = """
import torch
from torch import nn

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.ones(2, 8),)

def other():
    return nn.Sequential(nn.Linear(8, 8)), (torch.ones(2, 8),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_to_quantize.py").write_text(FACTORIES)
    torch.manual_seed(1)
    save_file({"input": torch.randn(64, 8)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", input=torch.randn(64, 8).numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def call(*given: str) -> Result:
    return CliRunner().invoke(app, list(given))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_calibrated(folder: Path) -> None:
    """The engine is that of the model which `torch_rtx.quantize` makes with the same data."""
    data = ("--inputs", "a.safetensors", "--inputs", "b.npz")
    done = call("calibrate", "models_to_quantize:plain", "--quantize", "int8", *data)
    assert (done.exit_code, done.stdout) == (0, "wrote plain.calibration.safetensors\n"), done.output
    given = ("--quantize", "plain.calibration.safetensors", "--no-strip", "--device", "cpu")
    done = call("build", "models_to_quantize:plain", *given)
    assert done.exit_code == 0, done.output
    samples = [read_tensors(folder / name)["input"] for name in ("a.safetensors", "b.npz")]
    expected = torch_rtx.quantize(model(), "int8", lambda model: [model(x) for x in samples])
    engine, x = torch_rtx.load(folder / "plain.rtx"), torch.randn(2, 8)
    assert torch.equal(engine(x), torch_rtx.compile(expected, (x,))(x))
    assert not torch.allclose(engine(x), model()(x), atol=1e-6)


@pytest.mark.parametrize("config", ["int8_dynamic", '{"*": "int8_weight_only", "2": null}'])
def test_without_data(config: str, folder: Path) -> None:
    done = call("build", "models_to_quantize:plain", "--quantize", config, "--no-strip", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert not torch.equal(torch_rtx.load(folder / "plain.rtx")(x := torch.randn(2, 8)), model()(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("build", "models_to_quantize:plain", "-q", "int8"), "calibration needs data"),
        (("build", "models_to_quantize:plain", "-q", "int9"), "there is no preset 'int9'"),
        (("build", "models_to_quantize:plain", "-q", "{"), "are no JSON"),
        (("build", "models_to_quantize:plain", "-q", "a.safetensors"), "a.safetensors is no calibration"),
        (("build", "models_to_quantize:plain", "-q", "none.safetensors"), "No such file"),
        (
            ("build", "models_to_quantize:plain", "-q", "other.safetensors"),
            "is the calibration of another model",
        ),
        (("calibrate", "models_to_quantize:plain", "-q", "int8", "-i", "none.npz"), "No such file"),
        (
            ("calibrate", "models_to_quantize:plain", "-q", "int8", "-i", "a.safetensors", "-o", "a.npz"),
            "no .safetensors file",
        ),
    ],
)
def test_mistakes(given: tuple[str, ...], message: str, folder: Path) -> None:
    buffers = {"7.input_amax": torch.ones(())}
    save_file(buffers, folder / "other.safetensors", {"torch_rtx.quantize": "int8_dynamic"})
    done = call(*given)
    assert (done.exit_code, message in done.output) == (1, True), done.output


def test_models_without_layers(folder: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), folder / "model.pt2")
    done = call("build", "model.pt2", "-q", "int8_dynamic")
    assert (done.exit_code, "the layers of model.pt2 can't be quantized here" in done.output) == (1, True)
