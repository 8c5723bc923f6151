"""Border tensors of a captured graph: how each input gets in and how each result gets out.

Inputs are `InPlaceInput | CopiedInput | Pinned`, buffers for results `InPlaceResult | CopiedResult`, and results
themselves `Fresh | Alias | View | Pinned | Late`. `input_kind` and `Results` decide. The kinds of inputs and buffers
hold tensors of the capture and end with it; a replay needs the `Source` of each input and the kinds of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import Graph, TensorType, Value, evaluate
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.code import PLACED, aligned, copy_strided, restride
from torch_rtx.runtime.graph_params import GraphNodes, Slots

# A pointer set in one kernel costs about 1 us of host time. A captured copy costs 2 us of host and 2 us of device time,
# and 1 us of device time more per BYTES_PER_KERNEL.
KERNELS_PER_COPY = 4
BYTES_PER_KERNEL = 512 << 10
Uses = Mapping[str, tuple[str, int]]  # see `kernel_uses`
Strides = tuple[int, ...]
Like = tuple[tuple[int, ...], Strides, torch.dtype]  # shape, strides, dtype


def is_worth(kernels: int, nbytes: int) -> bool:
    """Setting a pointer in so many kernels costs less than copying so many bytes."""
    return kernels <= KERNELS_PER_COPY + nbytes // BYTES_PER_KERNEL


# ---- inputs ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a replay reads of an input: `fit(inputs[position], strides)`."""

    position: int
    strides: Strides
    fit: Callable[[torch.Tensor, Strides], torch.Tensor]


@dataclass(frozen=True, eq=False)
class InPlaceInput:
    """Kernels alone read the input: each replay points them to the caller's tensor.

    Attributes:
        stand_in: what the capture reads.
        uses: how many kernel arguments must point into it.
    """

    source: Source
    stand_in: torch.Tensor
    uses: int

    def enter(self) -> torch.Tensor:
        """What the captured code reads."""
        return self.stand_in

    def slots(self, nodes: GraphNodes, stand_in: torch.Tensor) -> Slots | None:
        """Where a replay sets the address of the input; None if kernels got another pointer."""
        return nodes.kernels(stand_in.untyped_storage(), self.uses)


@dataclass(frozen=True, eq=False)
class CopiedInput:
    """A library call reads the input, or too many kernels do: the first nodes of the graph copy it into its memory.

    Attributes:
        given: the tensor that the captured node copies.
    """

    source: Source
    given: torch.Tensor

    def enter(self) -> torch.Tensor:
        """What the captured code reads: a copy that a captured node makes."""
        return torch.empty_like(self.given).copy_(self.given)

    def slots(self, nodes: GraphNodes, stand_in: torch.Tensor) -> Slots:
        """Where a replay sets the address of the input."""
        return nodes.copy(self.given, stand_in)[0]


@dataclass(frozen=True, eq=False)
class Pinned:
    """The value of the capture serves every replay: a number, an empty tensor, or memory that outlives the graph."""

    value: Any

    def enter(self) -> Any:
        """What the captured code reads."""
        return self.value

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> Any:
        """The result of a replay; a tensor gets metadata of its own."""
        return self.value.detach() if isinstance(self.value, torch.Tensor) else self.value


Input = InPlaceInput | CopiedInput | Pinned


def input_kind(index: int, value: Value, given: Any, uses: Uses, sizes: Mapping[str, int]) -> Input:
    """The kind of input `index`, which the graph does not write to."""
    if not isinstance(value.type, TensorType):
        return Pinned(given)
    if not given.numel():
        return Pinned(torch.empty_like(given))
    strides = tuple(evaluate(dim, sizes) or 0 for dim in value.type.strides)
    _, count = uses.get(value.name, ("", None))
    if count is not None and is_worth(count, given.nbytes) and aligned(given, strides) is given:
        stand_in = torch.empty_strided(given.shape, strides, dtype=given.dtype, device=given.device)
        return InPlaceInput(Source(index, strides, aligned), stand_in, count)
    strides = torch.empty_like(given, device="meta").stride()
    return CopiedInput(Source(index, strides, restride), restride(given, strides))


