"""CUDA graphs without a GPU: a driver that captures what it is given, and runs it at each replay.

Kernels are Python functions of the addresses and scalars that they get. Copies are nodes of their own; every other call
of ATen stands for a library kernel: it reads and writes, at each replay, the memory that it had at the capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.doubles.fake_driver import STREAM, FakeDriver, Function, Status
from torch_rtx import aten
from torch_rtx.binaries import named
from torch_rtx.ir import Dim, Graph, Sym
from torch_rtx.irparse import parse
from torch_rtx.runtime import captured, code, graph_params, graphmemory
from torch_rtx.runtime.launch import load_tactics
from torch_rtx.tactics import OWN, KernelTable, Launch, Tactic, Variant
from torch_rtx.targets import Target

Kernel = Callable[[Sequence[int], Sequence[int]], None]
DEVICE = torch.device("cuda", 0)
S = Sym("s")
# A kernel that adds: bytes of its parameters (two inputs, a result, how many elements, two of scratch memory), body of
# its node, and what it does.
SIZES = (8, 8, 8, 4, 8, 8)
BODY = """graph import {
    dim s = 1, 64, 1
    input in0: f32[s]
    input in1: f32[s]
    r: f32[s] = op aten.add.Tensor(self=in0, other=in1)
    return [r]
  }"""


def add(pointers: Sequence[int], scalars: Sequence[int]) -> None:
    """The kernel."""
    a, b, result = (
        torch.frombuffer((ctypes.c_float * scalars[0]).from_address(p), dtype=torch.float32) for p in pointers
    )
    torch.add(a, b, out=result)


def program(text: str) -> Graph:
    """A graph of level "fused" in which KERNEL stands for the body of an adding kernel."""
    body = text.strip("\n").replace("KERNEL", BODY)
    return parse(f"graph fused {{\n  dim s = 1, 64, 1\n{body}\n}}\n")


def adders(graph: Graph, driver: Any, ptx: bytes | None = None, size: Dim = S, uses_pdl: bool = False) -> Any:
    """What launches the kernels `k` of `graph`, which add, through `driver`: a binary, or `ptx` for sm_90."""
    digest, binary = named(ptx or b"an image")
    launch = Launch((size,), (1, 1, 1), False, Variant(digest, "entry", 4, 0, 32, 0, uses_pdl), None)
    tactics = {Target(90, ptx is not None): (Tactic("kernel", 1.0, {OWN: launch}),)}
    return load_tactics(KernelTable({"k": tactics}, {digest: binary}), graph, DEVICE, driver=driver)


@dataclass(eq=False)
class Params:
    """The parameters of a node; those of a kernel are the bytes of each, and the addresses of these."""

    func: Function | None = None
    srcDevice: int = 0
    dstDevice: int = 0
    nbytes: int = 0
    values: list[Any] = field(default_factory=list)
    kernelParams: int = 0


@dataclass(eq=False)
class Node:
    """One step of a graph: a kernel, a copy, or something else, which `call` does."""

    kind: str
    params: Params
    call: Callable[[], Any] | None = None

    def __int__(self) -> int:
        return id(self)


@dataclass
class EdgeData:
    """Of an edge between two nodes; `type` 1: programmatic."""

    from_port: int = 0
    to_port: int = 0
    type: int = 0


class FakeGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    last: FakeGraph
    edges: list[tuple[Node, Node, EdgeData]]

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Node] = []
        self.replays = 0  # by PyTorch
        self.generators: list[object] = []
        self.memory: list[torch.Tensor] = []
        FakeGraph.last = self

    def end(self) -> None:
        """The end of a capture: each node follows the one before it."""
        self.edges = [(one, other, EdgeData()) for one, other in pairwise(self.nodes)]

    def instantiate(self) -> None:
        self.executable = FakeExecutable(self)

    def register_generator_state(self, generator: object) -> None:
        self.generators.append(generator)

    def raw_cuda_graph(self) -> FakeGraph:
        return self

    def raw_cuda_graph_exec(self) -> FakeExecutable:
        return self.executable

    def replay(self) -> None:
        self.replays += 1

    def kinds(self) -> list[str]:
        return [node.kind for node in self.nodes]


class FakeExecutable:
    """A graph with parameters of its own."""

    def __init__(self, graph: FakeGraph) -> None:
        self.graph, self.alive = graph, True
        self.current = {node: copy(node.params) for node in graph.nodes}


class _Recorder(TorchDispatchMode):
    """Makes nodes of calls that compute, and hands on those that only make tensors."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source, *_ = map(_at, args)
            dense = torch.ops.aten.is_non_overlapping_and_dense(target)
            if target.stride() != source.stride() or not dense:  # a kernel
                self.graph.nodes.append(Node("call", Params(), lambda: target.copy_(source)))
                return args[0]
            params = Params(srcDevice=source.data_ptr(), dstDevice=target.data_ptr(), nbytes=target.nbytes)
            self.graph.nodes.append(Node("copy", params))
            return args[0]
        named = kwargs or {}
        # A capture writes nothing to memory of others; results of its own are only there for their types.
        result = named["out"] if "out" in named else func(*args, **named)
        if aten.is_view(func) or "set_" in str(func):
            return result
        held, called = tree_map_only(torch.Tensor, _at, (args, named))
        if "out" not in named:
            self.graph.memory += tree_leaves(result)
            result = tree_map_only(torch.Tensor, _at, result)  # the program's references alone keep it
        places = [_at(one) for one in tree_leaves(result)]

        def call() -> None:
            for place, one in zip(places, tree_leaves(func(*held, **called)), strict=True):
                place.copy_(one)

        if "empty" not in str(func):
            self.graph.nodes.append(Node("call", Params(), call))
        elif not result.is_floating_point():
            result.zero_()  # calls run once in the capture: these may be positions
        return result


