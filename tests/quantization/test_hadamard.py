"""Rotations: orthogonal, without effect on a layer that is not quantized, and with the effect that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_rtx.quantization import quantize
from torch_rtx.quantization.hadamard import block_of, hadamard, rotated

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 64, 1024])
def test_matrices(size: int) -> None:
    matrix = hadamard(size, CPU).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize(("width", "block"), [(768, 256), (4096, 256), (192, 64), (65, 1), (6, 2)])
def test_blocks(width: int, block: int) -> None:
    assert block_of(width) == block
    x, w = torch.randn(3, width, dtype=torch.float64), torch.randn(5, width, dtype=torch.float64)
    matrix = hadamard(block, CPU)
    torch.testing.assert_close(rotated(x, matrix) @ rotated(w, matrix).t(), x @ w.t(), rtol=1e-6, atol=1e-6)


def test_rotated_layers_compute_the_same() -> None:
    """The layer's own rotation of input and weight, before anything is rounded."""
    layer = quantize(nn.Linear(96, 7), "int8_rotated")
    x = torch.randn(5, 96)
    y = layer.smoothed_input(x) @ layer.smoothed_weight().t() + layer.bias
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(layer.smoothed_weight(), layer.weight)


def test_rotation_spreads_outliers() -> None:
    x = torch.randn(64, 256)
    x[:, 7] *= 100
    layer = nn.Linear(256, 64)
    y = layer(x)

    def error(preset: str) -> float:
        other = nn.Linear(256, 64)
        other.load_state_dict(layer.state_dict())
        return float((quantize(other, preset)(x) - y).norm())

    assert error("int8_rotated") < 0.5 * error("int8_dynamic")


def test_odd_widths_have_no_rotation() -> None:
    layer = quantize(nn.Linear(9, 4), "int8_rotated")
    assert not layer.quantization.rotate
