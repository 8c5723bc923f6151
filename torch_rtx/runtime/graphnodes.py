"""The nodes of a captured graph that hold addresses of its inputs and outputs: these are set before each replay.

They are copies, and kernels of an engine, whose parameters begin with the addresses of their tensors. What is set in
the instantiated graph counts for later launches; one that is running or queued keeps what it was launched with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.ir import Graph, TensorType
from torch_rtx.runtime.driver import checked, driver
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import Launcher, Way

Node = Callable[[], tuple[Any]]  # gives a node the addresses that were set for it


def kernel_uses(graph: Graph) -> dict[str, tuple[str, int]]:
    """The inputs, and the results of kernels, that nothing but kernels touches, and the views of these: of each, by
    name, whose memory it lies in and how many arguments of kernels do.

    Nothing is known of the parameters of library calls and fallbacks: the addresses in them can't be set.

    Args:
        graph: as it is run, see `inline_kernels`.
    """
    root = {value.name: value.name for value in graph.inputs if isinstance(value.type, TensorType)}
    uses = dict.fromkeys(root, 0)
    for node in graph.nodes:
        made = [value.name for value in node.outputs if value is not None]
        if node.kind == "kernel":
            root |= zip(made, made, strict=True)
            uses |= dict.fromkeys(made, 0)
        touched = [root[name] for name in (*(value.name for value in node.inputs), *made) if name in root]
        if node.kind == "kernel":
            for name in touched:
                if name in uses:
                    uses[name] += 1
        elif node.kind != "fallback" and aten.is_view(aten.overload(node.op)) and len(touched) == 1:
            root |= dict.fromkeys(made, touched[0])
        else:
            for name in touched:
                uses.pop(name, None)
    return {name: (owner, uses[owner]) for name, owner in root.items() if owner in uses}


class Place(NamedTuple):
    """An address that a node of a graph holds.

    Attributes:
        holder, attribute: where it is kept until `node` is called.
        offset: bytes from the beginning of the tensor.
        node: sets what the node holds; the driver's answer is that of a call without a result.
    """

    holder: Any
    attribute: str
    offset: int
    node: Node


Port = Sequence[Place]  # an input or output of a graph: all that hold an address in it


class GraphNodes:
    """Finds the ports of a captured and instantiated graph, and lives as long as they are used.

    Args:
        kernels: what it may launch.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, kernels: Mapping[str, Way]) -> None:
        self._driver = cuda = driver()
        raw = cuda.CUgraph(graph.raw_cuda_graph())
        self._executable = cuda.CUgraphExec(graph.raw_cuda_graph_exec())
        context, kinds = checked(cuda.cuCtxGetCurrent()), cuda.CUgraphNodeType
        known = {function: launcher for launcher in launched(kernels).values() for function in launcher.functions}
        self._copies: dict[tuple[int, int], tuple[Node, Any]] = {}
        self._arguments: list[tuple[int, Node, ctypes.c_uint64]] = []
        self._kept: list[object] = []  # the parameters of kernels
        for node in _nodes(cuda, raw):
            kind = checked(cuda.cuGraphNodeGetType(node))
            if kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
                params = checked(cuda.cuGraphMemcpyNodeGetParams(node))
                made = partial(cuda.cuGraphExecMemcpyNodeSetParams, self._executable, node, params, context)
                self._copies[int(params.srcDevice), int(params.dstDevice)] = made, params
            elif kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
                params = checked(cuda.cuGraphKernelNodeGetParams(node))
                if int(params.func) in known:
                    self._arguments += self._addresses(node, params, known[int(params.func)])

    def _addresses(self, node: Any, params: Any, launcher: Launcher) -> Iterable[tuple[int, Node, ctypes.c_uint64]]:
        """The addresses that a kernel gets, in memory of our own from now on."""
        theirs = (ctypes.c_void_p * launcher.parameters).from_address(int(params.kernelParams))
        values = (ctypes.c_uint64.from_address(place or 0).value for place in theirs[: launcher.pointers])
        cells = [ctypes.c_uint64(value) for value in values]
        ours = type(theirs)(*map(ctypes.addressof, cells), *theirs[launcher.pointers :])
        params.kernelParams = ctypes.addressof(ours)
        self._kept.append((ours, cells))
        made = partial(self._driver.cuGraphExecKernelNodeSetParams, self._executable, node, params)
        return [(cell.value, made, cell) for cell in cells]

    def launch(self, stream: int) -> None:
        """Launch the graph on a stream of the current device.

        Raises:
            RuntimeError: the driver refuses that.
        """
        (status,) = self._driver.cuGraphLaunch(self._executable, stream)
        if status != 0:
            raise RuntimeError(f"CUDA driver: {status.name} when launching a graph")

    def kernels(self, memory: torch.UntypedStorage, uses: int) -> Port | None:
        """The port of a tensor that begins where `memory` does.

        Args:
            uses: how many arguments of kernels have to be addresses in `memory`; None if it is another number.
        """
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        found = [
            Place(cell, "value", address - start, node)
            for address, node, cell in self._arguments
            if start <= address < end
        ]
        return found if len(found) == uses else None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> tuple[Port, Port]:
        """The ports of a copy of `source` to `target`: from where, and to where.

        Raises:
            RuntimeError: it was captured as something else than a copy.
        """
        found = self._copies.get((source.data_ptr(), target.data_ptr()))
        if found is None:
            raise RuntimeError("a copy at the border of the graph was not captured as one")
        node, params = found
        return [Place(params, "srcDevice", 0, node)], [Place(params, "dstDevice", 0, node)]


def _nodes(cuda: Any, graph: Any) -> Sequence[Any]:
    status, _, count = cuda.cuGraphGetNodes(graph)
    checked((status,))
    return cuda.cuGraphGetNodes(graph, count)[1] if count else []
