"""Border tensors of a captured graph: how each input gets in and how each result gets out.

Inputs are `InPlace | Copied | Pinned`. Results are `Fresh | Alias | View | Pinned | Placed | Late`; a fresh one lies in
a buffer that each replay allocates and fills `InPlace | Copied`. `Inputs` and `Results` decide. They hold tensors of
the capture and end with it; a replay needs the `Source` of each input, the `Like` of each buffer and the kind of each
result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, NamedTuple, TypeGuard

import torch

from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import Graph, TensorType, Value, evaluate
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.code import PLACED
from torch_rtx.runtime.graph_params import GraphNodes, Slots, Use
from torch_rtx.runtime.graphmemory import Block
from torch_rtx.runtime.strided import aligned, copy_strided, restride, span_of

# A pointer set in one kernel costs about 1 us of host time. A captured copy costs 2 us of host and 2 us of device time,
# and 1 us of device time more per BYTES_PER_KERNEL.
KERNELS_PER_COPY = 4
BYTES_PER_KERNEL = 512 << 10
_DETACHED: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
Uses = Mapping[str, Use]  # see `kernel_uses`
Strides = tuple[int, ...]
Like = tuple[tuple[int, ...], Strides, torch.dtype]  # shape, strides, dtype


@dataclass(frozen=True, eq=False)
class InPlace:
    """Kernels alone touch the tensor: each replay points them to the caller's input, or to a new tensor.

    Attributes:
        memory: of the tensor that stands for it in the capture.
        launches: the kernels whose arguments point into `memory`, see `Use`.
    """

    memory: torch.UntypedStorage
    launches: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Copied:
    """A node of the graph copies an input into the graph's memory, or a result from there to a new tensor."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pinned:
    """The value of the capture serves every replay: a number, an empty input, or memory that outlives the graph."""

    value: Any

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> Any:
        """The result of a replay with these inputs and buffers, if it is no tensor; see `Results.assembly`."""
        return self.value


@dataclass(frozen=True)
class Fresh:
    """A result in buffer `index` of the replay: all of it, or the `part` with this shape, strides and offset."""

    index: int
    part: tuple[tuple[int, ...], Strides, int] | None = None

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay with these inputs and buffers, after the launch."""
        return fresh[self.index] if self.part is None else PLACED(fresh[self.index], *self.part)


@dataclass(frozen=True)
class Alias:
    """A result that is the caller's input `index` itself."""

    index: int

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> Any:
        """The result of a replay with these inputs and buffers, after the launch."""
        return inputs[self.index]


@dataclass(frozen=True)
class View:
    """A result that is a view of the caller's input `index`.

    Attributes:
        strides: those of the input in the capture.
        above: bytes from the input's first element to the view's.
    """

    index: int
    name: str
    strides: Strides
    above: int
    like: Like

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay with these inputs and buffers, after the launch.

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
    """A result that each replay copies after the launch: empty, or a thin slice of something large."""

    value: torch.Tensor

    def result(self, inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result of a replay with these inputs and buffers, after the launch."""
        return copy_strided(self.value, self.value.stride())


@dataclass(frozen=True, eq=False)
class Placed:
    """A result in a block of the forward graph, or in memory of the session: the part of `memory` with this shape,
    strides and offset."""

    memory: torch.Tensor
    part: tuple[tuple[int, ...], Strides, int]


class Source(NamedTuple):
    """What a replay reads of an input: `fit(inputs[position], strides)`."""

    position: int
    strides: Strides
    fit: Callable[[torch.Tensor, Strides], torch.Tensor]


Result = Fresh | Alias | View | Pinned | Placed | Late


def is_worth(kernels: int, nbytes: int) -> bool:
    """Setting a pointer in so many kernels costs less than copying so many bytes."""
    return kernels <= KERNELS_PER_COPY + nbytes // BYTES_PER_KERNEL


class Inputs:
    """The inputs of a capture; made before it, entered in it.

    Args:
        pinned: positions of the inputs that are captured at their address.

    Attributes:
        names: of all inputs.
        sources: what a replay reads, in the order of `slots`.
        tensors: what the captured code reads.
        stand_ins: by the address of its memory, the position of each input that replays replace.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], pinned: Collection[int], uses: Uses) -> None:
        self.names, self.tensors = [value.name for value in graph.inputs], list(inputs)
        self.sources: list[Source] = []
        self._given: dict[int, torch.Tensor] = {}  # to be copied
        self._kinds: dict[int, InPlace | Copied] = {}
        sizes = bind_sizes(graph, inputs)
        for index, (value, given) in enumerate(zip(graph.inputs, inputs, strict=True)):
            if index in pinned or not isinstance(value.type, TensorType):
                continue
            strides = tuple(evaluate(dim, sizes) or 0 for dim in value.type.strides)
            use = uses.get(value.name)
            if not given.numel():
                self.tensors[index] = torch.empty_like(given)
            elif use is not None and is_worth(len(use.launches), given.nbytes) and aligned(given, strides) is given:
                stand_in = torch.empty_strided(given.shape, strides, dtype=given.dtype, device=given.device)
                self.tensors[index], self._kinds[index] = stand_in, InPlace(stand_in.untyped_storage(), use.launches)
                self.sources.append(Source(index, strides, aligned))
            else:
                strides = torch.empty_like(given, device="meta").stride()
                self._given[index] = restride(given, strides)
                self.sources.append(Source(index, strides, restride))

    def enter(self) -> None:
        """Capture the copies."""
        for index, given in self._given.items():
            self.tensors[index] = torch.empty_like(given).copy_(given)
            self._kinds[index] = Copied(given, self.tensors[index])
        self.stand_ins = {self.tensors[index].untyped_storage().data_ptr(): index for index in self._kinds}

    def slots(self, nodes: GraphNodes) -> dict[str, Slots | None]:
        """By name, where a replay sets the address of each source; None if kernels got another pointer."""
        kinds = [(self.names[source.position], self._kinds[source.position]) for source in self.sources]
        return {name: _slots(kind, nodes, 0) for name, kind in kinds}