class Inputs:
    """The inputs of a capture; made before it, entered in it.

    Attributes:
        names: of all inputs, in order.
        sources: what a replay reads, in the order of `slots`.
        tensors: what the captured code reads.
        stand_ins: by the address of its memory, the position of each input that replays replace.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], written: Collection[int], uses: Uses) -> None:
        self.names = [value.name for value in graph.inputs]
        sizes = bind_sizes(graph, inputs)
        self._kinds = [
            Pinned(given) if index in written else input_kind(index, value, given, uses, sizes)
            for index, (value, given) in enumerate(zip(graph.inputs, inputs, strict=True))
        ]
        self._replaced = {index: kind for index, kind in enumerate(self._kinds) if not isinstance(kind, Pinned)}
        self.sources = [kind.source for kind in self._replaced.values()]

    def enter(self) -> None:
        """Capture the copies."""
        self.tensors = [kind.enter() for kind in self._kinds]
        self.stand_ins = {self.tensors[index].untyped_storage().data_ptr(): index for index in self._replaced}

    def slots(self, nodes: GraphNodes) -> dict[str, Slots | None]:
        """By name, the slots of each source; None if kernels got another pointer."""
        return {self.names[index]: kind.slots(nodes, self.tensors[index]) for index, kind in self._replaced.items()}


# ---- buffers that a replay allocates for results ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InPlaceResult:
    """Kernels alone write and read the memory: each replay points them to a new tensor.

    Attributes:
        name: the value that owns the memory.
        like: the tensor that a replay allocates.
        memory: the memory in the capture.
        uses: how many kernel arguments must point into it.
    """

    name: str
    like: Like
    memory: torch.UntypedStorage
    uses: int

    def slots(self, nodes: GraphNodes) -> Slots | None:
        """Where a replay sets the address of the new tensor; None if kernels got another pointer."""
        return nodes.kernels(self.memory, self.uses)


@dataclass(frozen=True, eq=False)
class CopiedResult:
    """The last nodes of the graph copy `source`, in its memory, to a new tensor, whose stand-in is `target`."""

    name: str
    like: Like
    source: torch.Tensor
    target: torch.Tensor

    def slots(self, nodes: GraphNodes) -> Slots:
        """Where a replay sets the address of the new tensor; an empty result has no slots."""
        return nodes.copy(self.source, self.target)[1] if self.target.numel() else []


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fresh:
    """Buffer `index` of the replay, or the `part` of it with this shape, strides and offset."""

    index: int
    part: tuple[tuple[int, ...], Strides, int] | None = None

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay with these inputs and buffers."""
        return fresh[self.index] if self.part is None else PLACED(fresh[self.index], *self.part)


@dataclass(frozen=True)
class Alias:
    """The caller's input `index` itself."""

    index: int

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> Any:
        """The result of a replay."""
        return inputs[self.index]


