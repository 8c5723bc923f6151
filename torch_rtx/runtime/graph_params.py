"""Parameters of the nodes of a captured graph: finds and sets those that are addresses of its inputs and outputs.

Such nodes are copies, and kernels of an engine, whose launchers know which parameters point to tensors. A parameter set
in the instantiated graph counts for later launches; a launch that runs or is queued keeps its own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.ir import Graph, TensorType
from torch_rtx.runtime.driver import checked, driver
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import Launcher, LoadedTactic


@dataclass(frozen=True, eq=False)
class ParamNode:
    """A node whose parameters hold addresses.

    Attributes:
        set_params: the driver's call that sets the node's parameters in an executable.
        arguments: arguments of this call after the executable.
        set_in_graph: sets the parameters in the graph itself; None: nobody looks at them there.
    """

    set_params: Callable[..., tuple[Any]]
    arguments: tuple[Any, ...]
    set_in_graph: Callable[[], tuple[Any]] | None = None


class Use(NamedTuple):
    """How kernels touch a value, and views of it.

    Attributes:
        owner: the value that owns the memory.
        launches: the kernels with a pointer into this memory, as often as they have one, counted from 0 in the order
            of the graph.
    """

    owner: str
    launches: tuple[int, ...]


def kernel_uses(graph: Graph) -> dict[str, Use]:
    """The inputs and kernel results that kernels alone touch, and views of these.

    The parameters of library calls and fallbacks are unknown: the addresses in them can't be set.

    Args:
        graph: as it is run, see `inline_kernels`.

    """
    root = {value.name: value.name for value in graph.inputs if isinstance(value.type, TensorType)}
    uses: dict[str, list[int]] = {name: [] for name in root}
    launches = 0
    for node in graph.nodes:
        made = [value.name for value in node.outputs if value is not None]
        if node.kind == "kernel":
            places = continued(node)
            uses |= {name: [] for name in made if name not in places}
            owners = {name: places[name].name if name in places else name for name in made}
            root |= {name: root.get(owner, owner) for name, owner in owners.items()}
        touched = [root[name] for name in (*(value.name for value in node.inputs), *made) if name in root]
        if node.kind == "kernel":
            for name in touched:
                if name in uses:
                    uses[name].append(launches)
            launches += 1
        elif node.kind != "fallback" and aten.is_view(aten.overload(node.op)) and len(touched) == 1:
            root |= dict.fromkeys(made, touched[0])
        else:
            for name in touched:
                uses.pop(name, None)
    return {name: Use(owner, tuple(uses[owner])) for name, owner in root.items() if owner in uses}


class AddressSlot(NamedTuple):
    """One address in the parameters of `node`: `holder.attribute`, `offset` bytes above the start of the tensor."""

    holder: Any
    attribute: str
    offset: int
    node: ParamNode


Slots = Sequence[AddressSlot]  # all addresses in one input or output of a graph


class GraphNodes:
    """Finds the address slots of a captured graph, and owns the parameters that they point to.

    Args:
        graph: captured from `code`.
        code: the nodes that ran, see `inline_kernels`.
        tactics: the tactics whose kernels the graph may launch.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, code: Graph, tactics: Mapping[str, LoadedTactic]) -> None:
        cuda = driver()
        raw = cuda.CUgraph(graph.raw_cuda_graph())
        context, kinds = checked(cuda.cuCtxGetCurrent()), cuda.CUgraphNodeType
        launchers = launched(tactics)
        known = {function: launcher for launcher in launchers.values() for function in launcher.functions}
        self._copies: dict[tuple[int, int], tuple[ParamNode, Any]] = {}
        self._arguments: list[tuple[int, int, ParamNode, ctypes.c_uint64]] = []
        self._kept: list[object] = []  # the parameters of kernels
        self._order = order = list[Launcher]()
        for node in _nodes(cuda, raw):
            kind = checked(cuda.cuGraphNodeGetType(node))
            if kind == kinds.CU_GRAPH_NODE_TYPE_MEMCPY:
                params = checked(cuda.cuGraphMemcpyNodeGetParams(node))
                in_graph = partial(cuda.cuGraphMemcpyNodeSetParams, node, params)
                made = ParamNode(cuda.cuGraphExecMemcpyNodeSetParams, (node, params, context), in_graph)
                self._copies[int(params.srcDevice), int(params.dstDevice)] = made, params
            elif kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
                params = checked(cuda.cuGraphKernelNodeGetParams(node))
                if int(params.func) in known:
                    made = ParamNode(cuda.cuGraphExecKernelNodeSetParams, (node, params))
                    launcher, at = known[int(params.func)], len(order)
                    self._arguments += [(cell.value, at, made, cell) for cell in self._cells(params, launcher)]
                    order.append(launcher)
        # The driver lists nodes in the order of their capture, but does not promise it.
        self._in_order = order == [launchers[node.op] for node in code.nodes if node.kind == "kernel"]

    def _cells(self, params: Any, launcher: Launcher) -> list[ctypes.c_uint64]:
        """The pointers among the kernel's parameters, moved from the driver's memory to cells of our own."""
        theirs = (ctypes.c_void_p * launcher.num_parameters).from_address(int(params.kernelParams))
        values = (ctypes.c_uint64.from_address(theirs[at] or 0).value for at in launcher.pointers)
        cells = [ctypes.c_uint64(value) for value in values]
        ours = type(theirs)(*theirs)
        for at, cell in zip(launcher.pointers, cells, strict=True):
            ours[at] = ctypes.addressof(cell)
        params.kernelParams = ctypes.addressof(ours)
        self._kept.append((ours, cells))
        return cells

    def kernels(self, memory: torch.UntypedStorage, launches: Sequence[int]) -> Slots | None:
        """The arguments of the kernels `launches` that point into `memory`, see `Use`; None unless there are as many.

        Other kernels may have used this memory for values that were freed before.
        """
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        found = [
            (at, AddressSlot(cell, "value", address - start, node))
            for address, at, node, cell in self._arguments
            if start <= address < end and (at in launches or not self._in_order)
        ]
        if not self._in_order:
            complete = len(found) == len(launches)
        else:  # a kernel that others wrote may take what it reads and writes by one parameter, or by more
            seen, uses = Counter(at for at, _ in found), Counter(launches)
            complete = all(seen[at] == uses[at] or (self._order[at].has_slots and seen[at]) for at in uses)
        return [slot for _, slot in found] if complete else None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> tuple[Slots, Slots]:
        """The slots of the source and of the target of the node that copies `source` to `target`.

        Raises:
            RuntimeError: the copy was captured as another kind of node.
        """
        found = self._copies.get((source.data_ptr(), target.data_ptr()))
        if found is None:
            raise RuntimeError("a copy at the border of the graph was not captured as one")
        node, params = found
        return [AddressSlot(params, "srcDevice", 0, node)], [AddressSlot(params, "dstDevice", 0, node)]


