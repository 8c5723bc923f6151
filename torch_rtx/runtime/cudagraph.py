"""Unified CUDA graphs: a whole module, engine and fallback operators together, replayed as one graph per input shape.

The first call with a combination of shapes runs the plain code, a later one captures it, the rest replay; where more
combinations come again than there may be graphs, some go on with the plain code (`runtime.places`). A caller may pass
other tensors in each call and keep all results. What only kernels touch is read and written where the caller has it:
the addresses in these kernels are set before each replay. Other inputs are copied into memory of the graph, and other
results out of it, by the graph's own first and last nodes, whose addresses are set just so: no copy costs a launch.
Inputs that the module writes to (caches) are captured at their address instead, which is part of the key.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from torch_rtx.ir import MAIN, Graph, ScalarType, TensorType, dim_syms, type_dims
from torch_rtx.runtime.captured import Captured, CaptureSpec, RunCode, capture
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.driver import driver
from torch_rtx.runtime.graphmemory import GraphMemory, shared_memory
from torch_rtx.runtime.places import Places
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
# CUDA captures per process, not per session: the synchronization at the start of a capture would break another one.
_CAPTURING = threading.Lock()


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
    """The CUDA graphs of one session: at most `size`, see `Places`. Many threads may call it.

    Args:
        run: runs code of `graph` with inputs and weights.
        static_outputs: results stay in the memory of their graph.
        shared: its graphs are in the `shared_memory` of the stream on which the first of them is captured; else they
            share memory among themselves alone. Static outputs would not be safe there.
    """

    def __init__(
        self,
        graph: Graph,
        run: RunCode,
        device: torch.device,
        size: int,
        static_outputs: bool = False,
        shared: bool = False,
    ) -> None:
        self.graph, self.run, self.device, self.size = graph, run, device, size
        self._index = device.index  # of this one, asking for it takes a while
        self.static_outputs = static_outputs
        self.captured: dict[object, Captured] = {}
        self.written = [i for i, value in enumerate(graph.inputs) if value.name in graph.written]
        self.captures = self.replays = 0
        self.disabled: str | None = None
        self._places = Places(self.captured, size)
        self._memory = None if shared and not static_outputs else GraphMemory(device)
        self._lock = threading.RLock()
        self._warm = threading.local()
        self._generation = -1

    @property
    def memory(self) -> GraphMemory:
        """Where its graphs are."""
        if self._memory is None:
            self._memory = shared_memory(self.device)
        return self._memory

    def __call__(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> list[Any]:
        """The outputs for `inputs`.

        Args:
            key: says all that captured code depends on but addresses.
            code: what to run; a graph of other code with the same key is dropped.
        """
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self.device):
                return self(key, code, inputs, store)
        if self.disabled is not None or torch.cuda.is_current_stream_capturing():
            return self.run(code, inputs, store.values)  # in a caller's own capture its graph holds ours, call by call
        if self.written:
            key = (key, tuple([(inputs[i].data_ptr(), inputs[i].stride()) for i in self.written]))
        with self._lock:
            found = self._find(key, code, inputs, store)
            if found is not None:
                self.replays += 1
                return found.replay(inputs)
        outputs = self.run(code, inputs, store.values)
        # Library handles are per thread, and a capture can't make them: a thread captures only after a plain call.
        self._warm.done = True
        return outputs

    def _find(self, key: object, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """The graph for `key`, captured now if that is due; None where this call has to run the plain code."""
        if self._generation != store.generation:
            self.captured.clear()
            self._generation = store.generation
        found = self.captured.get(key)
        if found is None or found.code is not code:
            self.captured.pop(key, None)
            if not self._places.meet(key) or not getattr(self._warm, "done", False):
                return None
            found = self._capture(code, inputs, store)
            if found is None:
                return None
            place = self._places.take(key)
            if place is not None:
                del self.captured[place]
            self.captured[key] = found
        found.used = self.replays
        return found

    def _capture(self, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """Capture the module for these inputs; None, and never tried again, where CUDA refuses."""
        memory, stream = self.memory, torch.cuda.current_stream(self.device)
        with _CAPTURING, _no_collection():
            others = memory.begin()  # held meanwhile
            try:
                spec = CaptureSpec(self.graph, self.run, self.device, memory, self.written, self.static_outputs)
                found = capture(spec, code, inputs, store)
                memory.hold(found)
            except RuntimeError as error:
                self.disabled = str(error).partition("\n")[0]
                log.warning("no CUDA graphs for this module, it can't be captured: %s", self.disabled)
                _end_failed_capture(self.device, memory)
                torch.cuda.set_stream(stream)  # PyTorch stays on that of a capture which can't be ended
                memory.leave()
                return None
            del others
        self.captures += 1
        log.debug("captured a CUDA graph for %s", [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return found


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


def _end_failed_capture(device: torch.device, memory: GraphMemory) -> None:
    """Undo what a failed capture leaves behind in PyTorch: memory that is still being allocated for it, and the random
    number generator in the state of a capture, out of which a capture that ends takes it."""
    with suppress(RuntimeError):  # it is not, where the capture was ended and something else failed
        torch._C._cuda_endAllocateToPool(device.index, memory.handle)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=memory.capture_stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
    except RuntimeError as error:
        log.warning("another capture after one that failed fails, too: %s", error)
