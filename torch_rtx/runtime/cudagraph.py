"""Unified CUDA graphs: a whole module, engine and fallback operators together, replayed as one graph per input shape.

The first call with a combination of shapes runs the plain code, the second captures it, later ones replay. Ordinary inputs
are copied into static memory and outputs out of it, so that a caller may keep both. Inputs that the module writes to (caches)
are captured at their address instead, which is part of the key.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_rtx.ir import MAIN, Graph, ScalarType, TensorType, Value, dim_syms, type_dims
from torch_rtx.runtime.reference import Runner, copy_strided
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
# CUDA captures per process, not per session: a synchronization by one capture's start would break another one.
_CAPTURING = threading.Lock()
SEEN_PER_GRAPH = 8  # keys that are remembered as met once, per graph of the pool
Output = Callable[[Sequence[Any]], Any]


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
        for value in node.outputs:
            if value is None:
                continue
            if isinstance(value.type, ScalarType):
                return f"the host needs the result of {node.op} ({node.loc})"
            if value.type.device != MAIN:
                return f"{node.op} runs on {value.type.device} ({node.loc})"
            if any(sym.name not in known for dim in type_dims(value.type) for sym in dim_syms(dim)):
                return f"the size of the result of {node.op} depends on the data ({node.loc})"
    return None


@dataclass
class Captured:
    """A captured graph with its static inputs (`targets`, for the inputs at `copied`) and how to make each output."""

    graph: torch.cuda.CUDAGraph
    copied: list[int]
    targets: list[torch.Tensor]
    outputs: list[Output]

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        if self.copied:
            torch._foreach_copy_(self.targets, [inputs[index] for index in self.copied])
        self.graph.replay()
        return [output(inputs) for output in self.outputs]


class GraphPool:
    """The CUDA graphs of one session: at most `size`, the least recently used goes first. Safe to call from many threads.

    The graphs share their memory, so that their replays follow each other: on one stream as it is, and where the stream
    changes the new one waits for the old.
    """

    def __init__(self, graph: Graph, run: Runner, device: torch.device, size: int) -> None:
        self.run, self.device, self.size = run, device, size
        self.graph = graph
        self.captured: OrderedDict[object, Captured | None] = OrderedDict()  # None: met once
        self.captures = self.replays = 0
        self.disabled: str | None = None
        self._written = [i for i, value in enumerate(graph.inputs) if value.name in graph.written]
        self._handle = torch.cuda.graph_pool_handle()
        self._lock = threading.RLock()
        self._generation = -1
        self._stream: torch.cuda.Stream | None = None
        self._raw_stream = -1

    def __call__(self, key: object, inputs: Sequence[Any], store: WeightStore) -> list[Any]:
        """The outputs for `inputs`; `key` says all that the captured code depends on but addresses."""
        if self.disabled is not None or torch.cuda.is_current_stream_capturing():
            return self.run(inputs, store.values)
        if self._written:
            key = (key, tuple([(inputs[i].data_ptr(), inputs[i].stride()) for i in self._written]))
        with self._lock:
            if self._generation != store.generation:
                self.captured.clear()
                self._generation = store.generation
            found = self.captured.get(key, False)
            if found is None:
                found = self._capture(inputs, store)
                if found is not None:
                    self._insert(key, found)
            elif found is False:
                self._insert(key, None)
            if found:
                self.captured.move_to_end(key)
                self._follow_stream()
                self.replays += 1
                return found.replay(inputs)
        return self.run(inputs, store.values)

    def _insert(self, key: object, entry: Captured | None) -> None:
        self.captured[key] = entry
        self.captured.move_to_end(key)
        graphs = [k for k, held in self.captured.items() if held is not None]
        if len(graphs) > self.size:
            del self.captured[graphs[0]]
        if len(self.captured) - len(graphs) > SEEN_PER_GRAPH * self.size:
            del self.captured[next(k for k, held in self.captured.items() if held is None)]

    def _follow_stream(self) -> None:
        """Order this replay after the last one, whatever stream that was on."""
        raw = torch._C._cuda_getCurrentRawStream(self.device.index)
        if raw == self._raw_stream:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self._raw_stream = stream, raw

    def _capture(self, inputs: Sequence[Any], store: WeightStore) -> Captured | None:
        """Capture the module for these inputs; None, and never tried again, where CUDA refuses."""
        fixed = set(self._written)
        copied = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and i not in fixed]
        targets = [_like(inputs[i]) for i in copied]
        static = list(inputs)
        for index, target in zip(copied, targets, strict=True):
            static[index] = target
        graph = torch.cuda.CUDAGraph()
        try:
            with _CAPTURING, torch.cuda.device(self.device):
                torch._foreach_copy_(targets, [inputs[i] for i in copied])
                with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
                    results = self.run(static, store.values)
        except RuntimeError as error:
            self.disabled = str(error).splitlines()[0]
            _end_failed_capture(self.device)
            log.warning("no CUDA graphs for this module, it can't be captured: %s", self.disabled)
            return None
        self.captures += 1
        log.debug("captured a CUDA graph for %s", [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        pinned = {t.untyped_storage().data_ptr() for t in store.values}
        pinned |= {inputs[i].untyped_storage().data_ptr() for i in fixed}
        names = {value.name: index for index, value in enumerate(self.graph.inputs)}
        outputs = [
            _output(attr, result, names, static, copied, pinned)
            for attr, result in zip(self.graph.outputs, results, strict=True)
        ]
        return Captured(graph, copied, targets, outputs)


def _end_failed_capture(device: torch.device) -> None:
    """Take the random number generator out of the state that a failed capture leaves it in: a capture that ends does."""
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a copy of `tensor`, of the same strides where they do not overlap."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format)


def _output(
    attr: Any, result: Any, names: dict[str, int], static: list[Any], copied: list[int], pinned: set[int]
) -> Output:
    """How a replay makes one output: the caller's input, an alias of what the caller or the module owns, or a copy."""
    if isinstance(attr, Value) and attr.name in names:
        index = names[attr.name]
        return lambda inputs: inputs[index]
    if not isinstance(result, torch.Tensor):
        return lambda inputs: result
    storage = result.untyped_storage().data_ptr()
    if storage in pinned:
        return lambda inputs: result.detach()
    for index in copied:
        if result.numel() and static[index].untyped_storage().data_ptr() == storage:
            shape, strides, offset = result.shape, result.stride(), result.storage_offset() - static[index].storage_offset()
            like = static[index].stride()

            def alias(inputs: Sequence[Any]) -> torch.Tensor:
                given = inputs[index]
                if given.stride() != like:
                    return result.clone()
                return given.as_strided(shape, strides, given.storage_offset() + offset)

            return alias
    if 0 in result.stride() and any(st == 0 and n > 1 for st, n in zip(result.stride(), result.shape, strict=True)):
        return lambda inputs: copy_strided(result, result.stride())
    return lambda inputs: result.clone()
