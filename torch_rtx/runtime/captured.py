"""One captured CUDA graph of a module, with its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import Graph, TensorType, Value, evaluate
from torch_rtx.ir import Node as Step
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.code import EMPTY, PLACED, Code, aligned, copy_strided, restride
from torch_rtx.runtime.driver import checked, driver
from torch_rtx.runtime.graphnodes import Executables, GraphNodes, Port, kernel_uses
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.pdl import use_programmatic_edges
from torch_rtx.runtime.weights import WeightStore

if TYPE_CHECKING:
    from torch_rtx.runtime.cudagraph import GraphPool

# Setting the address of one kernel takes about 1 us of the host's time. A copy by the graph takes 2 us of the host's,
# 2 us of the device's, and on the device 1 us more per so many bytes.
KERNELS_PER_COPY = 4
BYTES_PER_KERNEL = 512 << 10
EXECUTABLES = 4  # of one graph: inputs in one of two places, results in one of two
Output = Callable[[Sequence[Any], Sequence[torch.Tensor]], Any]  # of the inputs, and the fresh tensors of a replay
Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class Captured:
    """One captured graph.

    Args:
        pool: the one that it is made for.
        code: what is captured.
        copied: names of inputs and results that have to be copied, see `missing`.

    Attributes:
        missing: names of inputs and results whose addresses the kernels do not have as was expected of the code; the
            graph can't be replayed unless there are none.
    """

    def __init__(
        self,
        pool: GraphPool,
        code: Code,
        inputs: Sequence[Any],
        store: WeightStore,
        copied: Collection[str] = (),
    ) -> None:
        self.code, self.memory, self.used = code, pool.memory, 0
        self._device = pool.device.index
        graph = inline_kernels(code.graph, code.tactics)
        uses = {name: use for name, use in kernel_uses(graph).items() if use[0] not in copied}
        given = _Inputs(pool.graph, inputs, pool.written, uses)
        kept = zip(pool.graph.weights, store.values, strict=True)
        self._written = [value for weight, value in kept if weight.value.name in pool.graph.written]
        self._written_inputs = pool.written
        pinned = {t.untyped_storage().data_ptr() for t in (*store.values, *(inputs[i] for i in pool.written))}
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        memory = pool.memory
        with torch.cuda.graph(self.graph, memory.handle, memory.capture_stream, capture_error_mode="thread_local"):
            given.copy()
            results = pool.run(code, given.tensors, store.values)
            made = _Outputs(pool.graph, results, given, pinned, uses, pool.static_outputs)
        use_programmatic_edges(driver(), self.graph, code.tactics)
        self.graph.instantiate()
        self._nodes = nodes = GraphNodes(self.graph, code.tactics)
        ports = {**given.ports(nodes), **made.ports(nodes)}
        self.missing = {name for name, port in ports.items() if port is None}
        found = [port for port in ports.values() if port is not None]
        draws = may_draw(graph)
        self._executables = Executables(self.graph, found, 1 if draws else EXECUTABLES)
        self._launch = _with_generator(self.graph) if draws else driver().cuGraphLaunch
        self._sources, self._outputs, self._late = given.sources, made.outputs, made.late
        self._fresh, self._all_fresh = [fresh.like for fresh in made.fresh], made.all_fresh
        pool.memory.hold(self)

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        """Launch the graph for `inputs` on the current stream of its device, which is the current device; returns its
        outputs."""
        # Copies that are made of inputs are held until the launch: nobody else may get their memory before it.
        sources, empty = self._sources, EMPTY["cuda"]
        given = [x if (x := inputs[index]).stride() == strides else fit(x, strides) for index, strides, fit in sources]
        fresh = [empty(*like) for like in self._fresh]
        executables = self._executables
        handle = executables.ready.get(tuple([tensor.data_ptr() for tensor in (*given, *fresh)]))
        if handle is None:
            given = [fit(x, strides) for x, (_, strides, fit) in zip(given, sources, strict=True)]
            handle = executables.at(tuple([tensor.data_ptr() for tensor in (*given, *fresh)]))
        memory = self.memory
        with memory.lock:
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            if stream != memory.stream:
                memory.follow(stream)
            status = self._launch(handle, stream)
            if status[0]:
                checked(status)
            late = self._late and [(position, copy_strided(result, result.stride())) for position, result in self._late]
        # Only now: those that are copies of an input have what the graph wrote to it, as after a plain call.
        outputs = fresh if self._all_fresh else [output(inputs, fresh) for output in self._outputs]
        for position, result in late:
            outputs[position] = result
        if self._written or self._written_inputs:
            _count_writes([*self._written, *(inputs[index] for index in self._written_inputs)])
        return outputs


class _Inputs:
    """What stands for the inputs in a capture.

    Attributes:
        tensors: the inputs of the code: stand-ins for what the caller passes, and what is captured as it is.
        sources: what a replay takes of its inputs: position, strides, and what gives a tensor these.
        own: position of each stand-in, by the address of its memory.
    """

    def __init__(
        self, graph: Graph, inputs: Sequence[Any], written: Collection[int], uses: Mapping[str, tuple[str, int]]
    ) -> None:
        self.tensors = list(inputs)
        self.names = [value.name for value in graph.inputs]
        self.sources: list[tuple[int, tuple[int, ...], Callable[..., torch.Tensor]]] = []
        self._copied: dict[int, torch.Tensor] = {}
        self._uses: dict[int, int] = {}
        self._empty: list[int] = []
        sizes = bind_sizes(graph, inputs)
        for index, (value, given) in enumerate(zip(graph.inputs, inputs, strict=True)):
            if index in written or not isinstance(value.type, TensorType):
                continue
            strides = tuple(evaluate(dim, sizes) or 0 for dim in value.type.strides)
            count = uses.get(value.name, ("", None))[1]
            if not given.numel():
                self._empty.append(index)
            elif count is not None and is_worth(count, given.nbytes) and aligned(given, strides) is given:
                self.tensors[index] = torch.empty_strided(given.shape, strides, dtype=given.dtype, device=given.device)
                self._uses[index] = count
                self.sources.append((index, strides, aligned))
            else:
                strides = torch.empty_like(given, device="meta").stride()
                self._copied[index] = restride(given, strides)
                self.sources.append((index, strides, restride))

    def copy(self) -> None:
        """Capture the copies of inputs into memory of the graph."""
        for index in self._empty:
            self.tensors[index] = torch.empty_like(self.tensors[index])
        for index, given in self._copied.items():
            self.tensors[index] = torch.empty_like(given)
            self.tensors[index].copy_(given)
        stand_ins = (*self._uses, *self._copied)
        self.own = {self.tensors[index].untyped_storage().data_ptr(): index for index in stand_ins}

    def ports(self, nodes: GraphNodes) -> dict[str, Port | None]:
        """Of each source, by name and in order; None where kernels do not have it as expected."""
        return {
            self.names[index]: nodes.copy(self._copied[index], self.tensors[index])[0]
            if index in self._copied
            else nodes.kernels(self.tensors[index].untyped_storage(), self._uses[index])
            for index, _, _ in self.sources
        }


@dataclass
class _Fresh:
    """A tensor that each replay makes and fills.

    Attributes:
        like: what to make.
        memory: where kernels wrote it in the capture, and in how many arguments; None: the graph copies it.
        copied: what is copied, and to where.
    """

    name: str
    like: Like
    memory: tuple[torch.UntypedStorage, int] | None = None
    copied: tuple[torch.Tensor, torch.Tensor] | None = None

    def port(self, nodes: GraphNodes) -> Port | None:
        """Where a replay writes it."""
        if self.memory is not None:
            return nodes.kernels(*self.memory)
        return [] if self.copied is None else nodes.copy(*self.copied)[1]


class _Outputs:
    """What a replay returns.

    Args:
        results: of the code in the capture.
        pinned: addresses of the memory of weights and of inputs that are captured at their address.

    Attributes:
        fresh: the tensors that a replay makes.
        outputs: per output, how to get it from the inputs and these.
        late: results that are copied after a replay, by position.
        all_fresh: the outputs are these tensors, in order.
    """

    def __init__(
        self,
        graph: Graph,
        results: Sequence[Any],
        given: _Inputs,
        pinned: set[int],
        uses: Mapping[str, tuple[str, int]],
        static: bool,
    ) -> None:
        self.fresh: list[_Fresh] = []
        self.late: list[tuple[int, torch.Tensor]] = []
        self.outputs: list[Output] = []
        # What lies in an input's memory is no result of a kernel, even where the code had to copy it.
        self._uses = {name: use for name, use in uses.items() if use[0] not in given.names}
        self._results = results
        self._whole: list[int] = []  # positions of outputs that are fresh tensors, in the order of these
        self._names = [attr.name if isinstance(attr, Value) else "" for attr in graph.outputs]
        groups: dict[tuple[int, int], list[int]] = {}  # positions of results in the same memory
        for position, result in enumerate(results):
            output = _alias(self._names[position], result, given, pinned)
            if output is None and static:
                output = _kept(result)
            self.outputs.append(output or _nothing)
            if output is None:
                key = result.untyped_storage().data_ptr(), 0 if result.numel() else position
                groups.setdefault(key, []).append(position)
        for positions in groups.values():
            if not self._in_place(positions):
                for position in positions:
                    self._copy(position)
        self.all_fresh = self._whole == list(range(len(results)))

    def _in_place(self, positions: Sequence[int]) -> bool:
        """Let kernels write the results at these positions, which share memory, where the caller gets them; False if
        they have to be copied."""
        results = [self._results[position] for position in positions]
        owners = {self._uses.get(self._names[position]) for position in positions}
        owner = owners.pop()
        memory, first = results[0].untyped_storage(), results[0]
        length = memory.nbytes() // first.element_size()
        if owners or owner is None or any(result.dtype != first.dtype for result in results):
            return False
        if not is_worth(owner[1], memory.nbytes()) or length > 2 * sum(result.numel() for result in results):
            return False
        index = len(self.fresh)
        like: Like = (length,), (1,), first.dtype
        if len(results) == 1 and aten.extent(first.shape, first.stride()) == length:
            like = tuple(first.shape), first.stride(), first.dtype
            self.outputs[positions[0]] = lambda inputs, fresh: fresh[index]
            self._whole += positions
        else:
            for position, result in zip(positions, results, strict=True):
                self.outputs[position] = _part(index, result)
        self.fresh.append(_Fresh(owner[0], like, memory=(memory, owner[1])))
        return True

    def _copy(self, position: int) -> None:
        """Capture the copy of a result, or have it made after each replay."""
        result = self._results[position]
        extent = aten.extent(result.shape, result.stride())
        if extent > 2 * result.numel():  # a thin slice of something large: not as one piece of memory
            self.late.append((position, result))
            return
        index = len(self.fresh)
        copied = None
        if result.numel():
            source = result.as_strided((extent,), (1,))  # what lies between its elements included
            copied = source, torch.empty_like(source)
            copied[1].copy_(source)
        like = tuple(result.shape), result.stride(), result.dtype
        self.fresh.append(_Fresh(f"_{position}", like, copied=copied))
        self.outputs[position] = lambda inputs, fresh: fresh[index]
        self._whole.append(position)

    def ports(self, nodes: GraphNodes) -> dict[str, Port | None]:
        """Of each fresh tensor, by name and in order; None where kernels do not have it as expected."""
        return {fresh.name: fresh.port(nodes) for fresh in self.fresh}


def _count_writes(tensors: Sequence[torch.Tensor]) -> None:
    """What a plain call does to the version counters of the tensors that it writes."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _with_generator(graph: torch.cuda.CUDAGraph) -> Callable[[object, int], tuple[int]]:
    """PyTorch's own way to launch its graph, which gives it the state of the generator and takes 2 us more."""

    def launch(handle: object, stream: int) -> tuple[int]:
        graph.replay()
        return (0,)

    return launch


