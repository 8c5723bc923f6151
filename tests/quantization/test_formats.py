"""Each preset against its definition in float64; gradients; dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_rtx.errors import QuantizationError
from torch_rtx.quantization import PRESETS, Format, LayerConfig, quantize, restore
from torch_rtx.quantization.formats import amax_of, codes_of, fake_quantize

Array = np.ndarray
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def integers(x: Array, scale: Array, most: int, least: int | None = None) -> Array:
    return np.clip(np.rint(x / scale), -most if least is None else least, most) * scale


def floats(x: Array, scale: Array, most: float, dtype: type) -> Array:
    return np.clip(x / scale, -most, most).astype(np.float32).astype(dtype).astype(np.float64) * scale


def amax(x: Array, axis: int | None) -> Array:
    return np.maximum(np.abs(x).max(axis, keepdims=True), 1e-30)


def by_blocks(x: Array, block: int) -> Array:
    return x.reshape(-1, block)


def nvfp4(x: Array) -> Array:
    """Blocks of 16: e2m1 elements, e4m3 scales of blocks, a float scale of the tensor."""
    tensor = np.abs(x).max() / (6 * 448)
    blocks = by_blocks(x, 16)
    scales = (amax(blocks, 1) / 6 / tensor).astype(np.float32).astype(E4M3).astype(np.float64) * tensor
    return floats(blocks, scales, 6, E2M1).reshape(x.shape)


def int4(x: Array) -> Array:
    blocks = by_blocks(x, 128)
    return integers(blocks, amax(blocks, 1) / 7, 7, -8).reshape(x.shape)


def int8(axis: int | None) -> object:
    return lambda x: integers(x, amax(x, axis) / 127, 127)


def fp8(axis: int | None) -> object:
    return lambda x: floats(x, amax(x, axis) / 448, 448, E4M3)


DEFINITIONS = {  # of weights [out, in], of inputs [tokens, in]
    "int8": (int8(1), int8(None)),
    "int8_dynamic": (int8(1), int8(1)),
    "int8_weight_only": (int8(1), None),
    "fp8": (fp8(None), fp8(None)),
    "fp8_dynamic": (fp8(1), fp8(1)),
    "int4_weight_only": (int4, None),
    "nvfp4": (nvfp4, nvfp4),
}


def data(*shape: int, seed: int = 0) -> Tensor:
    """Numbers with a few large ones, float32's own as double."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * (1 + 3 * (x > 2))).double()


def settings(preset: str) -> LayerConfig | dict[str, object]:
    """The preset with the largest magnitude as amax: searches for other scales have tests of their own."""
    return {"preset": preset, "weight": {"calibration": "max"}, "smooth": False}


@pytest.mark.quick
@pytest.mark.parametrize("preset", DEFINITIONS)
def test_definition(preset: str) -> None:
    layer, x = nn.Linear(256, 8, dtype=torch.float64), data(5, 256)
    with torch.no_grad():
        layer.weight.copy_(data(8, 256, seed=1))
    weight, given = DEFINITIONS[preset]
    w = weight(layer.weight.detach().numpy())
    inputs = x.numpy() if given is None else given(x.numpy())
    wanted = inputs @ w.T + layer.bias.detach().numpy()
    quantize(layer, {"*": settings(preset)}, lambda model: model(x))
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.quantized_weight().detach().numpy(), w, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_dtypes(preset: str, dtype: torch.dtype) -> None:
    """In smaller types the same numbers within the type's rounding, and in the type."""
    x = data(16, 256).to(dtype)
    layer = nn.Linear(256, 32).to(dtype)
    quantize(layer, preset, lambda model: model(x))
    exact = restore(nn.Linear(256, 32).double(), preset, layer.state_dict())
    assert layer(x).dtype == dtype
    error = (layer(x).double() - exact(x.double())).norm() / exact(x.double()).norm()
    # A code may fall on the other side of a tie.
    assert error < max(4 * torch.finfo(dtype).eps, 1e-2)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (9,)), (nn.Conv2d, (7, 8)), (nn.Conv3d, (4, 5, 3))])
