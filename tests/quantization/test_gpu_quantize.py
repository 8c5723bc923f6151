"""Models that are calibrated, trained and compiled on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torch_rtx
from torch_rtx.quantization import PRESETS, quantize
from torch_rtx.runtime.watch import same_bits

pytestmark = pytest.mark.gpu


def calibrated(preset: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A quantized model and an input of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.Linear(128, 64)).eval()
    x = torch.randn(48, 128)
    x[:, 5] *= 20
    model, x = model.to(device, dtype), x.to(device, dtype)
    return quantize(model, preset, lambda model: [model(part) for part in x.split(16)]), x


@pytest.mark.parametrize("calibration", ["max", "percentile", "entropy", "mse"])
def test_calibration_is_that_of_a_cpu(calibration: str) -> None:
    preset = {"*": {"preset": "int8", "smooth": False, "input": {"calibration": calibration}}}
    (ours, _), (wanted, _) = (calibrated(preset, device) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    for name, buffer in wanted.named_buffers():
        found = ours.get_buffer(name)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), buffer, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_engines(preset: str, dtype: torch.dtype) -> None:
    """Kernels compute what eager does, also of other float weights."""
    model, x = calibrated(preset, "cuda", dtype)
    engine = torch_rtx.compile(model, (x,))
    for _ in range(2):
        exact, wanted = copy.deepcopy(model).double()(x.double()), model(x)
        torch_rtx.wait()
        # Eager rounds dequantized values to the dtype, kernels do not. A code of a later layer may be the next one, and
        # where there are few codes that is far away.
        eager = (wanted - exact).norm() / exact.norm()
        assert (engine(x) - exact).norm() < max(0.04, 2 * eager) * exact.norm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.linspace(0.5, 2, parameter.shape[-1], device="cuda", dtype=dtype))
        engine.refit(model)


@pytest.mark.parametrize("preset", ["int8", "int8_rotated", "fp8_dynamic"])
def test_training(preset: str) -> None:
    model, x = calibrated(preset, "cuda")
    grads = []
    for run in (torch.compile(model, backend="rtx"), model):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, wanted in zip(*grads, strict=True):
        assert (ours - wanted).norm() < 0.05 * wanted.norm()


def test_layers_on_two_devices() -> None:
    """Each layer's buffers are where its weight is."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(128, 128), nn.Linear(128, 8, device="cuda", dtype=torch.float16)

        def forward(self, x: Tensor) -> Tensor:
            return self.far(self.near(x).to("cuda", torch.float16))

    for preset in ("int8", "int8_rotated", "int4_awq"):
        model, x = Split(), torch.randn(16, 128)
        wanted = model(x)
        quantize(model, preset, lambda model: model(x))  # noqa: B023
        assert {buffer.device.type for buffer in model.far.buffers()} == {"cuda"}
        assert (model(x) - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_layers_are_quantized_together(preset: str) -> None:
    """With the bits that each has alone, also of zeros and of numbers of every size."""
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes) for _ in range(5) for sizes in ((256, 384), (384, 256))]
    for power, layer in enumerate(layers):
        layer.weight.data *= 2.0 ** (power - 5)
        layer.weight.data[power, :9] = torch.tensor([0.0, -0.0, 1e-7, -1e-5, 3.5, -60000, 448, 2.5, -0.5])
    model, x = nn.Sequential(*layers).to("cuda", torch.float16).eval(), torch.randn(8, 256).to("cuda", torch.float16)
    with torch.no_grad():
        quantize(model, preset, lambda model: [layer(torch.randn_like(layer.weight[:8])) for layer in model])
        engine = torch_rtx.compile(model, (x,), settings=torch_rtx.CompilationSettings(targets="later"))
    store, given = engine._store, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    batches = [len(batch) for batch in store._recipes.batches(i for i, w in enumerate(store.weights) if w.recipe)]
    assert preset == "int8_rotated" or max(batches) >= 5  # which multiplies by Hadamard matrices
    store.refit(given, strict=False)
    for index, value in enumerate(store.values):
        assert same_bits(value, store._make(index, given)), store.weights[index].names