def may_draw(graph: Graph) -> bool:
    """Whether a call in `graph` may draw from the generator of random numbers."""
    return any(node.kind == "fallback" or (node.kind != "kernel" and _draws(node)) for node in graph.nodes)


def _draws(node: Step) -> bool:
    op = aten.overload(node.op)
    without = "dropout_p" in aten.schema(op) and node.arg("dropout_p", 0.0) == 0.0
    return aten.is_random(op) and not without


def is_worth(kernels: int, nbytes: int) -> bool:
    """Whether setting an address in so many kernels is less work than copying so many bytes."""
    return kernels <= KERNELS_PER_COPY + nbytes // BYTES_PER_KERNEL


def _kept(result: torch.Tensor) -> Output:
    """The result itself, in memory of the graph."""
    return lambda inputs, fresh: result.detach()


def _nothing(inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> None:
    """Stands for an output that is made in another way."""


def _part(index: int, result: torch.Tensor) -> Output:
    """A result that is a part of a fresh tensor."""
    shape, strides, offset = tuple(result.shape), result.stride(), result.storage_offset()
    return lambda inputs, fresh: PLACED(fresh[index], shape, strides, offset)


def _alias(name: str, result: Any, given: _Inputs, pinned: set[int]) -> Output | None:
    """How to make an output that is no new tensor: the caller's input, a view of it, or memory the module keeps."""
    if name in given.names:
        position = given.names.index(name)
        return lambda inputs, fresh: inputs[position]
    if not isinstance(result, torch.Tensor):
        return lambda inputs, fresh: result
    storage = result.untyped_storage().data_ptr()
    if storage in pinned:
        return lambda inputs, fresh: result.detach()
    if storage not in given.own:
        return None
    index = given.own[storage]
    own, dtype, shape, strides = given.tensors[index], result.dtype, result.shape, result.stride()
    like, above = own.stride(), _start(result) - _start(own)

    def view(inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = restride(inputs[index], like).detach()
        start, rest = divmod(_start(tensor) + above, dtype.itemsize)
        if rest:
            raise InputError(f"input {given.names[index]!r} does not begin at a multiple of the size of {dtype}")
        if tensor.dtype != dtype:
            tensor = tensor.new_empty(0, dtype=dtype).set_(tensor.untyped_storage(), 0, (0,), (1,))
        return tensor.as_strided(shape, strides, start)

    return view


def _start(tensor: torch.Tensor) -> int:
    """Bytes from the beginning of a tensor's memory to its first element."""
    return int(tensor.storage_offset()) * tensor.element_size()
