"""Helpers of the GPU tests."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch

from torch_rtx.runtime.cudagraph import GraphPool


def graph_pools() -> set[GraphPool]:
    """Every pool of CUDA graphs that is alive in this process and was called."""
    gc.collect()
    return {found for found in gc.get_objects() if type(found) is GraphPool and (found.captured or found.disabled)}


def node_kinds(graph: torch.cuda.CUDAGraph) -> Counter[str]:
    """How many nodes of each kind a captured graph has: KERNEL, MEMCPY, MEMSET, ..."""
    from cuda.bindings import driver

    def checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
        assert answer[0] == 0
        return answer[1:]

    raw = driver.CUgraph(graph.raw_cuda_graph())
    count = checked(driver.cuGraphGetNodes(raw))[-1]
    nodes = checked(driver.cuGraphGetNodes(raw, count))[0]
    kinds = (checked(driver.cuGraphNodeGetType(node))[0] for node in nodes)
    return Counter(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_") for kind in kinds)