def _at(given: Any) -> Any:
    """A tensor at the same address, which holds no memory, like the parameters of a node."""
    if not isinstance(given, torch.Tensor):
        return given
    memory = given.untyped_storage()
    raw = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), memory.device, memory.nbytes())  # type: ignore[attr-defined]
    return torch.empty(0, dtype=given.dtype).set_(raw, given.storage_offset(), given.shape, given.stride())


@dataclass
class FakeStream:
    """A stream, and what it waited for."""

    raw: int
    waits: list[tuple[int, int]]

    @property
    def cuda_stream(self) -> int:
        return self.raw

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append((self.raw, other.raw))


class GraphDriver(FakeDriver):
    """A driver that captures.

    Args:
        kernels: what the kernels do, by entry.

    Attributes:
        set: how many nodes were given parameters.
        refuse: answers that setting them fails.
        executables: those that were instantiated beside PyTorch's own.
        full: answers that there is no memory for another.
        version: of CUDA.
        programmatic: takes programmatic edges.
        fixed: removes no edges.
        stream: the current one.
        streams: those of the replays.
        waits: which stream was made to wait for which.
    """

    def __init__(self, sizes: tuple[int, ...], kernels: dict[str, Kernel]) -> None:
        super().__init__(sizes)
        self.kernels, self.capturing = kernels, False
        self.set, self.refuse = 0, False
        self.executables: list[FakeExecutable] = []
        self.full = False
        self.version, self.programmatic, self.fixed = 13_000, True, False
        self.CUgraphEdgeData = EdgeData
        self.CUgraphDependencyType = SimpleNamespace(CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC=1)
        self.CUgraphInstantiate_flags = SimpleNamespace(
            CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH=1, CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY=8
        )
        self.stream = STREAM
        self.waits: list[tuple[int, int]] = []
        self.streams: list[int] = []
        self.CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_KERNEL=0, CU_GRAPH_NODE_TYPE_MEMCPY=1)
        self.CUgraph = self.CUgraphExec = lambda raw: raw

    def cuLaunchKernel(self, function: Function, *given: Any) -> tuple[Status]:
        status = super().cuLaunchKernel(function, *given)
        pointers = given[-2]
        if self.capturing:
            FakeGraph.last.nodes.append(Node("kernel", self._params(function, pointers)))
        else:
            self._run(self._params(function, pointers))
        return status

    def _params(self, function: Function, pointers: int) -> Params:
        """Parameters of which the driver has copies."""
        places = (ctypes.c_void_p * len(self.sizes)).from_address(pointers)
        read = zip(places, self.sizes, strict=True)
        values = [ctypes.create_string_buffer(ctypes.string_at(place, size), size) for place, size in read]  # type: ignore[arg-type]
        array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        return Params(function, values=[*values, array], kernelParams=ctypes.addressof(array))

    def _run(self, params: Params) -> None:
        assert params.func is not None
        numbers = [int.from_bytes(value.raw, "little") for value in params.values[:-1]]
        pointers = [n for n, size in zip(numbers, self.sizes, strict=True) if size == 8][:-2]
        self.kernels[params.func.entry](pointers, [n for n, s in zip(numbers, self.sizes, strict=True) if s == 4])

    def cuGraphGetNodes(self, graph: FakeGraph, count: int = 0) -> tuple[Status, Any, int]:
        return Status.CUDA_SUCCESS, graph.nodes if count else None, len(graph.nodes)

    def cuDriverGetVersion(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self.version

    def cuGraphGetEdges(self, graph: FakeGraph, count: int = 0) -> tuple[Any, ...]:
        """The data is not that of the edges: many versions of cuda-bindings give what they have freed."""
        ones, others, _ = zip(*graph.edges[:count], strict=True) if count else ((), (), ())
        freed = [EdgeData(0xAB, 0xCD, 0xEF) for _ in ones]
        return Status.CUDA_SUCCESS, list(ones), list(others), freed, len(graph.edges)

    def cuGraphRemoveDependencies(
        self, graph: FakeGraph, ones: Sequence[Node], others: Sequence[Node], datas: Sequence[EdgeData], count: int
    ) -> tuple[Status]:
        edges = list(zip(ones, others, datas, strict=True))
        if self.fixed or any(edge not in graph.edges for edge in edges):
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        for edge in edges:
            graph.edges.remove(edge)
        return (Status.CUDA_SUCCESS,)

    def cuGraphAddDependencies(
        self, graph: FakeGraph, ones: Sequence[Node], others: Sequence[Node], datas: Sequence[EdgeData], count: int
    ) -> tuple[Status]:
        if any(data.type for data in datas) and not self.programmatic:
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        graph.edges += zip(ones, others, datas, strict=True)
        return (Status.CUDA_SUCCESS,)

    def cuGraphNodeGetType(self, node: Node) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, {"kernel": 0, "copy": 1, "call": 3}[node.kind]

    def cuGraphKernelNodeGetParams(self, node: Node) -> tuple[Status, Params]:
        return Status.CUDA_SUCCESS, copy(node.params)

    cuGraphMemcpyNodeGetParams = cuGraphKernelNodeGetParams

    def cuGraphExecKernelNodeSetParams(self, executable: FakeExecutable, node: Node, params: Params) -> tuple[Status]:
        self.set += 1
        if self.refuse:
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        assert params.func is not None
        executable.current[node] = self._params(params.func, params.kernelParams)
        return (Status.CUDA_SUCCESS,)

    def cuGraphExecMemcpyNodeSetParams(
        self, executable: FakeExecutable, node: Node, params: Params, ctx: Any
    ) -> tuple[Status]:
        self.set += 1
        executable.current[node] = copy(params)
        return (Status.CUDA_SUCCESS,)

    def cuGraphMemcpyNodeSetParams(self, node: Node, params: Params) -> tuple[Status]:
        node.params = copy(params)
        return (Status.CUDA_SUCCESS,)

    def cuGraphInstantiate(self, graph: FakeGraph, flags: int) -> tuple[Status, Any]:
        assert flags == 9  # PyTorch's
        if self.full:
            return Status.CUDA_ERROR_INVALID_VALUE, None
        self.executables.append(FakeExecutable(graph))
        return Status.CUDA_SUCCESS, self.executables[-1]

    def cuGraphExecDestroy(self, executable: FakeExecutable) -> tuple[Status]:
        executable.alive = False
        return (Status.CUDA_SUCCESS,)

    def cuGraphLaunch(self, executable: FakeExecutable, stream: int) -> tuple[Status]:
        assert executable.alive
        self.streams.append(stream)
        for node, params in executable.current.items():
            if node.kind == "copy":
                ctypes.memmove(params.dstDevice, params.srcDevice, params.nbytes)
            elif node.call is not None:
                node.call()
            else:
                self._run(params)
        return (Status.CUDA_SUCCESS,)


def install(monkeypatch: pytest.MonkeyPatch, driver: GraphDriver) -> None:
    """Let captures and replays go to `driver`."""

    @contextmanager
    def capture(
        graph: FakeGraph, pool: object = None, stream: FakeStream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        before, driver.capturing = driver.stream, True
        driver.stream = before if stream is None else stream.raw
        try:
            with _Recorder(graph):
                yield
        finally:
            driver.stream, driver.capturing = before, False
        graph.end()

    empty = code.EMPTY["cpu"]

    def allocate(*given: Any) -> torch.Tensor:
        made = empty(*given)
        if not driver.capturing:
            return made
        FakeGraph.last.memory.append(made)
        return _at(made)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: driver.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(driver.stream, driver.waits))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(code.EMPTY, kind, allocate)
    monkeypatch.setattr(graphmemory, "new_stream", lambda device: FakeStream(99, driver.waits))
    monkeypatch.setattr(graph_params, "driver", lambda: driver)
    monkeypatch.setattr(captured, "driver", lambda: driver)
