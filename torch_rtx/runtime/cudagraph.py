"""Unified CUDA graphs: a whole module, engine and fallback operators together, replayed as one graph per input shape.

The first call with a combination of shapes runs the plain code, a later one captures it, the rest replay. Inputs are
copied into static memory and results out of it by the graph's own first and last nodes, whose addresses are set before
each replay: a caller may keep both, and no copy costs a launch. Inputs that the module writes to (caches) are captured
at their address instead, which is part of the key.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from torch_rtx.ir import MAIN, Graph, ScalarType, TensorType, Value, dim_syms, type_dims
from torch_rtx.runtime.code import EMPTY, Code, copy_strided, restride
from torch_rtx.runtime.driver import checked, driver, new_stream
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
# CUDA captures per process, not per session: the synchronization at the start of a capture would break another one.
_CAPTURING = threading.Lock()
SEEN_PER_GRAPH = 8  # keys that are remembered as met once, per graph of the pool
Output = Callable[[Sequence[Any]], Any]
RunCode = Callable[[Code, Sequence[Any], Sequence[torch.Tensor]], list[Any]]


def why_not(graph: Graph) -> str | None:
    """Why the program can't be one CUDA graph; None if it can be tried."""
    known = {sym.name for value in graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    for value in graph.inputs:
        if isinstance(value.type, TensorType) and value.type.device != MAIN:
            return f"input {value.name} is on {value.type.device}"
    for weight in graph.weights:
        type_ = weight.value.type
        if isinstance(type_, TensorType) and type_.device != MAIN and type_.shape:
            return f"weight {', '.join(weight.names) or weight.value.name} is on {type_.device}"
    for node in graph.nodes:
        for type_ in (value.type for value in node.outputs if value is not None):
            if isinstance(type_, ScalarType):
                return f"the host needs the result of {node.op} ({node.loc})"
            if type_.device != MAIN:
                return f"{node.op} runs on {type_.device} ({node.loc})"
            if any(sym.name not in known for dim in type_dims(type_) for sym in dim_syms(dim)):
                return f"the size of the result of {node.op} depends on the data ({node.loc})"
    if driver() is None:
        return "the package cuda-bindings is not installed"
    return None


class GraphPool:
    """The CUDA graphs of one session: at most `size`, the least recently used goes first. Many threads may call it.

    The graphs share their memory, so that their replays follow each other: on one stream as it is, and where the stream
    changes the new one waits for the old.

    Args:
        run: runs code of `graph` with inputs and weights.
        static_outputs: results stay in the memory of their graph.
    """

    def __init__(
        self, graph: Graph, run: RunCode, device: torch.device, size: int, static_outputs: bool = False
    ) -> None:
        self.graph, self.run, self.device, self.size = graph, run, device, size
        self.static_outputs = static_outputs
        self.captured: dict[object, Captured] = {}
        self._met: dict[object, None] = {}  # keys that ran the plain code once, oldest first
        self.captures = self.replays = 0
        self.disabled: str | None = None
        self._written = [i for i, value in enumerate(graph.inputs) if value.name in graph.written]
        self._handle = torch.cuda.graph_pool_handle()
        self._lock = threading.RLock()
        self._warm = threading.local()
        self._generation = -1
        self._stream: torch.cuda.Stream | None = None
        self._raw_stream = -1

    def __call__(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> list[Any]:
        """The outputs for `inputs`.

        Args:
            key: says all that captured code depends on but addresses.
            code: what to run; a graph of other code with the same key is dropped.
        """
        if self.disabled is not None or torch.cuda.is_current_stream_capturing():
            return self.run(code, inputs, store.values)  # in a caller's own capture its graph holds ours, call by call
        if self._written:
            key = (key, tuple([(inputs[i].data_ptr(), inputs[i].stride()) for i in self._written]))
        with self._lock:
            found = self._find(key, code, inputs, store)
            if found is not None:
                self._follow_stream()
                self.replays += 1
                return found.replay(inputs)
        outputs = self.run(code, inputs, store.values)
        # Library handles are per thread, and a capture can't make them: a thread captures only after a plain call.
        self._warm.done = True
        return outputs

    def _find(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """The graph for `key`, captured now if it was met before; None where this call has to run the plain code."""
        if self._generation != store.generation:
            self.captured.clear()
            self._handle = torch.cuda.graph_pool_handle()  # a pool ends with the last of its graphs
            self._generation = store.generation
        found = self.captured.get(key)
        if found is not None and found.code is not code:
            del self.captured[key]
            found = None
        if found is None:
            if key in self._met and getattr(self._warm, "done", False):
                found = self._capture(code, inputs, store)
            if found is None:
                self._met[key] = None
                if len(self._met) > SEEN_PER_GRAPH * self.size:
                    del self._met[next(iter(self._met))]
                return None
            del self._met[key]
            self.captured[key] = found
        found.used = self.replays
        if len(self.captured) > self.size:
            del self.captured[min(self.captured, key=lambda key: self.captured[key].used)]
        return found

    def _follow_stream(self) -> None:
        """Order this replay after the last one, whatever stream that was on."""
        raw = torch._C._cuda_getCurrentRawStream(self.device.index)
        if raw == self._raw_stream:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._raw_stream = stream, raw

    def _capture(self, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """Capture the module for these inputs; None, and never tried again, where CUDA refuses."""
        try:
            with _CAPTURING, torch.cuda.device(self.device), _no_collection():
                found = Captured(self, code, inputs, self._written, store, self._handle)
        except RuntimeError as error:
            self.disabled = str(error).splitlines()[0]
            log.warning("no CUDA graphs for this module, it can't be captured: %s", self.disabled)
            _end_failed_capture(self.device, self._handle)
            return None
        self.captures += 1
        log.debug("captured a CUDA graph for %s", [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return found


class Captured:
    """One captured graph.

    Args:
        pool: the one that it is made for.
        code: what is captured.
        written: positions of the inputs that are captured at their address.
        handle: the memory pool.
    """

    def __init__(
        self,
        pool: GraphPool,
        code: Code,
        inputs: Sequence[Any],
        written: list[int],
        store: WeightStore,
        handle: Any,
    ) -> None:
        self.code, graph = code, pool.graph
        names = {value.name: index for index, value in enumerate(graph.inputs)}
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and i not in written]
        static = list(inputs)
        for index in tensors:
            static[index] = torch.empty_like(inputs[index])
        given = {i: restride(inputs[i], static[i].stride()) for i in tensors if inputs[i].numel()}
        pinned = {t.untyped_storage().data_ptr() for t in (*store.values, *(inputs[i] for i in written))}
        own = {static[i].untyped_storage().data_ptr(): i for i in given}
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        copies: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._late: list[tuple[int, torch.Tensor]] = []
        self._outputs: list[Output] = []
        self.used = 0
        kept = zip(graph.weights, store.values, strict=True)
        self._written = [value for weight, value in kept if weight.value.name in graph.written]
        self._written_inputs = written
        device = store.device
        with torch.cuda.graph(self.graph, handle, _capture_stream(device.index), capture_error_mode="thread_local"):
            for index, tensor in given.items():
                static[index].copy_(tensor)
            results = pool.run(code, static, store.values)
            for position, (attr, result) in enumerate(zip(graph.outputs, results, strict=True)):
                output = _alias(attr, result, names, static, own, pinned)
                if output is None and pool.static_outputs:
                    output = _kept(result)
                self._outputs.append(output or _nothing)
                if output is None and _extent(result) > 2 * result.numel():
                    self._late.append((position, result))  # a thin slice of something large: not as one piece of memory
                elif output is None:
                    source, target = _flat(result), torch.empty(_extent(result), dtype=result.dtype, device=device)
                    target.copy_(source)
                    copies.append((position, source, target))
        self.graph.instantiate()
        self._static, self._results = static, results  # the graph's memory lives as long as these do
        find = _CopyNodes(self.graph)
        self._sources = [(find(t, static[i]), i, static[i].stride()) for i, t in given.items()]
        for position, source, target in copies:
            self._outputs[position] = _copy_out(results[position], find(source, target) if source.numel() else None)

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        """Launch the graph for `inputs` on the current stream; returns its outputs."""
        # Copies that `restride` makes are held until the launch: nobody else may get their memory before it.
        given = [restride(inputs[index], strides) for _, index, strides in self._sources]
        for (node, _, _), tensor in zip(self._sources, given, strict=True):
            node.set_source(tensor)
        outputs = [output(inputs) for output in self._outputs]
        self.graph.replay()
        # What a plain call does to the version counters of the tensors that it writes.
        for tensor in (*self._written, *(inputs[index] for index in self._written_inputs)):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        for position, result in self._late:
            outputs[position] = copy_strided(result, result.stride())
        return outputs


def _kept(result: torch.Tensor) -> Output:
    """The result itself, in memory of the graph."""
    return lambda inputs: result.detach()


def _nothing(inputs: Sequence[Any]) -> None:
    """Stands for an output that is made in another way."""


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the tensor's first to its last in memory."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of the tensor as one row, what lies between its elements included."""
    return tensor.as_strided((_extent(tensor),), (1,))


def _copy_out(result: torch.Tensor, node: CopyNode | None) -> Output:
    """A new tensor per replay, which the graph's last nodes fill."""
    shape, strides, dtype, device = tuple(result.shape), result.stride(), result.dtype, result.device

    def output(inputs: Sequence[Any]) -> torch.Tensor:
        if torch._C._cuda_getDevice() == device.index:
            fresh = EMPTY["cuda"](shape, strides, dtype)
        else:
            fresh = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if node is not None:
            node.set_target(fresh)
        return fresh

    return output


def _alias(
    attr: Any, result: Any, names: dict[str, int], static: list[Any], own: dict[int, int], pinned: set[int]
) -> Output | None:
    """How to make an output that is no new tensor: the caller's input, a view of it, or memory the module keeps."""
    if isinstance(attr, Value) and attr.name in names:
        position = names[attr.name]
        return lambda inputs: inputs[position]
    if not isinstance(result, torch.Tensor):
        return lambda inputs: result
    storage = result.untyped_storage().data_ptr()
    if storage in pinned:
        return lambda inputs: result.detach()
    if storage not in own:
        return None
    index = own[storage]
    like, shape, strides = static[index].stride(), result.shape, result.stride()
    offset = result.storage_offset() - static[index].storage_offset()

    def view(inputs: Sequence[Any]) -> torch.Tensor:
        given = restride(inputs[index], like)
        return given.as_strided(shape, strides, given.storage_offset() + offset)

    return view


# ---- the driver ------------------------------------------------------------------------------------------------------


class CopyNode:
    """A copy in an instantiated graph whose addresses can be set; what is running already is not affected."""

    def __init__(self, executable: Any, node: Any, params: Any, context: Any) -> None:
        self._set = driver().cuGraphExecMemcpyNodeSetParams
        self._executable, self._node, self._params, self._context = executable, node, params, context
        self._source = self._target = 0

    def set_source(self, tensor: torch.Tensor) -> None:
        """Copy from `tensor` in the replays that follow."""
        address = tensor.data_ptr()
        if address != self._source:
            self._source = self._params.srcDevice = address
            self._apply()

    def set_target(self, tensor: torch.Tensor) -> None:
        """Copy to `tensor` in the replays that follow."""
        address = tensor.data_ptr()
        if address != self._target:
            self._target = self._params.dstDevice = address
            self._apply()

    def _apply(self) -> None:
        (status,) = self._set(self._executable, self._node, self._params, self._context)
        if status != 0:
            raise RuntimeError(f"CUDA driver: {status.name} when setting the address of a copy")


class _CopyNodes:
    """Finds the copies of a captured graph by their addresses."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        cuda = driver()
        raw = cuda.CUgraph(graph.raw_cuda_graph())
        self._executable = cuda.CUgraphExec(graph.raw_cuda_graph_exec())
        self._context = checked(cuda.cuCtxGetCurrent())
        count = _checked_count(cuda.cuGraphGetNodes(raw))
        nodes = cuda.cuGraphGetNodes(raw, count)[1] if count else []
        kind = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
        copies = [node for node in nodes if checked(cuda.cuGraphNodeGetType(node)) == kind]
        found = [(node, checked(cuda.cuGraphMemcpyNodeGetParams(node))) for node in copies]
        self._found = {(int(params.srcDevice), int(params.dstDevice)): (node, params) for node, params in found}

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> CopyNode:
        """The copy of `source` to `target`.

        Raises:
            RuntimeError: it was captured as something else than a copy.
        """
        key = source.data_ptr(), target.data_ptr()
        if key not in self._found:
            raise RuntimeError("a copy at the border of the graph was not captured as one")
        return CopyNode(self._executable, *self._found[key], self._context)


def _checked_count(answer: tuple[Any, ...]) -> int:
    status, _, count = answer
    if status != 0:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return int(count)


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream that captures on a device."""
    return new_stream(torch.device("cuda", index))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage is collected meanwhile: a CUDA graph among it would be destroyed by the thread that captures,
    which ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_failed_capture(device: torch.device, handle: Any) -> None:
    """Undo what a failed capture leaves behind in PyTorch: memory that is still being allocated for it, and the random
    number generator in the state of a capture, out of which a capture that ends takes it."""
    torch._C._cuda_endAllocateToPool(device.index, handle)
    stream, graph = _capture_stream(device.index), torch.cuda.CUDAGraph()
    with (
        _CAPTURING,
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=device)
