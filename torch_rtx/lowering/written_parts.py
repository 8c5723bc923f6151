"""The part of a tensor that updates of its views replace, at positions given by numbers.

A capture has `cache[row, :, first:last] = x` as an update of a view inside of an update of the tensor: together they
replace the elements at some positions of each dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch_rtx.ir import MAIN, Dim, Loc, Node, Sym, TensorType, Type, Value
from torch_rtx.lowering.rewrite import Rewriter

# Updates at positions given by numbers, with the views that read there.
SLICE, SELECT = "aten.slice_scatter.default", "aten.select_scatter.default"
VIEWS = {SLICE: "aten.slice.Tensor", SELECT: "aten.select.int"}
# PyTorch has no `index_copy_` for dtypes of `FLOAT8`, but `index_put_`; for those of `COPIED`, neither.
FLOAT8 = frozenset(("f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz"))
COPIED = frozenset(("u16", "u32", "u64", "f8e8m0fnu", "f4e2m1fn_x2"))


@dataclass(frozen=True)
class Range:
    """The positions start, start + step, ..., `count` of them."""

    start: Dim
    step: int
    count: Dim


@dataclass(frozen=True)
class Part:
    """What an update replaces.

    Attributes:
        source: what it puts there.
        places: the positions along each dimension of the tensor; None: all.
        dropped: the dimensions, of one position, that `source` does not have.
    """

    source: Value
    places: tuple[Range | None, ...]
    dropped: frozenset[int] = frozenset()


def part_of(node: Node, source_of: Callable[[Node], Value], inside: Callable[[Node], Node | None]) -> Part | None:
    """The part that `node` replaces of its argument `self`; None if index tensors can't express it.

    Args:
        source_of: the values that an update writes.
        inside: the update that makes these values, of the view that `node` replaces, if nothing else needs its result.
    """
    type_ = _tensor_type(node.arg("self"))
    if not type_.shape or type_.device != MAIN or type_.dtype in COPIED:
        return None
    dim = int(node.arg("dim", 0)) % len(type_.shape)  # type: ignore[arg-type]
    places: list[Range | None] = [None] * len(type_.shape)
    own = _range(node, type_.shape[dim], dim)
    if own is None or _tensor_type(node.arg("src")).dtype != type_.dtype:
        return None
    places[dim], dropped = own, frozenset((dim,) * (node.op == SELECT))
    nested = inside(node)
    found = None if nested is None else part_of(nested, source_of, inside)
    kept = [axis for axis in range(len(places)) if axis not in dropped]
    joined = None if found is None else _joined(places, found.places, kept)
    if found is None or joined is None:
        return Part(source_of(node), tuple(places), dropped)
    return Part(found.source, joined, dropped | {kept[axis] for axis in found.dropped})


def _range(node: Node, size: Dim, dim: int) -> Range | None:
    """The positions of a SLICE or SELECT."""
    first, step = node.arg("index" if node.op == SELECT else "start") or 0, node.arg("step", 1)
    count = 1 if node.op == SELECT else _tensor_type(node.arg("src")).shape[dim]
    assert isinstance(step, int)
    if isinstance(first, int) and isinstance(size, int):
        return Range(min(max(first + size, 0) if first < 0 else first, size), step, count)
    if isinstance(first, Sym) and first.min >= 0 and step == 1:
        return Range(first, 1, count)  # the size of `src` bounds the range
    return None


def _joined(
    outer: list[Range | None], inner: tuple[Range | None, ...], kept: list[int]
) -> tuple[Range | None, ...] | None:
    """The positions in a tensor of those in its view, which has the dimensions `kept`."""
    found = list(outer)
    for axis, place in zip(kept, inner, strict=True):
        own = found[axis]
        if place is None or own is None:
            found[axis] = own if place is None else place
        elif isinstance(own.start, int) and isinstance(place.start, int):
            found[axis] = Range(own.start + own.step * place.start, own.step * place.step, place.count)
        else:
            return None
    return tuple(found)


def update_of(node: Node, part: Part, rewriter: Rewriter) -> Node:
    """The update in place of the argument `self` of `node`, with the result of `node`."""
    source, old = part.source, node.arg("self")
    for axis in sorted(part.dropped):
        source = rewriter.emit("aten.unsqueeze.default", node.loc, self=source, dim=axis)
    axes = [axis for axis, place in enumerate(part.places) if place is not None]
    first, last = axes[0], axes[-1]
    sizes = _tensor_type(old).shape
    places = [place or Range(0, 1, size) for place, size in zip(part.places, sizes, strict=True)][first : last + 1]
    indices = [_index(place, node.loc, rewriter) for place in places]
    if len(indices) == 1 and _tensor_type(old).dtype not in FLOAT8:
        args = ("self", old), ("dim", first), ("index", indices[0]), ("source", source)
        return replace(node, op="aten.index_copy_.default", args=args)
    for at, index in enumerate(indices):
        for _ in indices[at + 1 :]:
            index = rewriter.emit("aten.unsqueeze.default", node.loc, self=index, dim=-1)
        indices[at] = index
    given = ("self", old), ("indices", (*(None,) * first, *indices)), ("values", source)
    return replace(node, op="aten.index_put_.default", args=given)


def _index(place: Range, loc: Loc | None, rewriter: Rewriter) -> Value:
    """The positions of a range as a tensor."""
    types: tuple[Type, ...] = (TensorType("i64", (place.count,), (1,)),)
    if isinstance(place.start, int) and isinstance(place.count, int):
        end = place.start + place.count * place.step
        start, step = place.start, place.step
        return rewriter.emit("aten.arange.start_step", loc, types, start=start, end=end, step=step, device=MAIN)
    index = rewriter.emit("aten.arange.default", loc, types, end=place.count, device=MAIN)
    return index if place.start == 0 else rewriter.emit("aten.add.Tensor", loc, types, self=index, other=place.start)


def _tensor_type(attr: object) -> TensorType:
    assert isinstance(attr, Value)
    assert isinstance(attr.type, TensorType)
    return attr.type