class Results:
    """The results of a capture, and how replays return them; made in the capture.

    Args:
        results: what the captured code returned.
        pinned: addresses of the memory of weights and of inputs that are captured at their address.
        kept: positions of the results that stay in the graph's memory.
        empty: allocates what stands for a buffer, as a function in `code.EMPTY`.
        block: results may lie there.
        own: tensors that stay the memory of results of library calls.

    Attributes:
        kinds: one per result.
        likes: one per buffer.
    """

    def __init__(
        self,
        graph: Graph,
        results: Sequence[Any],
        inputs: Inputs,
        pinned: Collection[int],
        uses: Uses,
        kept: Collection[int],
        empty: Callable[..., torch.Tensor],
        block: Block | None = None,
        own: Sequence[torch.Tensor] = (),
    ) -> None:
        self._empty = empty
        places = {tensor.untyped_storage()._cdata: tensor for tensor in own}
        self.likes: list[Like] = []
        self._buffers: dict[str, InPlace | Copied] = {}
        self._names = [attr.name if isinstance(attr, Value) else "" for attr in graph.outputs]
        # No kernel result lies in an input's memory, although code may have copied it from there.
        self._uses = {name: use for name, use in uses.items() if use.owner not in inputs.names}
        kinds: dict[int, Result] = {}
        groups: dict[tuple[int, int], dict[int, torch.Tensor]] = {}  # results that share memory, by position
        for position, (name, result) in enumerate(zip(self._names, results, strict=True)):
            kind = _placed(result, block, places) or _kept(name, result, inputs, pinned, position in kept)
            if kind is None:
                key = result.untyped_storage().data_ptr(), 0 if result.numel() else position
                groups.setdefault(key, {})[position] = result
            else:
                kinds[position] = kind
        fixed = pinned_memory(kinds.values())
        for (address, _), group in groups.items():
            kinds |= (None if address in fixed else self._in_place(group)) or self._copied(group)
        self.kinds = [kinds[position] for position in range(len(results))]

    @property
    def are_buffers(self) -> bool:
        """The results are the buffers, in order."""
        return self.kinds == [Fresh(index) for index in range(len(self.likes))]

    @property
    def replaced(self) -> set[int]:
        """The addresses of the memory in place of which replays bring buffers."""
        kinds = self._buffers.values()
        memories = [kind.memory if isinstance(kind, InPlace) else kind.target.untyped_storage() for kind in kinds]
        return {memory.data_ptr() for memory in memories}

    def assembly(self) -> Callable[[Sequence[Any], Sequence[torch.Tensor]], list[Any]]:
        """A function from the inputs and buffers of a replay to its results. A training step has hundreds of results,
        of which most are buffers or stay where they are: these two kinds need no call in Python."""
        fixed = {i: kind.value for i, kind in enumerate(self.kinds) if is_pinned_tensor(kind)}
        whole = {i: kind.index for i, kind in enumerate(self.kinds) if isinstance(kind, Fresh) and kind.part is None}
        parts = {i: kind for i, kind in enumerate(self.kinds) if isinstance(kind, Placed)}
        others = {i: kind for i, kind in enumerate(self.kinds) if not (i in fixed or i in whole or i in parts)}
        # A value that is returned twice stays one tensor: autograd copies it, where two parameters have it as gradient.
        single = {(id(kind.memory), *kind.part): (kind.memory, *kind.part) for kind in parts.values()}
        found = {key: len(self.likes) + at for at, key in enumerate(single)}
        start = len(self.likes) + len(single)
        place = whole | {i: found[id(kind.memory), *kind.part] for i, kind in parts.items()}
        place |= {i: start + at for at, i in enumerate((*fixed, *others))}
        order, places, values = [place[i] for i in range(len(self.kinds))], list(single.values()), list(fixed.values())
        kinds: list[Any] = list(others.values())

        def results(inputs: Sequence[Any], fresh: Sequence[torch.Tensor]) -> list[Any]:
            placed, kept = starmap(PLACED, places), map(_DETACHED, values)
            made = [*fresh, *placed, *kept, *[kind.result(inputs, fresh) for kind in kinds]]
            return [made[index] for index in order]

        return results

    def _buffer(self, name: str, like: Like, kind: InPlace | Copied) -> int:
        self._buffers[name] = kind
        self.likes.append(like)
        return len(self.likes) - 1

    def _in_place(self, group: Mapping[int, torch.Tensor]) -> dict[int, Result] | None:
        """Let kernels write results that share memory into one buffer; None if they have to be copied."""
        owners = {self._uses.get(self._names[position]) for position in group}
        use, first = owners.pop(), next(iter(group.values()))
        memory = first.untyped_storage()
        length = memory.nbytes() // first.element_size()
        if owners or use is None or any(result.dtype != first.dtype for result in group.values()):
            return None
        if not is_worth(len(use.launches), memory.nbytes()) or length > 2 * sum(
            result.numel() for result in group.values()
        ):
            return None
        whole = len(group) == 1 and aten.extent(first.shape, first.stride()) == length
        like = _like(first) if whole else ((length,), (1,), first.dtype)
        index = self._buffer(use.owner, like, InPlace(memory, use.launches))
        return {position: Fresh(index, None if whole else _part(result)) for position, result in group.items()}

    def _copied(self, group: Mapping[int, torch.Tensor]) -> dict[int, Result]:
        """Capture the copy of results that share memory to one buffer, with what lies between their elements. A single
        result of which that is most is copied after the launch."""
        position, first = next(iter(group.items()))
        start, end = (byte // first.element_size() for byte in span_of([*group.values()]))
        if len(group) == 1 and not 0 < end - start <= 2 * first.numel():
            return {position: Late(first)}
        source = first.as_strided((end - start,), (1,), start)
        target = self._empty(*_like(source)).copy_(source)
        like = _like(first if len(group) == 1 else source)
        index = self._buffer(f"_{position}", like, Copied(source, target))
        return {at: Fresh(index, None if len(group) == 1 else _part(r, start)) for at, r in group.items()}

    def slots(self, nodes: GraphNodes) -> dict[str, Slots | None]:
        """By name, where a replay sets the address of each buffer; None if kernels got another pointer."""
        return {name: _slots(kind, nodes, 1) for name, kind in self._buffers.items()}


def is_pinned_tensor(kind: Result) -> TypeGuard[Pinned]:
    """The result is a tensor that stays where it is."""
    return isinstance(kind, Pinned) and isinstance(kind.value, torch.Tensor)


def _slots(kind: InPlace | Copied, nodes: GraphNodes, side: int) -> Slots | None:
    """The slots of an input (`side` 0: the source of a copy) or of a buffer (1: its target)."""
    if isinstance(kind, InPlace):
        return nodes.kernels(kind.memory, kind.launches)
    return nodes.copy(kind.source, kind.target)[side]


def _placed(result: Any, block: Block | None, own: Mapping[int, torch.Tensor]) -> Placed | None:
    if block is None or not isinstance(result, torch.Tensor):
        return None
    handle = result.untyped_storage()._cdata
    memory = block.view(result.dtype) if handle == block.storage._cdata else own.get(handle)
    return None if memory is None or memory.dtype != result.dtype else Placed(memory, _part(result))


def _kept(name: str, result: Any, inputs: Inputs, pinned: Collection[int], static: bool) -> Result | None:
    """The kind of a result that is no new tensor; None if each replay has to make one."""
    if name in inputs.names:
        return Alias(inputs.names.index(name))
    if not isinstance(result, torch.Tensor):
        return Pinned(result)
    storage = result.untyped_storage().data_ptr()
    if storage in inputs.stand_ins and storage not in pinned:
        index = inputs.stand_ins[storage]
        own = inputs.tensors[index]
        return View(index, inputs.names[index], own.stride(), _start(result) - _start(own), _like(result))
    if storage in pinned:
        return Pinned(result)
    # Not the result itself: if autograd takes it for a view, it holds others.
    return Pinned(PLACED(result, tuple(result.shape), result.stride(), 0)) if static else None


def pinned_memory(kinds: Iterable[Result]) -> dict[int, torch.UntypedStorage]:
    """By address, the memory of results that stay where they are; empty tensors have none."""
    values = [kind.value for kind in kinds if is_pinned_tensor(kind)]
    return {value.untyped_storage().data_ptr(): value.untyped_storage() for value in values if value.numel()}


def _like(tensor: torch.Tensor) -> Like:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _part(tensor: torch.Tensor, start: int = 0) -> tuple[tuple[int, ...], Strides, int]:
    """`tensor` in a buffer that begins with the element `start` of its memory."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start


def _start(tensor: torch.Tensor) -> int:
    """Bytes from the beginning of a tensor's memory to its first element."""
    return int(tensor.storage_offset()) * tensor.element_size()
