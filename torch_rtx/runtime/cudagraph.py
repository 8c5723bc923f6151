"""Unified CUDA graphs: a whole module, engine and fallback operators together, replayed as one graph per input shape.

The first call with a combination of shapes runs the plain code, a later one captures it, the rest replay. If more
combinations recur than the pool has graphs, some keep running the plain code (`runtime.admission`). A caller may pass
other tensors in each call and keep all results: `runtime.graph_borders` says how these get in and out. Inputs that the
module writes to (caches) are captured at their address, which is part of the key.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.control import branches, given, is_control
from torch_rtx.ir import (
    COND,
    LOOP,
    MAIN,
    OBJECT,
    Graph,
    Node,
    ScalarType,
    TensorType,
    Value,
    attr_values,
    dim_syms,
    type_dims,
)
from torch_rtx.optable import NUMBERS
from torch_rtx.runtime.admission import AdmissionPolicy
from torch_rtx.runtime.captured import Captured, CaptureSpec, RunCode, capture, may_draw
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.conditional import has_conditional_nodes
from torch_rtx.runtime.driver import driver
from torch_rtx.runtime.garbage import uncollected
from torch_rtx.runtime.graphmemory import GraphMemory, ResultMemory, block_of, shared_memory
from torch_rtx.runtime.plan import Room
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
CHECKS = frozenset(("aten._linalg_check_errors.default",))  # calls that wait for the device and may raise
HELD_LOGGED = frozenset((8, 64, 512, 4096))  # calls of a pool that could not replay
# One capture at a time per process: the synchronization that begins a capture would break another one.
_CAPTURING = threading.Lock()


def why_not(graph: Graph) -> str | None:
    """The reason why the program can't be one CUDA graph; None if a capture may succeed."""
    known = {sym.name for value in graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    for value in graph.inputs:
        if isinstance(value.type, TensorType) and value.type.device != MAIN:
            return f"input {value.name} is on {value.type.device}"
    for weight in graph.weights:
        type_ = weight.value.type
        if isinstance(type_, TensorType) and type_.device != MAIN and type_.shape:
            return f"weight {', '.join(weight.names) or weight.value.name} is on {type_.device}"
    problem = _problem(graph, known, {value.name for value in attr_values(graph.outputs)})
    if problem is not None:
        return problem
    if any(node.op in ("aten._conj.default", "aten._neg_view.default") for node in graph.nodes):
        return "a result is the conjugate or the negative of another one, in the same memory"
    if _several_dtypes(graph):
        return "results of several dtypes share memory"
    if driver() is None:
        return "the package cuda-bindings is not installed"
    return None


def _problem(graph: Graph, known: set[str], needed: Collection[str], counts: bool = False) -> str | None:
    """Why nodes can't be captured.

    Args:
        known: symbols that inputs determine; gets those that calls determine.
        needed: values that are no part of a capture alone.
        counts: of the body of a loop that the host runs during the capture: it may compute on the host.
    """
    for node in graph.nodes:
        if node.op in NUMBERS and node.kind == "extern":  # a function of sizes, which are those of the capture
            known |= {sym.name for value in node.results for dim in type_dims(value.type) for sym in dim_syms(dim)}
            continue
        if is_control(node) and (problem := _control_problem(node, known)):
            return problem
        if node.op in CHECKS:
            return f"the host waits for the result that {node.op} checks ({node.loc})"
        on_host = node.op == LOOP or (counts and not any(_is_on(MAIN, value) for value in node.inputs))
        for value in node.results:
            type_ = value.type
            if isinstance(type_, ScalarType):
                return f"the host needs the result of {node.op} ({node.loc})"
            if type_.device != MAIN and not (on_host and type_.device == "cpu" and value.name not in needed):
                return f"{node.op} runs on {type_.device} ({node.loc})"
            if any(sym.name not in known for dim in type_dims(type_) for sym in dim_syms(dim)):
                return f"the size of the result of {node.op} depends on the data ({node.loc})"
    return None


def _control_problem(node: Node, known: set[str]) -> str | None:
    """Why control flow can't be captured: the device runs conditions and loops that its own tensors decide, and the
    host runs the other ones during the capture, which only numbers of the host may decide then."""
    decides = node.inputs[0] if node.op in (COND, LOOP) else None
    counts = node.op == LOOP and decides is not None and _is_on("cpu", decides)
    if decides is not None and not counts:
        state = given(node, "state")
        if not _is_on(MAIN, decides) or not all(_is_on(MAIN, value) for value in state) or node.arg("stacked"):
            return f"the host decides how often the bodies of {node.op} run ({node.loc})"
        if node.op == LOOP and any(map(may_draw, branches(node))):
            return f"passes of {node.op} on the device would all draw the same random numbers ({node.loc})"
        if not has_conditional_nodes():
            return f"the driver, or cuda-bindings, has no conditional nodes for {node.op} ({node.loc})"
    for body in branches(node):
        needed = () if counts else {value.name for value in attr_values(body.outputs)}
        if (problem := _problem(body, known, needed, counts)) is not None:
            return problem
    return None


def _is_on(device: str, value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.device == device


def _several_dtypes(graph: Graph) -> bool:
    """Whether results of several dtypes lie in the memory of one value that the graph computes."""
    base, dtypes = aten.bases(graph), dict[str, set[str]]()
    given = {value.name for value in graph.inputs} | {weight.value.name for weight in graph.weights}
    for value in attr_values(graph.outputs):
        owner = base.get(value.name, value.name)
        if owner not in given and isinstance(value.type, TensorType):
            dtypes.setdefault(owner, set()).add(value.type.dtype)
    return any(len(found) > 1 for found in dtypes.values())


class GraphPool:
    """The CUDA graphs of one session: at most `size`, see `AdmissionPolicy`. Thread-safe.

    The pool owns them, not the variant whose code they were captured from: sessions of equal layers share variants,
    while a graph holds the addresses of one session's weights.

    Args:
        run: runs code of `graph` with inputs and weights.
        static_outputs: results stay in the memory of their graph.
        shared: the graphs use the `shared_memory` of the stream that captures the first of them; otherwise they share
            memory only with each other. Static outputs would be overwritten there and are never shared.
        pinned: positions of inputs that are captured at their address, beside those that the module writes to:
            parameters, and what a forward graph has saved. A backward graph uses the memory of its forward graph, and
            writes over what it has read, unless autograd keeps that for another backward.
        saved: positions of results that stay in the memory of their graph, which is its own then. While somebody has
            one of them, calls run the plain code.
        guarded: the strides of inputs are the same in all calls with one key.
        compiled: see `CaptureSpec`.
    """

    def __init__(
        self,
        graph: Graph,
        run: RunCode,
        device: torch.device,
        size: int,
        static_outputs: bool = False,
        shared: bool = False,
        pinned: frozenset[int] = frozenset(),
        saved: frozenset[int] = frozenset(),
        guarded: bool = False,
        compiled: Callable[[Code, frozenset[str], Room | None], Code] | None = None,
    ) -> None:
        self.graph, self.run, self.device, self.size = graph, run, device, size
        self._backward, self._compiled = bool(pinned) and not saved, compiled
        self._results = ResultMemory() if self._backward else None
        self._index = device.index  # reading it from the device is slow
        self.static_outputs = static_outputs
        self.captured: dict[object, Captured] = {}
        self.written = [i for i, value in enumerate(graph.inputs) if value.name in graph.written]
        self.pinned, self.saved = sorted(pinned.union(self.written)), saved
        self._kept = frozenset(range(len(graph.outputs))) if static_outputs else saved
        self.captures = self.replays = self.held = 0
        self.disabled: str | None = None
        self._policy = AdmissionPolicy(self.captured, size)
        self._memory = None if shared and not static_outputs and not saved else GraphMemory(device)
        self._lock = threading.RLock()
        self._warm = threading.local()
        self._generation = -1
        self._guarded = guarded
        read = {value.name for node in graph.nodes for value in node.inputs}
        self._objects = [i for i, value in enumerate(graph.inputs) if value.type == OBJECT and value.name in read]
        self._last_key: tuple[object, list[int | None], object] = None, [], None

    @property
    def memory(self) -> GraphMemory:
        """The memory of the graphs."""
        if self._memory is None:
            self._memory = shared_memory(self.device)
        return self._memory

    def __call__(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> list[Any]:
        """The outputs for `inputs`.

        Args:
            key: everything that captured code depends on, except addresses.
            code: the code to run. A graph that was captured from other code, before a swap, is dropped.
        """
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self.device):
                return self(key, code, inputs, store)
        if self.disabled is not None or torch.cuda.is_current_stream_capturing():
            return self.run(code, inputs, store.values)  # into the caller's own capture
        if self._objects:
            objects = tuple([inputs[index] for index in self._objects])
            if not all(map(self._is_generator, objects)):
                return self.run(code, inputs, store.values)
            key = key, objects
        if self.pinned:
            key = self._key(key, inputs)
        if self.saved and torch._C._current_graph_task_id() == -1:  # else it is a thread of autograd
            self.memory.threads.add(threading.get_ident())
        keeps = self._backward and KEEPS_GRAPH()
        with self._lock:
            found = self._find((key, keeps) if keeps else key, code, inputs, store)
            if found is not None:
                if found.make_free(inputs):
                    self.replays += 1
                    return found.replay(inputs)
                self.held += 1
                if self.held in HELD_LOGGED:
                    log.info("%d calls ran without a CUDA graph: saved tensors or gradients were in use", self.held)
        outputs = self.run(code, inputs, store.values)
        # Library handles are per thread and can't be created in a capture: a thread captures only after a plain call.
        self._warm.done = True
        return outputs

    def clear(self) -> None:
        """Drop all graphs, and with them their memory. Their replays must have ended."""
        with self._lock, _CAPTURING:
            if self.captured:
                self.captured.clear()
                self._results = ResultMemory() if self._backward else None
                gc.collect()  # a graph may be in a cycle

    def _is_generator(self, given: object) -> bool:
        """A random number generator of the device, which a graph can have; any other object disables the pool."""
        if isinstance(given, torch.Generator) and given.device.type == self.device.type:
            return True
        self.disabled = f"an input is a {type(given).__name__}"
        log.info("no CUDA graphs for this module: %s", self.disabled)
        return False

    def _key(self, key: object, inputs: Sequence[Any]) -> object:
        """`key`, and where the pinned inputs are. Training pins hundreds of tensors, mostly where they were last."""
        before, addresses, full = self._last_key
        if self._guarded and before is key and _SAME_ADDRESSES(list(inputs), addresses, self.pinned):
            return full
        full = key, tuple([(inputs[i].data_ptr(), inputs[i].stride()) for i in self.pinned])
        self._last_key = key, [x.data_ptr() if isinstance(x, torch.Tensor) else None for x in inputs], full
        return full

    def _find(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """The graph for `key`, captured now if the policy admits it; None if this call has to run the plain code."""
        if self._generation != store.generation:
            self.captured.clear()
            self._generation = store.generation
        if self.pinned:
            for stale in [other for other, graph in self.captured.items() if graph.is_stale]:
                del self.captured[stale]
        found = self.captured.get(key)
        if found is None or found.code is not code:
            self.captured.pop(key, None)
            if not self._policy.record_miss(key) or not getattr(self._warm, "done", False):
                return None
            found = self._capture(code, inputs, store)
            if found is None:
                return None
            evicted = self._policy.evict_for(key)
            if evicted is not None:
                del self.captured[evicted]
            self.captured[key] = found
        found.used = self.replays
        return found

    def _capture(self, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """Capture the module for these inputs; None if CUDA refuses, which disables the pool."""
        block = block_of(inputs[index] for index in self.pinned) if self._backward else None
        memory, keeps = (self.memory if block is None else block.memory), KEEPS_GRAPH()
        usable = block is not None and not keeps and self._results is not None and self._results.is_usable
        stream = torch.cuda.current_stream(self.device)
        with _CAPTURING, uncollected():
            others = memory.begin() if block is None else ()  # held until this graph is in the memory
            fixed = self.written, self.pinned, self._kept, self.saved
            given = *fixed, self._compiled, block, keeps, self._results if usable else None
            spec = CaptureSpec(self.graph, self.run, self.device, memory, *given)
            try:
                found = capture(spec, code, inputs, store)
                if block is None:
                    memory.hold(found)
                if self.saved:
                    memory.leave()  # what is saved outlives the replay: no other graph may use its memory
            except RuntimeError as error:
                self.disabled = str(error).partition("\n")[0]
                log.warning("no CUDA graphs for this module, it can't be captured: %s", self.disabled)
                _end_failed_capture(self.device, memory, spec.handle)
                torch.cuda.set_stream(stream)  # PyTorch stays on the stream of a capture that it can't end
                memory.leave()
                return None
            del others
        # The next capture may use the memory of this one's workspaces, and nobody needs those of calls before it.
        CLEAR_WORKSPACES()
        self.captures += 1
        if self.saved:
            log.info("the CUDA graph of a forward keeps %.1f MiB for its backward", found.kept_bytes / 2**20)
        log.debug("captured a CUDA graph for %s", [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return found


def _same_addresses(inputs: list[Any], addresses: list[int | None], indices: list[int]) -> bool:
    return all(inputs[index].data_ptr() == addresses[index] for index in indices)


# PyTorch has these only where it is built with CUDA.
_SAME_ADDRESSES = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", _same_addresses)
CLEAR_WORKSPACES = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # of all threads and streams
# Whether the current backward keeps what was saved; true outside of a backward.
KEEPS_GRAPH: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def _end_failed_capture(device: torch.device, memory: GraphMemory, handle: Any) -> None:
    """Undo what a failed capture leaves behind in PyTorch: an allocator that still allocates to the graph's pool, and a
    random number generator in the state of a capture, which the end of another capture resets."""
    with suppress(RuntimeError):  # PyTorch ended the capture, and something else failed
        torch._C._cuda_endAllocateToPool(device.index, handle)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=memory.capture_stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
    except RuntimeError as error:
        log.warning("another capture after one that failed fails, too: %s", error)
