"""Regions that compute the same have equal keys, however they were captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_rtx
from tests.lowering.test_training_graphs import recorded
from torch_rtx.ir import Graph, kernel_nodes, verify
from torch_rtx.irparse import parse
from torch_rtx.runtime.region_keys import kin_key, plain, region_key

ROWS = """graph import {{
  input in0: f16[1, 64, 8, 8]({0}, 1, 512, 64)
  a: f16[1, 64, 64]({0}, 1, 64) = op aten.view.default(self=in0, size=[1, 64, 64])
  b: f16[1, 64, 64]({0}, 64, 1) = kernel moved(in0=a) graph import {{
    input in0: f16[1, 64, 64]({0}, 1, 64)
    c: f16[1, 64, 64]({0}, 64, 1) = op aten.transpose.int(self=in0, dim0=1, dim1=2)
    return [c]
  }}
  return [b]
}}
"""
PART = """graph import {{
  input in0: f16[4, 512]
  a: f16[4, 128](512, 1) = op aten.slice.Tensor(self=in0, dim=1, start={0}, end={1})
  b: f16[4, 128] = op aten.relu.default(self=a)
  return [b]
}}
"""
SLICES = [f"aten.slice.Tensor(self=in0, dim=0, start={at}, end={at + 1})" for at in (0, 64)]


def parsed(text: str, *numbers: int) -> Graph:
    return parse(text.format(*numbers))


def test_strides_of_ones_tell_nothing() -> None:
    """PyTorch's own functions give different ones; those behind a size above 1, and of other layouts, are told."""
    first, second = parsed(ROWS, 4096), parsed(ROWS, 64)
    assert first != second
    assert plain(first) == plain(second)
    assert region_key(first) == region_key(second)
    assert plain(plain(first)) == plain(first)
    verify(plain(second))
    strided = "graph import {{\n  input in0: f16[{0}]({1})\n  return [in0]\n}}\n"
    kept = [("8, 1, 4", "4, 4, 1"), ("8, 1, 4", "4, 1, 1"), ("1, 8, 4", "32, 1, 8"), ("1, 8, 4", "32, 4, 1")]
    keys = {region_key(parse(strided.format(*one))) for one in kept}
    assert len(keys) == len(kept)
    empty = [region_key(parse(strided.format("1, 1", strides))) for strides in ("1, 1", "5, 7")]
    assert empty[0] == empty[1]


def test_kin_differ_in_the_starts_of_slices_alone() -> None:
    regions = [parsed(PART, start, start + 128) for start in (0, 128, 320, 72)]
    assert len({*map(region_key, regions)}) == 4
    assert len({*map(kin_key, regions)}) == 2  # an address that is less aligned is read more slowly
    assert kin_key(regions[0]) == kin_key(regions[1]) == kin_key(regions[2])
    wider = PART.replace("128", "256")
    assert kin_key(parsed(wider, 0, 256)) != kin_key(regions[0])
    inside = [parsed(ROWS.replace("aten.transpose.int(self=in0, dim0=1, dim1=2)", text), 4096) for text in SLICES]
    assert kin_key(inside[0]) == kin_key(inside[1])


@pytest.mark.usefixtures("fresh_dynamo")
def test_both_ways_of_capture_make_equal_regions() -> None:
    """Export turns cuDNN off while it traces, which norms have as an argument of no effect."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.LayerNorm(36))
    model, x = layers.eval().requires_grad_(False), torch.randn(1, 3, 8, 8)
    with recorded() as graphs:
        torch.compile(model, backend="rtx", options={"reuse_cached_engines": False})(x)
    settings = torch_rtx.CompilationSettings(device="cuda", targets="later", reuse_cached_engines=False)
    exported = torch_rtx.compile(model, (x,), settings=settings).engine.graph
    keys = [{region_key(node.body) for node in kernel_nodes(graph) if node.body} for graph in (*graphs, exported)]
    assert len(keys) == 2
    assert keys[0] == keys[1] != set()
