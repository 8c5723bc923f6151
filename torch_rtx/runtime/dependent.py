"""Programmatic dependent launch in captured graphs: kernels that wait by themselves start while those before them end.

A capture makes every edge one that waits for the end of the node before it. Where a kernel that is known to wait
follows another kernel, of the engine or of a library, its edge becomes a programmatic one (CUDA programming guide,
"Programmatic Dependent Launch and Synchronization"): what it reads and overwrites is safe, since it waits until all
that came before has ended, and that waited as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from torch_rtx.runtime.driver import checked
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import LoadedTactic

_OLDEST = 12_030  # version of CUDA whose driver and bindings know the data of edges
_PROGRAMMATIC_PORT = 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC: all blocks have let the next kernel start, or ended


def launch_early(cuda: Any, graph: torch.cuda.CUDAGraph, tactics: Mapping[str, LoadedTactic]) -> int:
    """Change the edges of a captured graph, before it is instantiated; returns how many.

    Args:
        cuda: the driver API.
        tactics: what launches its kernels.

    Raises:
        RuntimeError: the driver can't say what the graph is, or an edge is lost.
    """
    waiting = {function for launcher in launched(tactics).values() for function in launcher.waiting}
    if not waiting or not hasattr(cuda, "CUgraphEdgeData") or checked(cuda.cuDriverGetVersion()) < _OLDEST:
        return 0
    raw, kinds = cuda.CUgraph(graph.raw_cuda_graph()), cuda.CUgraphNodeType
    edges = _edges(cuda, raw)

    def function(node: Any) -> int | None:
        """The kernel of a node, if it is one."""
        if checked(cuda.cuGraphNodeGetType(node)) != kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            return None
        return int(checked(cuda.cuGraphKernelNodeGetParams(node)).func)

    before, after = (Counter(int(edge[side]) for edge in edges) for side in (1, 0))
    return sum(
        _make_programmatic(cuda, raw, one, other)
        for one, other in edges
        if before[int(other)] == after[int(one)] == 1  # where streams part or meet, all is left as it is
        and function(other) in waiting
        and function(one) is not None
    )


def _make_programmatic(cuda: Any, graph: Any, one: Any, other: Any) -> bool:
    """Change the edge between two kernels; False where it stays as it is: it is no plain one, or the graph allocates
    memory, and the driver removes no edges of such."""
    remove, add = _newest(cuda, "cuGraphRemoveDependencies"), _newest(cuda, "cuGraphAddDependencies")
    plain, early = cuda.CUgraphEdgeData(), cuda.CUgraphEdgeData()
    early.from_port = _PROGRAMMATIC_PORT
    early.type = cuda.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    (status,) = remove(graph, [one], [other], [plain], 1)
    if status != 0:
        return False
    (status,) = add(graph, [one], [other], [early], 1)
    if status != 0:
        checked(add(graph, [one], [other], [plain], 1))
    return bool(status == 0)


def _edges(cuda: Any, graph: Any) -> list[tuple[Any, Any]]:
    """From which node to which. The data of edges is not to be read: many versions of cuda-bindings give it in memory
    that they have freed (NVIDIA/cuda-python, issue 1804)."""
    get = _newest(cuda, "cuGraphGetEdges")
    status, *_, count = get(graph)
    checked((status,))
    if not count:
        return []
    status, ones, others, _, count = get(graph, count)
    checked((status,))
    return list(zip(ones[:count], others[:count], strict=True))


def _newest(cuda: Any, name: str) -> Any:
    """A function of the driver in the form that knows the data of edges, which cuda-bindings 12 have under another
    name."""
    return getattr(cuda, f"{name}_v2", None) or getattr(cuda, name)
