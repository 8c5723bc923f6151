"""Programmatic dependent launch (PDL), host side: makes edges between kernels of a captured graph programmatic.

Stream capture makes every edge a full dependency: a node starts when its predecessor has ended. Where a kernel that is
known to execute `griddepcontrol.wait` follows another kernel, ours or a library's, its edge becomes a programmatic one
(CUDA programming guide, "Programmatic Dependent Launch and Synchronization"). No data race follows: the kernel waits
for its predecessor to end before it accesses memory, and the predecessor has waited for those before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch_rtx.runtime.driver import checked, newest
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import LoadedTactic

_OLDEST = 12_030  # first version of CUDA with edge data
_PROGRAMMATIC_PORT = 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC: all blocks have triggered or ended


def use_programmatic_edges(cuda: Any, graph: Any, tactics: Mapping[str, LoadedTactic]) -> int:
    """Make edges of a captured graph programmatic, before it is instantiated; returns how many.

    Args:
        cuda: the driver API.
        tactics: what launches the kernels that the graph may contain.

    Raises:
        RuntimeError: the driver can't list the graph, or an edge that was removed can't be added back.
    """
    users = {function for launcher in launched(tactics).values() for function in launcher.pdl_functions}
    if not users or not hasattr(cuda, "CUgraphEdgeData") or checked(cuda.cuDriverGetVersion()) < _OLDEST:
        return 0
    kinds, edges = cuda.CUgraphNodeType, _edges(cuda, graph)

    def function(node: Any) -> int | None:
        """The function handle of a kernel node; None for other nodes."""
        if checked(cuda.cuGraphNodeGetType(node)) != kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            return None
        return int(checked(cuda.cuGraphKernelNodeGetParams(node)).func)

    before, after = (Counter(int(edge[side]) for edge in edges) for side in (1, 0))
    return sum(
        _make_programmatic(cuda, graph, one, other)
        for one, other in edges
        if before[int(other)] == after[int(one)] == 1  # not where streams fork or join
        and function(other) in users
        and function(one) is not None
    )


def _make_programmatic(cuda: Any, graph: Any, one: Any, other: Any) -> bool:
    """Make the edge between two kernels programmatic. False if it stays as it is: it has edge data already, or the
    graph allocates memory, and the driver removes no edges of such graphs."""
    remove, add = newest(cuda, "cuGraphRemoveDependencies"), newest(cuda, "cuGraphAddDependencies")
    plain, programmatic = cuda.CUgraphEdgeData(), cuda.CUgraphEdgeData()
    programmatic.from_port = _PROGRAMMATIC_PORT
    programmatic.type = cuda.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    (status,) = remove(graph, [one], [other], [plain], 1)
    if status != 0:
        return False
    (status,) = add(graph, [one], [other], [programmatic], 1)
    if status != 0:
        checked(add(graph, [one], [other], [plain], 1))
    return bool(status == 0)


def _edges(cuda: Any, graph: Any) -> list[tuple[Any, Any]]:
    """The edges of a graph as pairs (from, to). Edge data is not read: many versions of cuda-bindings return it in
    memory that they have freed (NVIDIA/cuda-python, issue 1804)."""
    get = newest(cuda, "cuGraphGetEdges")
    status, *_, count = get(graph)
    checked((status,))
    if not count:
        return []
    status, ones, others, _, count = get(graph, count)
    checked((status,))
    return list(zip(ones[:count], others[:count], strict=True))
