"""Windows, Fourier transforms and the weights of mel spectrograms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.dtypes import dtype_of
from torch_rtx.onnx.registry import Numbers, op

# The factors of cosines: of no, one and two periods in a window.
WINDOWS = {"HannWindow": (0.5, -0.5), "HammingWindow": (25 / 46, -21 / 46), "BlackmanWindow": (0.42, -0.5, 0.08)}


def _declare_window(name: str, factors: tuple[float, ...]) -> None:
    @op(name, ints=("size",))
    def window(
        size: Numbers, *, output_datatype: int = 1, periodic: int = 1, device: torch.device | None = None
    ) -> Tensor:
        count = size[0]
        period = count if periodic else torch.sym_max(count - 1, 1)
        phase = torch.arange(count, dtype=torch.float64, device=device) * (2 * math.pi / period)
        values = sum(factor * torch.cos(phase * number) for number, factor in enumerate(factors))
        return values.to(dtype_of(output_datatype))  # type: ignore[union-attr]


for _name, _factors in WINDOWS.items():
    _declare_window(_name, _factors)


@op("MelWeightMatrix", ints=("bins", "dft_length", "sample_rate", "lower", "upper"))
def mel_weight_matrix(
    bins: Numbers,
    dft_length: Numbers,
    sample_rate: Numbers,
    lower: Numbers,
    upper: Numbers,
    *,
    output_datatype: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Triangles of frequencies on the mel scale, (dft_length // 2 + 1, bins), in Hz."""
    low, high = (2595 * math.log10(1 + edge[0] / 700) for edge in (lower, upper))
    step = (high - low) / (bins[0] + 2)
    mels = torch.arange(bins[0] + 2, dtype=torch.float64, device=device) * step + low
    edges = torch.floor((dft_length[0] + 1) * 700 * torch.expm1(mels / 2595 * math.log(10)) / sample_rate[0])
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    places = torch.arange(dft_length[0] // 2 + 1, dtype=torch.float64, device=device)[:, None]
    rising = torch.where(left == center, 1.0, (places - left) / (center - left))
    falling = (right - places) / (right - center)
    up, down = (places >= left) & (places <= center), (places > center) & (places < right)
    return torch.where(up, rising, torch.where(down, falling, 0.0)).to(dtype_of(output_datatype))


def _complex(x: Tensor) -> Tensor:
    """(..., 1) or (..., 2) as numbers, complex in the second case."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


@op("DFT", since=20, ints=("length", "axis"))
def dft(
    x: Tensor,
    length: Numbers | None = None,
    axis: Numbers | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform along an axis of (..., 1), real, or (..., 2), complex."""
    return _dft(x, length[0] if length else None, int(axis[0]) if axis else -2, inverse, onesided)


@op("DFT", ints=("length",))
def dft_attribute(
    x: Tensor, length: Numbers | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """DFT with its axis as an attribute."""
    return _dft(x, length[0] if length else None, axis, inverse, onesided)


def _dft(x: Tensor, length: Any, axis: int, inverse: int, onesided: int) -> Tensor:
    axis = axis % x.dim()
    if axis == x.dim() - 1:
        raise OnnxError("the last axis has the parts of complex numbers: there is no transform along it")
    numbers = _complex(x)
    if onesided and inverse:
        result = torch.fft.irfft(numbers, length, axis).unsqueeze(-1)
    elif onesided:
        if numbers.is_complex():
            raise OnnxError("a one-sided transform needs real numbers")
        result = torch.view_as_real(torch.fft.rfft(numbers, length, axis))
    else:
        spectrum = (torch.fft.ifft if inverse else torch.fft.fft)(numbers, length, axis)
        result = torch.view_as_real(spectrum.resolve_conj())
    return result.to(x.dtype)


@op("STFT", ints=("frame_step", "frame_length"))
def stft(
    signal: Tensor,
    frame_step: Numbers,
    window: Tensor | None = None,
    frame_length: Numbers | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Transforms of windows of (batch, length, 1 or 2): (batch, frames, bins, 2)."""
    length = frame_length[0] if frame_length else signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, length, frame_step[0])  # (batch, frames, 1 or 2, length)
    frames = frames if window is None else frames * window
    real = signal.shape[-1] == 1
    return _dft(frames.movedim(-1, 2), None, 2, 0, int(onesided and real))
