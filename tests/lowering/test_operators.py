"""Operators of vision models in engines for a GPU: none of them is a library call between kernels.

`LEFT` are those that are; it may only shrink. A copy that nothing else joins may be a call: what an operator is given
is computed here, and so is what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_rtx
from benchmarks.numerics import assert_right, in_float64
from benchmarks.segmentation import MedicalUNet
from tests.lowering.test_kernel_models import check, kernels, numbers
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph, TensorType, contiguous
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable

Case = tuple[Callable[..., Tensor], tuple[int, ...]]
IMAGE, SEQUENCE, VOLUME = (2, 8, 7, 6), (2, 8, 11), (1, 8, 3, 4, 5)


def _resized(mode: str, shape: tuple[int, ...], aligned: bool | None = None, **how: Any) -> Case:
    return (lambda x: F.interpolate(x, mode=mode, align_corners=aligned, **how)), shape


def _sampled(x: Tensor, **how: Any) -> Tensor:
    """At positions that the image itself gives, within it and beyond."""
    rank = x.dim() - 2
    grid = x[:, :rank].movedim(1, -1) * 0.8
    return F.grid_sample(x, grid, **{"align_corners": False, **how})


def _stepped(x: Tensor) -> Tensor:
    return torch.slice_scatter(x, x[..., ::2] + 1, 3, 0, x.shape[3], 2)


CASES: dict[str, Case] = {
    "instance norm": (nn.InstanceNorm2d(8, affine=True), IMAGE),
    "instance norm of sequences": (F.instance_norm, SEQUENCE),
    "instance norm of volumes": (F.instance_norm, VOLUME),
    "instance norm by running statistics": (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), IMAGE),
    "transposed 1d": (nn.ConvTranspose1d(8, 6, 4, 2, 1), SEQUENCE),
    "transposed 2d": (nn.ConvTranspose2d(8, 6, 2, 2), IMAGE),
    "transposed 2d, overlapping": (nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), IMAGE),
    "transposed 2d, groups": (nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=4), IMAGE),
    "transposed 2d, depthwise": (nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8), IMAGE),
    "transposed 3d": (nn.ConvTranspose3d(8, 6, 2, 2), VOLUME),
    "convolution 3d": (nn.Conv3d(8, 6, 3, padding=1), VOLUME),
    "convolution 3d, same": (nn.Conv3d(8, 6, 3, padding="same"), VOLUME),
    "convolution 1d, groups": (nn.Conv1d(8, 8, 3, padding=1, groups=4), SEQUENCE),
    "linear": _resized("linear", SEQUENCE, False, scale_factor=1.7),
    "bilinear": _resized("bilinear", IMAGE, False, scale_factor=2),
    "bilinear, aligned": _resized("bilinear", IMAGE, True, size=(13, 1)),
    "bicubic": _resized("bicubic", IMAGE, False, size=(5, 9)),
    "bicubic, aligned": _resized("bicubic", IMAGE, True, scale_factor=1.7),
    "trilinear": _resized("trilinear", VOLUME, False, scale_factor=2),
    "nearest": _resized("nearest", IMAGE, scale_factor=1.7),
    "nearest by whole factors": _resized("nearest", VOLUME, scale_factor=2),
    "nearest, exact": _resized("nearest-exact", IMAGE, size=(10, 5)),
    "grid, linear": (_sampled, IMAGE),
    "grid, linear of volumes": (lambda x: _sampled(x, padding_mode="border"), VOLUME),
    "grid, nearest": (lambda x: _sampled(x, mode="nearest", padding_mode="reflection"), IMAGE),
    "grid, cubic": (lambda x: _sampled(x, mode="bicubic", padding_mode="reflection", align_corners=True), IMAGE),
    "one hot": (lambda x: F.one_hot((x > 0).to(torch.int64), 3), IMAGE),
    "mean squared error": (lambda x: F.mse_loss(x, x.flip(1), reduction="none"), IMAGE),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, x.flip(1), reduction="none"), IMAGE),
    "huber": (lambda x: F.huber_loss(x, x.flip(1)), IMAGE),
    "cross entropy of two classes": (lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid()), IMAGE),
    "repeat interleave": (lambda x: x.repeat_interleave(3, 1), IMAGE),
    "scatter of a slice with steps": (_stepped, IMAGE),
    "sums of windows": (lambda x: F.fold(F.unfold(x, 3, padding=1), (7, 6), 3, padding=1), IMAGE),
    "the largest of many": (lambda x: F.max_pool2d(x, 13, 1, 6), IMAGE),
    "flip": (lambda x: x.flip(2), IMAGE),
    "roll": (lambda x: x.roll((3, 2), (2, 3)), IMAGE),
    "shuffle of pixels": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "shuffle of channels": (lambda x: F.channel_shuffle(x, 2), IMAGE),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), IMAGE),
    "average of what there is": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), IMAGE),
    "average of padded windows": (lambda x: F.avg_pool2d(x, (2, 3), 2, 1, True), IMAGE),
    "average of sequences": (lambda x: F.avg_pool1d(x, 3, 2), SEQUENCE),
    "adaptive average of sequences": (lambda x: F.adaptive_avg_pool1d(x.mT, 2), SEQUENCE),
    "adaptive average of volumes": (lambda x: F.adaptive_avg_pool3d(x, 1), VOLUME),
    "positions of the largest": (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], IMAGE),
    "prelu": (nn.PReLU(8), IMAGE),
    "rotation": (lambda x: torch.rot90(x, 1, (2, 3)), IMAGE),
}
LEFT: dict[str, Case] = {
    "aten._upsample_bilinear2d_aa.vec": _resized("bilinear", IMAGE, False, size=(3, 3), antialias=True),
    "aten._upsample_bicubic2d_aa.vec": _resized("bicubic", IMAGE, False, size=(3, 3), antialias=True),
    "aten.adaptive_max_pool2d.default": (lambda x: F.adaptive_max_pool2d(x, 5), IMAGE),
    "aten.adaptive_avg_pool2d.default": (lambda x: F.adaptive_avg_pool2d(x, 5), IMAGE),
    "aten.affine_grid_generator.default": (lambda x: F.affine_grid(x[:, 0, :2, :3], [2, 8, 4, 5], False), IMAGE),
    "aten._cdist_forward.default": (lambda x: torch.cdist(x[0, 0], x[0, 1], p=1.0), IMAGE),
}


class Between(nn.Module):
    """An operator between two others."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, *images: Tensor) -> list[Tensor]:
        return [self.op(x * 1.5).abs() for x in images]