@pytest.mark.parametrize("preset", ["int8", "int8_dynamic", "int8_rotated", "fp8", "fp8_dynamic", "int8_weight_only"])
def test_convolutions(kind: type[nn.Conv2d], shape: tuple[int, ...], preset: str) -> None:
    """Weights by output channel, inputs by tensor or sample; with and without a batch, stride, padding, groups."""
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular", dtype=torch.float64)
    x = data(3, 4, *shape) * torch.tensor([1.0, 10.0, 0.1]).view(3, *[1] * (len(shape) + 1))
    weight, given = DEFINITIONS[preset.replace("rotated", "dynamic")]
    w = torch.from_numpy(weight(layer.weight.detach().flatten(1).numpy())).view_as(layer.weight)
    flat = x.flatten(1).numpy()
    inputs = x if given is None else torch.from_numpy(given(flat)).view_as(x)
    wanted = torch.func.functional_call(layer, {"weight": w}, (inputs,))
    quantize(layer, preset, lambda model: model(x))
    torch.testing.assert_close(layer(x), wanted)
    if preset == "int8_dynamic":
        torch.testing.assert_close(layer(x[1]), wanted[1])


@pytest.mark.parametrize("preset", ["int8_weight_only", "int4_weight_only", "nvfp4", "fp8"])
def test_embeddings(preset: str) -> None:
    layer, ids = nn.Embedding(20, 128, padding_idx=3, dtype=torch.float64), torch.tensor([[3, 5], [0, 3]])
    model = nn.ModuleDict({"words": layer})
    wanted = DEFINITIONS[preset][0](layer.weight.detach().numpy())
    quantize(model, {"words": settings(preset)})
    torch.testing.assert_close(layer(ids), torch.from_numpy(wanted)[ids])
    layer(ids).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[[0, 3, 5, 7]].sum(1).tolist() == [128, 0, 128, 0]


def test_float4_rounds_to_the_nearest() -> None:
    """Every sixteenth of the range, ties among them."""
    ratio = torch.arange(-7, 7, 1 / 16)
    wanted = np.clip(ratio.numpy(), -6, 6).astype(E2M1).astype(np.float32)
    assert codes_of(ratio, Format("float4_e2m1", "block", 16)).float().tolist() == wanted.tolist()


@pytest.mark.parametrize("preset", PRESETS)
def test_zeros_stay_zeros(preset: str) -> None:
    """Weights, channels, blocks and tokens of zeros, and of numbers near the smallest."""
    layer = nn.Linear(256, 3, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, 128:] = 1e-44
    x = torch.randn(4, 256)
    quantize(layer, preset, lambda model: model(x))
    x[1] = 0
    y = layer(x)
    assert y.isfinite().all()
    assert not y[:, 0].any()
    assert not y[1].any()
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer(x).any()


def test_gradients_pass_straight_through() -> None:
    """Within amax as if nothing were rounded, beyond it not at all."""
    x = torch.tensor([[0.1, -0.9, 1.0, 1.7, -3.0]], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), Format("int8")).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 0, 0]]
    blocks = torch.randn(3, 32, requires_grad=True)
    form = Format("int4", "block", 16)
    fake_quantize(blocks, amax_of(blocks, form, (1,)), form).sum().backward()
    assert blocks.grad is not None
    assert (blocks.grad == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of int8, int4"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"calibration": "best"}, "calibration must be one of"),
        ({"granularity": "block"}, "block=0"),
        ({"block": 16}, "block=16"),
        ({"granularity": "block", "block": -2}, "block=-2"),
        ({"dtype": "float4_e2m1"}, "needs blocks"),
        ({"percentile": 0}, "percentile must be in"),
        ({"dtype": "float8_e4m3fn", "calibration": "entropy"}, "entropy calibrates integers"),
    ],
)
def test_mistakes_in_formats(fields: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        Format(**fields)  # type: ignore[arg-type]
