"""One captured CUDA graph of a module: capture and replay."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.control import branches, is_control
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.runtime.code import EMPTY, Code
from torch_rtx.runtime.conditional import recording
from torch_rtx.runtime.driver import checked, driver, relaxed
from torch_rtx.runtime.graph_borders import Inputs, Placed, Results, is_pinned_tensor
from torch_rtx.runtime.graph_params import Executables, GraphNodes, kernel_uses
from torch_rtx.runtime.graphmemory import Block, GraphMemory, Kept, ResultMemory, accumulating, references
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.pdl import use_programmatic_edges
from torch_rtx.runtime.plan import Room
from torch_rtx.runtime.strided import count_writes, span_of
from torch_rtx.runtime.weights import WeightStore

log = logging.getLogger(__name__)
EXECUTABLES = 4  # of one graph: inputs in one of two places, results in one of two
_ADDRESS: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
RunCode = Callable[..., list[Any]]  # `run(code, inputs, weights)`, then arguments of `Code.run`


@dataclass(frozen=True, eq=False)
class CaptureSpec:
    """What a graph has in common with others of its session, and its memory.

    Attributes:
        graph: the program.
        run: runs code of `graph` with inputs and weights.
        device: where it runs, with its index.
        memory: where its CUDA graphs allocate.
        written: positions of the inputs that the program writes to.
        pinned: positions of the inputs that are captured at their address; these are among them.
        kept: positions of the results that stay in the memory of their graph.
        saved: those of them that no replay may overwrite while somebody has them.
        compiled: the code to capture in place of code of `graph`, which puts outputs of these names into the arena, and
            values into a room, see `Plan`; None: results are not placed.
        block: what the forward graph of a backward graph has saved; the two share memory.
        keeps: this is needed again, so that the backward graph does not write there.
        results: of a backward graph that may: where it leaves results of library calls.
    """

    graph: Graph
    run: RunCode
    device: torch.device
    memory: GraphMemory
    written: Sequence[int]
    pinned: Sequence[int]
    kept: frozenset[int]
    saved: frozenset[int]
    compiled: Callable[[Code, frozenset[str], Room | None], Code] | None = None
    block: Block | None = None
    keeps: bool = False
    results: ResultMemory | None = None

    @property
    def handle(self) -> Any:
        """PyTorch's handle of the memory pool."""
        return self.memory.handle if self.block is None else self.block.handle

    def room(self, inputs: Sequence[Any]) -> Room | None:
        """The block, with what the graph reads there; None if it may not write there."""
        if self.block is None or self.keeps:
            return None
        spans = {
            self.graph.inputs[index].name: span_of([inputs[index]])
            for index in self.pinned
            if inputs[index].untyped_storage()._cdata == self.block.storage._cdata
        }
        parts = [
            (start, end, frozenset(name for name, (first, last) in spans.items() if first < end and start < last))
            for start, end in self.block.parts
        ]
        return Room(self.block.storage.nbytes(), parts, self.block.takes_gradients)


def capture(spec: CaptureSpec, code: Code, inputs: Sequence[Any], store: WeightStore) -> Captured:
    """Capture `code` for `inputs`.

    Capturing repeats until every address is found: code copies a misaligned tensor before a kernel reads it, which only
    the capture shows, and a copy at the border changes which values share memory. Each round copies at least one tensor
    more.

    Raises:
        RuntimeError: CUDA refuses.
    """
    stay, room = _names(spec.graph, spec.saved), spec.room(inputs)
    placed = code if spec.compiled is None or not (stay or room) else spec.compiled(code, stay, room)
    found = Captured(spec, placed, inputs, store)
    copied = set(found.missing)
    while found.missing:
        log.debug("copied at the border of a CUDA graph: %s", copied)
        found = Captured(spec, placed, inputs, store, copied)
        copied |= found.missing
    found.code = code
    return found


def _names(graph: Graph, positions: Collection[int]) -> frozenset[str]:
    outputs = [graph.outputs[position] for position in positions]
    return frozenset(output.name for output in outputs if isinstance(output, Value))