Addresses = tuple[int, ...]  # of the inputs and outputs of a graph, in the order of their slots


class Executables:
    """A cache of the executables of one graph, at most `most`, by the addresses set in each.

    Addresses recur: programs fill buffers in turn, and the allocator hands out freed memory again. A replay whose
    addresses are cached sets no parameter.

    Args:
        graph: owns the first executable.
        slots: per input and output, its slots.

    Attributes:
        ready: the driver's handles by addresses, least recently set first.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, slots: Sequence[Slots], most: int) -> None:
        self._driver = driver()
        self._graph = self._driver.CUgraph(graph.raw_cuda_graph())
        self._slots, self._most = slots, most
        self._unset = [self._driver.CUgraphExec(graph.raw_cuda_graph_exec())]
        self.ready: dict[Addresses, Any] = {}
        self._made: list[Any] = []  # beside PyTorch's own
        weakref.finalize(self, _destroy, self._driver, self._made).atexit = False

    def at(self, addresses: Addresses) -> Any:
        """The executable whose inputs and outputs are at `addresses`.

        Raises:
            RuntimeError: the driver refuses an address.
        """
        found = self.ready.get(addresses)
        return self._moved(addresses) if found is None else found

    def _moved(self, addresses: Addresses) -> Any:
        """Sets `addresses` in a new executable, or in the least recently set one."""
        for slots, address in zip(self._slots, addresses, strict=True):
            for holder, attribute, offset, _ in slots:
                setattr(holder, attribute, address + offset)
        before = (-1,) * len(addresses)
        if not self._unset and not self._new():
            before = next(iter(self.ready))
            self._unset.append(self.ready.pop(before))
        handle = self._unset[-1]  # stays there if setting fails: the next replay then sets all addresses
        moved = (slots for slots, *pair in zip(self._slots, addresses, before, strict=True) if pair[0] != pair[1])
        for node in {slot.node: None for slots in moved for slot in slots}:
            (status,) = node.set_params(handle, *node.arguments)
            if status != 0:
                raise RuntimeError(f"CUDA driver: {status.name} when setting the addresses of a node")
        self.ready[addresses] = self._unset.pop()
        return handle

    def _new(self) -> bool:
        """Instantiate the graph once more; False at the limit, or if the device has no memory left.

        The driver looks at the memory of copies, and what the capture copied from and to may be unmapped by now, which
        ends in a segmentation fault. So the copies get the addresses of this replay first.
        """
        if len(self.ready) >= self._most:
            return False
        for node in {slot.node: None for slots in self._slots for slot in slots}:
            if node.set_in_graph is not None:
                checked(node.set_in_graph())
        flags = self._driver.CUgraphInstantiate_flags  # those that PyTorch instantiates with
        freeing = int(flags.CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        by_priority = int(flags.CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY)
        status, handle = self._driver.cuGraphInstantiate(self._graph, freeing | by_priority)
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
