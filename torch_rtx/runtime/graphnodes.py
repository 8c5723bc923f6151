"""The nodes of a captured graph that hold addresses of its inputs and outputs: these are set before each replay.

They are copies, and kernels of an engine, whose parameters begin with the addresses of their tensors. What is set in
the instantiated graph counts for later launches; one that is running or queued keeps what it was launched with.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.ir import Graph, TensorType
from torch_rtx.runtime.driver import checked, driver
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import Launcher, LoadedTactic


@dataclass(frozen=True, eq=False)
class Node:
    """A node of a graph that holds addresses.

    Attributes:
        set_params: the driver's call that sets its parameters in an executable.
        arguments: of this call, after the executable.
    """

    set_params: Callable[..., tuple[Any]]
    arguments: tuple[Any, ...]


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
    """An address in the parameters of `node`: where it stands, and how many bytes it lies above the beginning of the
    tensor."""

    holder: Any
    attribute: str
    offset: int
    node: Node


Port = Sequence[Place]  # an input or output of a graph: all that hold an address in it


class GraphNodes:
    """Finds the ports of a captured graph, and lives as long as they are used.

    Args:
        tactics: what launches its kernels.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, tactics: Mapping[str, LoadedTactic]) -> None:
        cuda = driver()
        raw = cuda.CUgraph(graph.raw_cuda_graph())
        context, kinds = checked(cuda.cuCtxGetCurrent()), cuda.CUgraphNodeType
        known = {function: launcher for launcher in launched(tactics).values() for function in launcher.functions}
        self._copies: dict[tuple[int, int], tuple[Node, Any]] = {}
        self._arguments: list[tuple[int, Node, ctypes.c_uint64]] = []
        self._kept: list[object] = []  # the parameters of kernels
        for node in _nodes(cuda, raw):
            kind = checked(cuda.cuGraphNodeGetType(node))
            if kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
                params = checked(cuda.cuGraphMemcpyNodeGetParams(node))
                made = Node(cuda.cuGraphExecMemcpyNodeSetParams, (node, params, context))
                self._copies[int(params.srcDevice), int(params.dstDevice)] = made, params
            elif kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
                params = checked(cuda.cuGraphKernelNodeGetParams(node))
                if int(params.func) in known:
                    made = Node(cuda.cuGraphExecKernelNodeSetParams, (node, params))
                    self._arguments += [
                        (cell.value, made, cell) for cell in self._cells(params, known[int(params.func)])
                    ]

    def _cells(self, params: Any, launcher: Launcher) -> list[ctypes.c_uint64]:
        """The addresses that a kernel gets, which are in memory of our own from now on."""
        theirs = (ctypes.c_void_p * launcher.parameters).from_address(int(params.kernelParams))
        values = (ctypes.c_uint64.from_address(place or 0).value for place in theirs[: launcher.pointers])
        cells = [ctypes.c_uint64(value) for value in values]
        ours = type(theirs)(*map(ctypes.addressof, cells), *theirs[launcher.pointers :])
        params.kernelParams = ctypes.addressof(ours)
        self._kept.append((ours, cells))
        return cells

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


Addresses = tuple[int, ...]  # of the ports of a graph, in order


class Executables:
    """The executables of one graph: at most `most`, since addresses come again. Programs fill buffers in turn, and the
    allocator gives back what was freed; where an executable has the addresses of a replay, nothing is set.

    Args:
        graph: it has the first of them.

    Attributes:
        ready: the driver's handles of those that have addresses, by these; the one that was set longest ago first.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, ports: Sequence[Port], most: int) -> None:
        self._driver = driver()
        self._graph = self._driver.CUgraph(graph.raw_cuda_graph())
        self._ports, self._most = ports, most
        self._unset = [self._driver.CUgraphExec(graph.raw_cuda_graph_exec())]
        self.ready: dict[Addresses, Any] = {}
        self._made: list[Any] = []  # beside PyTorch's own
        weakref.finalize(self, _destroy, self._driver, self._made).atexit = False

    def at(self, addresses: Addresses) -> Any:
        """The handle of an executable for a replay with its ports at `addresses`.

        Raises:
            RuntimeError: the driver refuses an address.
        """
        found = self.ready.get(addresses)
        return self._moved(addresses) if found is None else found

    def _moved(self, addresses: Addresses) -> Any:
        """One that was set to other addresses, or a new one."""
        before = (-1,) * len(addresses)
        if not self._unset and not self._new():
            before = next(iter(self.ready))
            self._unset.append(self.ready.pop(before))
        handle = self._unset[-1]  # and stays there should this fail: the next replay then sets all of its addresses
        nodes: dict[Node, None] = {}
        for port, address, old in zip(self._ports, addresses, before, strict=True):
            for holder, attribute, offset, node in port:
                setattr(holder, attribute, address + offset)
                if address != old:
                    nodes[node] = None
        for node in nodes:
            (status,) = node.set_params(handle, *node.arguments)
            if status != 0:
                raise RuntimeError(f"CUDA driver: {status.name} when setting the addresses of a node")
        self.ready[addresses] = self._unset.pop()
        return handle

    def _new(self) -> bool:
        """Makes one more; False where there are as many as there may be, or the device has no memory for it."""
        if len(self.ready) >= self._most:
            return False
        flags = self._driver.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
        status, handle = self._driver.cuGraphInstantiate(self._graph, int(flags))
        if status != 0:
            self._most = len(self.ready)
            return False
        self._made.append(handle)
        self._unset.append(handle)
        return True


def _destroy(cuda: Any, handles: Sequence[Any]) -> None:
    for handle in handles:
        cuda.cuGraphExecDestroy(handle)


def _nodes(cuda: Any, graph: Any) -> Sequence[Any]:
    status, _, count = cuda.cuGraphGetNodes(graph)
    checked((status,))
    return cuda.cuGraphGetNodes(graph, count)[1] if count else []