class Captured:
    """One captured graph.

    Args:
        code: the code to capture.
        copied: names of inputs and results that are copied whatever `kernel_uses` says of them.

    Attributes:
        code: what the pool was given.
        used: the pool's time of the last replay, see `Used`.
        block: the largest memory of saved results.
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
        self._block = None if spec.block is None else weakref.ref(spec.block)
        graph = inline_kernels(code.graph, code.tactics)
        uses = {name: use for name, use in kernel_uses(graph).items() if use.owner not in copied}
        given = Inputs(spec.graph, inputs, spec.pinned, uses)
        weights = zip(spec.graph.weights, store.values, strict=True)
        self._written = [value for weight, value in weights if weight.value.name in spec.graph.written]
        self._written_inputs, self._pinned = spec.written, spec.pinned
        pinned = {t.untyped_storage().data_ptr() for t in (*store.values, *(inputs[i] for i in spec.pinned))}
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        for generator in (given for given in inputs if isinstance(given, torch.Generator)):
            self.graph.register_generator_state(generator)  # each replay passes its state and advances it
        stand_ins = _StandIns(spec.device)
        self._results_memory, own = spec.results, list[torch.Tensor]()
        keep = EMPTY["cuda"] if spec.results is None else spec.results.allocator(stand_ins.ordinary, own)
        places = () if spec.block is None else (spec.block.view(torch.uint8), keep)
        stream = spec.memory.capture_stream
        with (
            recording() as self._recording,
            torch.cuda.graph(self.graph, spec.handle, stream, capture_error_mode="thread_local"),
        ):
            given.enter()
            results = spec.run(code, given.tensors, store.values, stand_ins.empty, *places)
            made = Results(spec.graph, results, given, pinned, uses, spec.kept, stand_ins.empty, spec.block, own)
        for made_of in (driver().CUgraph(self.graph.raw_cuda_graph()), *self._recording.bodies):
            use_programmatic_edges(driver(), made_of, code.tactics)
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
        gradients = {kind.memory.untyped_storage()._cdata for kind in made.kinds if isinstance(kind, Placed)}
        self._gives = spec.block is not None and spec.block.storage._cdata in gradients
        kinds = (made.kinds[index] for index in spec.saved)
        saved = [kind.value for kind in kinds if is_pinned_tensor(kind) and kind.value.numel()]
        by_memory: dict[int, list[torch.Tensor]] = {}
        for tensor in (*saved, *self._stand_ins):
            by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
        largest, *others = sorted(memories.keys() - pinned, key=lambda at: -memories[at].nbytes()) or [0]
        inside = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() == largest]
        self.block = Block(inside, references(by_memory[largest]), spec.memory, self.graph) if largest else None
        self._kept = Kept([*(by_memory[address] for address in others), *([tensor] for tensor in own)])

    @property
    def is_stale(self) -> bool:
        """The memory of saved tensors is gone: that of this forward graph, since somebody resized it, or that of the
        forward graph whose tensors this one reads. Or gradients may no longer be left where they are."""
        if self._block is None:
            return self.block is not None and not self.block.storage.nbytes()
        block, results = self._block(), self._results_memory
        refuses = block is not None and self._gives and not block.takes_gradients
        return block is None or refuses or (results is not None and not results.is_usable)

    @property
    def kept_bytes(self) -> int:
        """Memory that stays in use between replays, for saved tensors and gradients."""
        block = 0 if self.block is None else self.block.storage.nbytes()
        return block + sum(storage.nbytes() for storage in self._kept.storages)

    def make_free(self, inputs: Sequence[Any]) -> bool:
        """Whether nobody has anything in the memory that a replay overwrites: a saved result of an earlier replay, or a
        gradient. Gradients that parameters accumulate get other memory first, but not where several threads train:
        another one may add to a gradient at this moment."""
        held, moving = self._kept.is_held(), len(self._memory.threads) == 1
        if self._results_memory is not None:
            if held and moving:
                with self._in_order():
                    self._kept.move_gradients(accumulating())
                held = self._kept.is_held()
            self._results_memory.count_refusals(held)
        block = self.block
        if block is None or held:
            return not held
        if not block.is_held():
            block.count_moves(False)
            return True
        with self._in_order():
            block.move_gradients([inputs[index] for index in self._pinned], moving)
        return not block.is_held()

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """The current stream follows the last replay in this memory, and no other one does."""
        with self._memory.lock:
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            if stream != self._memory.stream:
                self._memory.follow(stream)
            yield

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

    def ordinary(self, *like: Any) -> torch.Tensor:
        """Allocate as outside of the capture, which otherwise would fail if the allocator needed more memory."""
        with relaxed(), torch.cuda.stream(self._stream):
            return EMPTY["cuda"](*like)

    def empty(self, *like: Any) -> torch.Tensor:
        """Allocate a stand-in."""
        self._made.append(self.ordinary(*like))
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
    return any(map(_draws, graph.nodes))


def _draws(node: Node) -> bool:
    if node.kind in ("kernel", "fallback"):
        return any(map(may_draw, branches(node))) if is_control(node) else node.kind == "fallback"
    return aten.draws(node)
