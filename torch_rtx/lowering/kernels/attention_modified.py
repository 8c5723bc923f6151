"""What modifications make of the scores of `flex_attention`, as kernel IR that is inlined in a tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.lowering.kernels.emit import indent
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, variable, within
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Gather,
    Iota,
    Load,
    Position,
    Shape,
    Tensor,
    View,
    cast,
    expand,
)
from torch_rtx.lowering.kernels.region import Region, express
from torch_rtx.lowering.kernels.source import needs_int64
from torch_rtx.score_mods import INDEX, PLACES, buffer_index, modification, terms_of


@dataclass(frozen=True)
class Lists:
    """Lists of blocks: for each place (batch, head, block) how many there are, and which.

    Attributes:
        count: (B, H, blocks).
        indices: (B, H, blocks, places).
    """

    count: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Captured:
    """A number for each score that is added to the gradient of a captured tensor.

    Attributes:
        number: (B, H, M, N), in f32.
        target: the element that it is added to.
        offset: of the tensor in the memory of all gradients.
    """

    number: Tensor
    target: View | Gather
    offset: int


@dataclass(frozen=True)
class Modified:
    """What modifications make of the scores, by batch, head, query and key.

    Attributes:
        leaf: stands for the scaled scores.
        score: the modified ones; None: as they are.
        upstream: stands for the gradient of the modified scores.
        gradient: that of the scaled scores, in a backward; None: the same.
        lists: of the blocks that masks apply to, and of those that are seen as a whole; empty: there are no lists.
        size: the queries and keys of a block.
        per_head: lists differ from head to head.
        captured: what gradients of captured tensors are sums of.
    """

    leaf: Load
    score: Tensor | None
    upstream: Load
    gradient: Tensor | None
    lists: tuple[Lists, ...]
    size: tuple[int, int]
    per_head: bool
    captured: tuple[Captured, ...] = ()

    def is_one_block(self, queries: int) -> bool:
        """The queries of all heads have one list."""
        return not self.lists or (queries <= self.size[0] and not self.per_head)


def modified_of(region: Region, node: Node, rows: Sequence[Dim], keys: Dim) -> tuple[Tensor | None, Modified]:
    """The mask of a call, and what else becomes of its scores.

    Args:
        rows: batches, heads, and queries of each.

    Raises:
        Unsupported: a modification calls what kernels do not compute, or blocks are of an open size.
    """
    dims = (*rows, keys)
    shape = tuple(map(from_dim, dims))
    given = [region.values[value.name] for value in attr_values(node.arg("buffers"))]
    wide_index = needs_int64(region)
    leaf, upstream = (Load(shape, "f32", name, shape, anchor=True) for name in ("score", "g"))

    places = {name: _place(axis, shape) for axis, name in enumerate(PLACES)}
    leaves = {"score": leaf, "g": upstream, **places}  # the same for all texts, so that they share what they compute

    def inlined(name: str) -> Tensor | None:
        text = node.arg(name, "")
        assert isinstance(text, str)
        return _inlined(text, dims, leaves, given, wide_index) if text else None

    score, mask, gradient = (inlined(name) for name in ("score_mod", "mask_mod", "score_gradient"))
    found = [region.values[value.name] for value in attr_values(node.arg("blocks"))]
    size = node.arg("block_size", ())
    per_head = any(tensor.shape[1] != from_dim(1) for tensor in found)
    lists = tuple(
        Lists(_by_group(count, shape), _by_group(indices, shape))
        for count, indices in zip(found[::2], found[1::2], strict=True)
    )
    if lists and not (isinstance(size, tuple) and len(size) == 2 and all(isinstance(one, int) for one in size)):
        raise Unsupported("lists of blocks of an open size", loc=node.loc)
    sizes = (int(size[0]), int(size[1])) if lists else (0, 0)  # type: ignore[index, arg-type]
    floats = [None if one is None else cast(one, "f32") for one in (score, gradient)]
    captured = tuple(_captured(node, dims, leaves, given, wide_index))
    return mask, Modified(leaf, floats[0], upstream, floats[1], lists, sizes, per_head, captured)


def _captured(
    node: Node, dims: tuple[Dim, ...], leaves: Mapping[str, Tensor], given: Sequence[Tensor], wide_index: bool
) -> Iterator[Captured]:
    """The terms of a call that computes gradients of captured tensors."""
    given_terms = [node.arg(name, ()) for name in ("gradients", "sizes", "ranks", "targets")]
    if not given_terms[0]:
        return
    graph, terms = terms_of(*given_terms)  # type: ignore[arg-type]
    values, shape = _values(graph, dims, leaves, given, wide_index), tuple(map(from_dim, dims))
    for term in terms:
        sizes = tuple(map(constant, term.size))
        source = Load(sizes, "f32", "gradients", tuple(map(from_dim, contiguous(term.size))))
        target = _element(source, [values[one.name] for one in term.places], shape, wide_index)
        assert isinstance(target, View | Gather)
        yield Captured(expand(cast(values[term.number.name], "f32"), shape), target, term.offset)


def _by_group(tensor: Tensor, shape: Shape) -> Tensor:
    """`tensor` with its batches and heads repeated."""
    return expand(tensor, (*shape[:2], *tensor.shape[2:]))


def _inlined(
    text: str, dims: tuple[Dim, ...], leaves: Mapping[str, Tensor], given: Sequence[Tensor], wide_index: bool
) -> Tensor:
    graph = modification(text)
    (output,) = attr_values(graph.outputs)
    return expand(_values(graph, dims, leaves, given, wide_index)[output.name], tuple(map(from_dim, dims)))


def _values(
    graph: Graph, dims: tuple[Dim, ...], leaves: Mapping[str, Tensor], given: Sequence[Tensor], wide_index: bool
) -> dict[str, Tensor]:
    """Every value of a modification as kernel IR."""
    shape, values = tuple(map(from_dim, dims)), dict[str, Tensor]()
    for value in graph.inputs:
        which = buffer_index(value)
        values[value.name] = leaves[value.name] if which is None else given[which]
    for node in graph.nodes:
        (result,) = node.results
        assert isinstance(result.type, TensorType)
        if node.op == INDEX:
            source, *places = (values[value.name] for value in node.inputs)
            values[result.name] = _element(source, places, shape, wide_index)
            continue
        wide = Value(result.name, TensorType(result.type.dtype, dims, contiguous(dims)))
        values.update(express(replace(node, outputs=(wide,)), values))
    return values


def _element(source: Tensor, indices: Sequence[Tensor], shape: Shape, wide_index: bool) -> Tensor:
    """`source` at one place for each score. Places that are those of the score need no check."""
    unchecked: dict[int, Iota] = {}
    for axis, (one, size) in enumerate(zip(indices, source.shape, strict=True)):
        position = tuple(variable(f"i{along}", length) for along, length in enumerate(shape))
        if isinstance(one, Iota) and within(one.at(position), size):
            unchecked[axis] = one
    checked = [axis for axis in range(len(indices)) if axis not in unchecked]

    def at(position: Position, found: Position = ()) -> Position:
        places = dict(zip(checked, found, strict=True)) | {axis: one.at(position) for axis, one in unchecked.items()}
        return tuple(places[axis] for axis in range(len(indices)))

    if not checked:
        return View(shape, source.dtype, source, at)
    found = tuple(expand(cast(indices[axis], "i64" if wide_index else indices[axis].dtype), shape) for axis in checked)
    return Gather(shape, source.dtype, source, found, tuple(source.shape[axis] for axis in checked), at, wrap=True)


def _place(axis: int, shape: Shape) -> Tensor:
    return Iota(shape, "i32", lambda position: position[axis])


def element(tensor: Tensor, position: Position) -> str:
    """The text that loads one element, which may change in a loop.

    Raises:
        Unsupported: it is computed.
    """
    while isinstance(tensor, View):
        position, tensor = tensor.at(position), tensor.source
    if not isinstance(tensor, Load) or tensor.anchor:
        raise Unsupported("lists of blocks that a kernel computes")
    return f"tl.load({tensor.name} + ({linear(position, tensor.strides)}))"


class Walk:
    """A loop over the tiles of the blocks in a list.

    Args:
        place: batch and head.
        part: the block whose list it is.
        size: elements of a block.
        tile: elements of a tile, a divisor of `size`.
        every: all elements; a block behind them, which no list should have, becomes the last one.
        shares: a program goes over one of so many equal parts of the list, `share`; None: over all.
    """

    def __init__(
        self,
        lists: Lists,
        place: Position,
        part: Index,
        size: int,
        tile: int,
        every: Index,
        shares: int | None = None,
    ) -> None:
        if lists.indices.shape[-1] == ZERO:
            raise Unsupported("lists without places")
        self.lists, self.place = lists, (*place, part)
        self.size, self.tile, self.every, self.shares = size, tile, every, shares

    def lines(self, body: list[str]) -> list[str]:
        """The loop around the lines of a tile, which begins at `start`."""
        per, places = self.size // self.tile, self.lists.indices.shape[-1]
        begin = "block" if per == 1 else f"block + step % {per} * {self.tile}"
        after = "step + 1" if per == 1 else f"(step + 1) // {per}"
        lines = [f"count = tl.minimum({element(self.lists.count, self.place)}, {places})", "slot = 0"]
        if self.shares is not None:
            lines.append(f"begin = count * share // {self.shares}")
            lines += [
                f"count = count * (share + 1) // {self.shares} - begin",
                f"slot = tl.minimum(begin, {places} - 1)",
            ]
            after = f"begin + {after}"
        return [
            *lines,
            f"block = {self._block('slot')}",
            f"for step in range(0, count{'' if per == 1 else f' * {per}'}):",
            *indent(
                [
                    f"start = {begin}",
                    *body,
                    f"later = tl.minimum({after}, {places} - 1)",  # the next block is asked for before it is needed
                    f"block = {self._block('later')}",
                ]
            ),
        ]

    def _block(self, slot: str) -> str:
        last = (self.every - ONE) // constant(self.size)
        found = element(self.lists.indices, (*self.place, variable(slot)))
        return f"tl.minimum(tl.maximum({found}, 0), {last}) * {self.size}"