def compiled(model: nn.Module, *args: Tensor, dynamic: Any = None) -> torch_rtx.CompiledModule:
    """The engine of `model` for a GPU, whose kernels run as calls here."""
    settings = CompilationSettings(device="cuda", targets="sm_90", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(model, args, dynamic_shapes=dynamic, settings=settings)


def calls(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.kind in ("extern", "fallback")]


def right(model: nn.Module, module: torch_rtx.CompiledModule, *args: Tensor) -> None:
    with torch.no_grad():
        assert_right(module(*args), model(*args), in_float64(model, args, {}))


@pytest.mark.parametrize("name", CASES)
def test_is_no_call(name: str) -> None:
    """In both layouts; and it is right."""
    torch.manual_seed(0)
    op, shape = CASES[name]
    model, image = Between(op).eval().half(), torch.randn(shape).half()
    layouts = (torch.contiguous_format, *[torch.channels_last] * (len(shape) == 4))
    given = [image.contiguous(memory_format=layout) for layout in layouts]
    module = compiled(model, *given)
    assert not calls(module.engine.graph)
    right(model, module, *given)


@pytest.mark.parametrize("name", LEFT)
def test_is_still_a_call(name: str) -> None:
    op, shape = LEFT[name]
    assert name in calls(compiled(Between(op), torch.randn(shape)).engine.graph)


class Resampled(nn.Module):
    """Images of any size, enlarged in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.up(x))
        for mode, aligned in (("bilinear", False), ("bicubic", True), ("nearest", None), ("nearest-exact", None)):
            found = found + F.interpolate(x, found.shape[2:], mode=mode, align_corners=aligned)
        return F.interpolate(F.prelu(found, self.norm.weight), size=(5, 7), mode="bilinear")


def test_open_sizes() -> None:
    """Every kernel is right, for a size that is open."""
    torch.manual_seed(0)
    model, height = Resampled().eval().half(), torch.export.Dim("height", min=3, max=12)
    args = (torch.randn(2, 4, 6, 5).half(),)
    module = compiled(model, *args, dynamic=({2: height},))
    assert not [op for op in calls(module.engine.graph) if op != "aten.clone.default"]
    for height_now in (3, 9):
        right(model, module, torch.randn(2, 4, height_now, 5).half())
    sizes = numbers(module.engine.graph)
    for node in kernels(module.engine.graph).values():
        check(node, sizes)


def test_unet() -> None:
    """All of a U-Net is kernels, and no activation is copied to another layout, or stored in two."""
    torch.manual_seed(0)
    model, image = MedicalUNet((8, 12, 16)).eval().half(), torch.randn(1, 1, 16, 24).half()
    module = compiled(model, image)
    graph = module.engine.graph
    assert not calls(graph)
    right(model, module, image)
    convolutions = sum(isinstance(one, nn.Conv2d | nn.ConvTranspose2d) for one in model.modules())
    norms = sum(isinstance(one, nn.InstanceNorm2d) for one in model.modules())
    concatenated = 2  # with what is enlarged: in the same kernel
    made = [node for node in graph.nodes if node.kind == "kernel"]
    assert len(made) == convolutions + norms + concatenated
    for node in made:
        (value,) = node.results
        assert isinstance(value.type, TensorType)
        if value.name != graph.outputs[0].name:  # type: ignore[union-attr]
            assert value.type.strides != contiguous(value.type.shape)
