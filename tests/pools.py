"""Helpers of the GPU tests."""

from __future__ import annotations

import gc

from torch_rtx.runtime.cudagraph import GraphPool


def graph_pools() -> set[GraphPool]:
    """Every pool of CUDA graphs that is alive in this process and was called."""
    gc.collect()
    return {found for found in gc.get_objects() if type(found) is GraphPool and (found.captured or found.disabled)}
