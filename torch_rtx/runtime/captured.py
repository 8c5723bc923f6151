"""One captured CUDA graph of a module: capture and replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import starmap
from operator import gt
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.ir import Graph, Node
from torch_rtx.runtime.code import EMPTY, Code, count_writes
from torch_rtx.runtime.driver import checked, driver, relaxed
from torch_rtx.runtime.graph_borders import Inputs, Results, pinned_memory
from torch_rtx.runtime.graph_params import Executables, GraphNodes, kernel_uses
from torch_rtx.runtime.graphmemory import GraphMemory
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.pdl import use_programmatic_edges
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
EXECUTABLES = 4  # of one graph: inputs in one of two places, results in one of two
_USES: Callable[[int], int] = torch._C._storage_Use_Count  # references to the memory of a tensor
_ADDRESS: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
RunCode = Callable[..., list[Any]]  # `run(code, inputs, weights)`, then arguments of `Code.run`


@dataclass(frozen=True, eq=False)
class CaptureSpec:
    """What all graphs of a session share.

    Attributes:
        graph: the program.
        run: runs code of `graph` with inputs and weights.
        device: where it runs, with its index.
        memory: where its CUDA graphs allocate.
        written: positions of the inputs that the program writes to.
        pinned: positions of the inputs that are captured at their address; these are among them.
        kept: positions of the results that stay in the memory of their graph.
        saved: those of them that no replay may overwrite while somebody has them.
    """

    graph: Graph
    run: RunCode
    device: torch.device
    memory: GraphMemory
    written: Sequence[int]
    pinned: Sequence[int]
    kept: frozenset[int]
    saved: frozenset[int]


def capture(spec: CaptureSpec, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured:
    """Capture `code` for `inputs`.

    Capturing repeats until every address is found: code copies a misaligned tensor before a kernel reads it, which only
    the capture shows, and a copy at the border changes which values share memory. Each round copies at least one tensor
    more.

    Raises:
        RuntimeError: CUDA refuses.
    """
    found = Captured(spec, code, inputs, store)
    copied = set(found.missing)
    while found.missing:
        log.debug("copied at the border of a CUDA graph: %s", copied)
        found = Captured(spec, code, inputs, store, copied)
        copied |= found.missing
    found.count_references()
    return found


class Captured:
    """One captured graph.

    Args:
        code: the code to capture.
        copied: names of inputs and results that are copied whatever `kernel_uses` says of them.

    Attributes:
        used: the pool's time of the last replay, see `Used`.
        missing: names of inputs and results whose pointer was found in another number of kernel arguments than
            `kernel_uses` predicts. Unless there are none, the graph must not be replayed.
    """

    def __init__(
        self,
        spec: CaptureSpec,
        code: Code,
        inputs: Sequence[Any],
        store: WeightStore,
        copied: Collection[str] = (),
    ) -> None:
        self.code, self.used = code, 0
        self._memory, self._device = spec.memory, spec.device.index
        graph = inline_kernels(code.graph, code.tactics)
        uses = {name: use for name, use in kernel_uses(graph).items() if use.owner not in copied}
        given = Inputs(spec.graph, inputs, spec.pinned, uses)
        weights = zip(spec.graph.weights, store.values, strict=True)
        self._written = [value for weight, value in weights if weight.value.name in spec.graph.written]
        self._written_inputs = spec.written
        pinned = {t.untyped_storage().data_ptr() for t in (*store.values, *(inputs[i] for i in spec.pinned))}
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        for generator in (given for given in inputs if isinstance(given, torch.Generator)):
            self.graph.register_generator_state(generator)  # each replay passes its state and advances it
        stand_ins = _StandIns(spec.device)
        stream = spec.memory.capture_stream
        with torch.cuda.graph(self.graph, spec.memory.handle, stream, capture_error_mode="thread_local"):
            given.enter()
            results = spec.run(code, given.tensors, store.values, stand_ins.empty)
            made = Results(spec.graph, results, given, pinned, uses, spec.kept, stand_ins.empty)
        use_programmatic_edges(driver(), self.graph, code.tactics)
        self.graph.instantiate()
        self._nodes = nodes = GraphNodes(self.graph, graph, code.tactics)
        slots = {**given.slots(nodes), **made.slots(nodes)}
        self.missing = {name for name, found in slots.items() if found is None}
        draws = may_draw(graph)
        known = [found for found in slots.values() if found is not None]
        self._executables = Executables(self.graph, known, 1 if draws else EXECUTABLES)
        self._launch = _with_generator(self.graph) if draws else driver().cuGraphLaunch
        self._sources, self._likes = given.sources, made.likes
        self._stand_ins = stand_ins.without(made.replaced)  # the graph reads or writes these
        self._results = None if made.are_buffers else made.assembly()
        saved = pinned_memory([made.kinds[index] for index in spec.saved])
        self._saved = [storage for address, storage in saved.items() if address not in pinned]
        self._handles = [storage._cdata for storage in self._saved]
        self._references = [0 for _ in self._saved]

    def count_references(self) -> None:
        """Count the references that the graph itself has to saved results; the capture must have let go of its own."""
        self._references = list(map(_USES, self._handles))

    def is_held(self) -> bool:
        """Somebody has a saved result of an earlier replay."""
        return any(map(gt, map(_USES, self._handles), self._references))

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        """Launch the graph for `inputs` on the current stream of its device, which must be the current device; returns
        the results."""
        # Copies of inputs are held until the launch: nobody else may get their memory before.
        sources, empty = self._sources, EMPTY["cuda"]
        given = [x if (x := inputs[index]).stride() == strides else fit(x, strides) for index, strides, fit in sources]
        fresh = list(starmap(empty, self._likes))
        executables = self._executables
        handle = executables.ready.get(tuple(map(_ADDRESS, (*given, *fresh))))
        if handle is None:
            given = [fit(x, strides) for x, (_, strides, fit) in zip(given, sources, strict=True)]
            handle = executables.at(tuple(map(_ADDRESS, (*given, *fresh))))
        memory, results = self._memory, fresh
        with memory.lock:
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            if stream != memory.stream:
                memory.follow(stream)
            status = self._launch(handle, stream)
            if status[0]:
                checked(status)
            if self._results is not None:  # after the launch: copies of inputs have what the graph wrote to these
                results = self._results(inputs, fresh)
        if self._written or self._written_inputs:
            count_writes([*self._written, *(inputs[index] for index in self._written_inputs)])
        return results


class _StandIns:
    """What kernels write beside the arena in a capture, in ordinary memory: where each replay brings a new tensor, the
    memory is free after the capture. In the graph's memory, gradients would take twice their size."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._made = torch.cuda.current_stream(device), list[torch.Tensor]()

    def empty(self, *like: Any) -> torch.Tensor:
        """Allocate as outside of the capture, which otherwise would fail if the allocator needed more memory."""
        with relaxed(), torch.cuda.stream(self._stream):
            self._made.append(EMPTY["cuda"](*like))
        return self._made[-1]

    def without(self, replaced: Collection[int]) -> list[torch.Tensor]:
        """All but those whose memory is at the addresses `replaced`."""
        return [tensor for tensor in self._made if tensor.untyped_storage().data_ptr() not in replaced]


def _with_generator(graph: torch.cuda.CUDAGraph) -> Callable[[object, int], tuple[int]]:
    """Launches through PyTorch, which passes the generator's state to the graph and takes 2 us more."""

    def launch(handle: object, stream: int) -> tuple[int]:
        graph.replay()
        return (0,)

    return launch


def may_draw(graph: Graph) -> bool:
    """A node of `graph` may draw from the random number generator."""
    return any(node.kind == "fallback" or (node.kind != "kernel" and _draws(node)) for node in graph.nodes)


def _draws(node: Node) -> bool:
    op = aten.overload(node.op)
    without = "dropout_p" in aten.schema(op) and node.arg("dropout_p", 0.0) == 0.0
    return aten.is_random(op) and not without
