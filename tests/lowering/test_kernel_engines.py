"""Engines with kernels: how many launches a forward takes, and equal bytes for equal builds."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import torch_rtx
from benchmarks import models
from torch_rtx import CompilationSettings
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph
from torch_rtx.tactics import KernelTable

# Launches of a forward: per layer, how many layers the small model has, and those around them (embedding, final norm,
# head, masks). The copy of ResNet's input to channels-last is left out: a caller may give it so.
LAUNCHES = {"bert_base": (7, 2, 4), "gpt2": (7, 2, 2), "llama": (9, 2, 5), "resnet50": (26, 1, 0)}


def graph(name: str) -> Graph:
    model, args, kwargs = models.build(name, "small", dtype=torch.float16)
    if name == "resnet50":
        model, args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
            (model, args, kwargs),
        )
        model = model.to(memory_format=torch.channels_last)
    settings = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):  # counted, not compiled
        return torch_rtx.compile(model, args, kwargs, settings=settings).engine.graph


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name: str) -> None:
    per_layer, layers, around = LAUNCHES[name]
    nodes = [node for node in graph(name).nodes if node.kind != "view"]
    assert {node.kind for node in nodes} == {"kernel"}
    assert len(nodes) <= per_layer * layers + around


LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


@pytest.mark.parametrize(
    ("model", "shape", "image", "weight", "expected"),
    [
        (nn.Conv2d(8, 8, 3), (2, 8, 6, 6), LAST, torch.contiguous_format, LAST),
        (nn.Conv2d(8, 8, 3), (2, 8, 6, 6), torch.contiguous_format, LAST, LAST),
        (nn.Conv2d(8, 8, 3), (2, 8, 6, 6), torch.contiguous_format, torch.contiguous_format, torch.contiguous_format),
        (nn.Conv2d(8, 8, 3).double(), (2, 8, 6, 6), LAST, LAST, torch.contiguous_format),
        (nn.ConvTranspose2d(8, 8, 3), (2, 8, 6, 6), LAST, torch.contiguous_format, LAST),
        (nn.Conv3d(8, 8, 3), (2, 8, 4, 6, 6), LAST_3D, torch.contiguous_format, LAST_3D),
    ],
)
def test_results_of_convolutions_have_the_layout_of_eager(
    model: nn.Module,
    shape: tuple[int, ...],
    image: torch.memory_format,
    weight: torch.memory_format,
    expected: torch.memory_format,
) -> None:
    """That of cuDNN, also where PyTorch was built without it; and no kernel copies for it."""
    x = torch.randn(shape, dtype=next(model.parameters()).dtype).contiguous(memory_format=image)
    settings = CompilationSettings(device="cuda", targets="sm_89", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        program = torch_rtx.compile(model.to(memory_format=weight), (x,), settings=settings).engine.graph
    (result,) = program.outputs
    assert result.type.strides == model(x).contiguous(memory_format=expected).stride()  # type: ignore[union-attr]
    if image == expected != torch.contiguous_format:
        assert not any("clone" in node.op for node in program.nodes)


def test_equal_builds_are_equal_bytes(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.norm(x + self.out(y.transpose(1, 2).flatten(2)))

    settings = CompilationSettings(device="cuda", targets=["sm_86", "ptx"], reuse_cached_engines=False)
    for name in ("one", "two"):
        batch = torch.export.Dim("batch", min=1, max=8)
        shapes = ({0: batch},)
        module = torch_rtx.compile(Block().half().eval(), (torch.randn(2, 8, 32).half(),), None, shapes, settings)
        torch_rtx.save(module, tmp_path / name)
    assert module.engine.kernels
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    inspection = torch_rtx.inspect(tmp_path / "one")
    assert set(inspection.kernels) == {"sm_86", "compute_80"}