@dataclass(frozen=True)
class View:
    """A view of the caller's input `index`.

    Attributes:
        strides: those of the input in the capture.
        above: bytes from the input's first element to the view's.
        like: the view.
    """

    index: int
    name: str
    strides: Strides
    above: int
    like: Like

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay.

        Raises:
            InputError: the view's dtype is wider than the input's, and the input is not aligned to it.
        """
        shape, strides, dtype = self.like
        tensor = restride(inputs[self.index], self.strides).detach()
        start, rest = divmod(_start(tensor) + self.above, dtype.itemsize)
        if rest:
            raise InputError(f"input {self.name!r} does not begin at a multiple of the size of {dtype}")
        if tensor.dtype != dtype:
            tensor = tensor.new_empty(0, dtype=dtype).set_(tensor.untyped_storage(), 0, (0,), (1,))
        return tensor.as_strided(shape, strides, start)


@dataclass(frozen=True, eq=False)
class Late:
    """A thin slice of something large in the graph's memory: each replay copies it after the launch."""

    value: torch.Tensor

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay."""
        return copy_strided(self.value, self.value.stride())


Result = Fresh | Alias | View | Pinned | Late


class Results:
    """The results of a capture, and how replays return them; made in the capture.

    Args:
        results: what the captured code returned.
        pinned: addresses of the memory of weights and of inputs that are captured at their address.
        static: results stay in the graph's memory.

    Attributes:
        kinds: one per result.
        buffers: what a replay allocates.
    """

    def __init__(
        self, graph: Graph, results: Sequence[Any], inputs: Inputs, pinned: Collection[int], uses: Uses, static: bool
    ) -> None:
        self.buffers: list[InPlaceResult | CopiedResult] = []
        self._names = [attr.name if isinstance(attr, Value) else "" for attr in graph.outputs]
        # No kernel result lies in an input's memory, although code may have copied it from there.
        self._uses = {name: use for name, use in uses.items() if use[0] not in inputs.names}
        kinds: dict[int, Result] = {}
        groups: dict[tuple[int, int], dict[int, torch.Tensor]] = {}  # results that share memory, by position
        for position, (name, result) in enumerate(zip(self._names, results, strict=True)):
            kept = _kept(name, result, inputs, pinned, static)
            if kept is None:
                key = result.untyped_storage().data_ptr(), 0 if result.numel() else position
                groups.setdefault(key, {})[position] = result
            else:
                kinds[position] = kept
        for group in groups.values():
            kinds |= self._in_place(group) or {position: self._copied(position, group[position]) for position in group}
        self.kinds = [kinds[position] for position in range(len(results))]

    @property
    def are_buffers(self) -> bool:
        """The results are the buffers, in order."""
        return self.kinds == [Fresh(index) for index in range(len(self.buffers))]

    def _in_place(self, group: Mapping[int, torch.Tensor]) -> dict[int, Result] | None:
        """Let kernels write results that share memory into one buffer; None if they have to be copied."""
        owners = {self._uses.get(self._names[position]) for position in group}
        owner, first = owners.pop(), next(iter(group.values()))
        memory = first.untyped_storage()
        length = memory.nbytes() // first.element_size()
        if owners or owner is None or any(result.dtype != first.dtype for result in group.values()):
            return None
        if not is_worth(owner[1], memory.nbytes()) or length > 2 * sum(result.numel() for result in group.values()):
            return None
        whole = len(group) == 1 and aten.extent(first.shape, first.stride()) == length
        like: Like = (tuple(first.shape), first.stride(), first.dtype) if whole else ((length,), (1,), first.dtype)
        self.buffers.append(InPlaceResult(owner[0], like, memory, owner[1]))
        index = len(self.buffers) - 1
        return {position: Fresh(index, None if whole else _part(result)) for position, result in group.items()}

    def _copied(self, position: int, result: torch.Tensor) -> Result:
        """Capture the copy of a result to a buffer, unless most of its extent lies between its elements."""
        extent = aten.extent(result.shape, result.stride())
        if extent > 2 * result.numel():
            return Late(result)
        source = target = result
        if result.numel():  # as one piece of memory, with what lies between the elements
            source = result.as_strided((extent,), (1,))
            target = torch.empty_like(source).copy_(source)
        like = tuple(result.shape), result.stride(), result.dtype
        self.buffers.append(CopiedResult(f"_{position}", like, source, target))
        return Fresh(len(self.buffers) - 1)

    def slots(self, nodes: GraphNodes) -> dict[str, Slots | None]:
        """By name, the slots of each buffer; None if kernels got another pointer."""
        return {buffer.name: buffer.slots(nodes) for buffer in self.buffers}


def _kept(name: str, result: Any, inputs: Inputs, pinned: Collection[int], static: bool) -> Result | None:
    """The kind of a result that is no new tensor; None if each replay has to make one."""
    if name in inputs.names:
        return Alias(inputs.names.index(name))
    if not isinstance(result, torch.Tensor):
        return Pinned(result)
    storage = result.untyped_storage().data_ptr()
    if storage in pinned:
        return Pinned(result)
    if storage in inputs.stand_ins:
        index = inputs.stand_ins[storage]
        own = inputs.tensors[index]
        like = tuple(result.shape), result.stride(), result.dtype
        return View(index, inputs.names[index], own.stride(), _start(result) - _start(own), like)
    return Pinned(result) if static else None


def _part(result: torch.Tensor) -> tuple[tuple[int, ...], Strides, int]:
    return tuple(result.shape), result.stride(), int(result.storage_offset())


def _start(tensor: torch.Tensor) -> int:
    """Bytes from the beginning of a tensor's memory to its first element."""
    return int(tensor.storage_offset()) * tensor.element_size()
