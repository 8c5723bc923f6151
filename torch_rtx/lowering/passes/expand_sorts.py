"""Writes sorting and selection of short rows out as comparisons, so that they become part of the loops around them.

    sort          an element's place is the number of elements before it; it is put there. Of integers of which few
                  differ, as of the experts of tokens, these are counted: a running sum for each integer
    topk          the largest element, then the largest of the others, ...; of many, or the smallest, the first ones of
                  a sorted row
    histc         of whole numbers: how many elements are equal to each
    bucketize     the number of boundaries below an element

Libraries sort by several kernels, which for the rows of a router of experts take longer than all else between two
products. Comparing each element with each takes the square of a row's length, so that other long rows remain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch_rtx.dtypes import DTYPES, FLOAT, INT, lowest
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.kernels.rows import PERSISTENT
from torch_rtx.lowering.ranges import Ranges
from torch_rtx.lowering.rewrite import Rewriter, rewrite

MAX_COMPARED = 1 << 23  # pairs of elements: each row is read once for each of its elements
MAX_SELECTED = 16  # elements of a row: each takes two reductions
MAX_BOUNDARIES = 64
MAX_VALUES, FEWER = (
    512,
    8,
)  # different integers of a row that are counted, and elements for each: else these are compared


def expand_sorts(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    shared: dict[object, Value] = {}  # what depends on sizes alone, which all layers of a model need
    ranges = Ranges(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        rule = RULES.get(node.op)
        if rule is None:
            return False
        known = dict(shared)
        if not rewriter.expand(node, lambda: rule(Calls(node, rewriter, known, ranges))):
            return False
        shared.update(known)
        return True

    return rewrite(graph, infer, visit)


@dataclass(frozen=True)
class Calls:
    """Emits calls in place of `node`. `shared` has the results of calls that other nodes need, too; `ranges` is what is
    known of elements."""

    node: Node
    rewriter: Rewriter
    shared: dict[object, Value]
    ranges: Ranges

    def call(self, op: str, /, **args: Attr) -> Value:
        """A call with inferred types."""
        return self.rewriter.emit(f"aten.{op}", self.node.loc, **args)

    def operand(self, name: str) -> tuple[Value, TensorType]:
        """A tensor argument, on the GPU, of numbers that kernels compare."""
        value = self.rewriter.current(argument(self.node, name))
        type_ = type_of(value) if isinstance(value, Value) else None
        if not isinstance(value, Value) or type_ is None or type_.device != MAIN:
            raise Unsupported("a tensor elsewhere")
        dtype = DTYPES[type_.dtype]
        if dtype.kind not in (INT, FLOAT) or dtype.packing or not dtype.register or not type_.shape:
            raise Unsupported(f"comparisons of {type_.dtype}")
        return value, type_

    def either(self, *conditions: Value) -> Value:
        """Whether one of the conditions holds."""
        return reduce(lambda one, two: self.call("bitwise_or.Tensor", self=one, other=two), conditions)

    def both(self, *conditions: Value) -> Value:
        """Whether all conditions hold."""
        return reduce(lambda one, two: self.call("bitwise_and.Tensor", self=one, other=two), conditions)

    def negated(self, condition: Value) -> Value:
        """Whether a condition does not hold."""
        return self.call("logical_not.default", self=condition)

    def places(self, count: int, rank: int, axis: int, dtype: str = "i64") -> Value:
        """0, 1, ... along an axis."""
        key = count, rank, axis, dtype
        if key not in self.shared:
            row = self.call("arange.default", end=count, dtype=dtype, device=MAIN)
            size = tuple(count if at == axis else 1 for at in range(rank))
            self.shared[key] = self.call("view.default", self=row, size=size)
        return self.shared[key]

    def earlier(self, count: int, rank: int, axis: int) -> Value:
        """Whether the place along the next axis is before that along an axis."""
        key = "earlier", count, rank, axis
        if key not in self.shared:
            places = [self.places(count, rank, at, "i32") for at in (axis + 1, axis)]
            self.shared[key] = self.call("lt.Tensor", self=places[0], other=places[1])
        return self.shared[key]

    def less(self, one: Value, two: Value) -> Value:
        """Whether one element comes before another: NaN is the largest."""
        found = self.call("lt.Tensor", self=one, other=two)
        if DTYPES[type_of(one).dtype].kind != FLOAT:
            return found
        nan = [self.call("isnan.default", self=x) for x in (one, two)]
        return self.either(found, self.both(nan[1], self.negated(nan[0])))

    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in a dtype."""
        return value if type_of(value).dtype == dtype else self.call("_to_copy.default", self=value, dtype=dtype)


def _row(calls: Calls, type_: TensorType, per_row: int | None = None) -> tuple[int, int]:
    """The axis that a call sorts, and its size, of which `per_row` (default: all) are compared with each other.

    Raises:
        Unsupported: comparing takes too long.
    """
    dim = calls.node.arg("dim", -1)
    assert isinstance(dim, int)
    axis = dim % len(type_.shape)
    count = type_.shape[axis]
    if not isinstance(count, int) or not 0 < count <= PERSISTENT:
        raise Unsupported("long rows")
    if typical(dim_expr("*", *type_.shape)) * (count if per_row is None else per_row) > MAX_COMPARED:
        raise Unsupported("too many comparisons")
    return axis, count


def _sorted(calls: Calls) -> tuple[Value, ...]:
    """`sort`: equal elements stay in order."""
    value, _ = calls.operand("self")
    axis, order = _order(calls, calls.node.arg("descending", False) is True)
    return calls.call("gather.default", self=value, dim=axis, index=order), order


def _order(calls: Calls, descending: bool) -> tuple[int, Value]:
    """The axis that a call sorts, and the positions of the elements along it in the order of these.

    Raises:
        Unsupported: that takes too long.
    """
    value, type_ = calls.operand("self")
    try:
        axis, place = _by_counting(calls, value, descending)
    except Unsupported:
        axis, place = _by_comparing(calls, value, type_, descending)
    zeros = calls.call("full.default", size=type_.shape, fill_value=0, dtype="i64", device=MAIN)
    places = calls.places(type_.shape[axis], len(type_.shape), axis)  # type: ignore[arg-type]  # it is a number
    positions = calls.call("expand.default", self=places, size=type_.shape)
    return axis, calls.call("scatter.src", self=zeros, dim=axis, index=place, src=positions)


def few_integers(calls: Calls) -> tuple[int, int, int]:
    """Of the operand, a row of integers of which few differ: the least, the greatest, and how many elements it has.

    Raises:
        Unsupported: there may be many different ones, or any number of elements.
    """
    (_, type_), (low, high, whole) = calls.operand("self"), calls.ranges.of(calls.node.arg("self"))
    if not whole or DTYPES[type_.dtype].kind != INT or len(type_.shape) != 1 or not high - low < MAX_VALUES:
        raise Unsupported("integers of which many differ")
    (count,) = type_.shape
    if not isinstance(count, int):
        raise Unsupported("a row of any length")
    return int(low), int(high), count


def _by_counting(calls: Calls, value: Value, descending: bool) -> tuple[int, Value]:
    """The axis, and the place of each element along it, for a row of integers of which few differ: how many are
    smaller, and how many equal ones come before.

    Raises:
        Unsupported: there may be many different ones.
    """
    low, high, count = few_integers(calls)
    values = high - low + 1
    if not FEWER * values <= count <= MAX_COMPARED // values:
        raise Unsupported("a row that is short or very long")
    if descending:
        number = calls.call("rsub.Scalar", self=value, other=high)
    else:
        number = calls.call("sub.Scalar", self=value, other=low)
    number = calls.cast(number, "i64")
    is_own = calls.call("eq.Tensor", self=number, other=calls.places(values, 2, 0))
    running = calls.call("cumsum.default", self=is_own, dim=1, dtype="i32")
    totals = calls.call("select.int", self=running, dim=1, index=count - 1)
    smaller = calls.call("sub.Tensor", self=calls.call("cumsum.default", self=totals, dim=0, dtype="i32"), other=totals)
    row = calls.call("unsqueeze.default", self=number, dim=0)
    own = calls.call("squeeze.dim", self=calls.call("gather.default", self=running, dim=0, index=row), dim=0)
    below = calls.call("index_select.default", self=smaller, dim=0, index=number)
    place = calls.call("sub.Scalar", self=calls.call("add.Tensor", self=own, other=below), other=1)
    return 0, calls.cast(place, "i64")


def _by_comparing(calls: Calls, value: Value, type_: TensorType, descending: bool) -> tuple[int, Value]:
    """The same for short rows: how many elements come before each.

    Raises:
        Unsupported: see `_row`.
    """
    axis, count = _row(calls, type_)
    own, other = (calls.call("unsqueeze.default", self=value, dim=at) for at in (axis + 1, axis))
    earlier = calls.earlier(count, len(type_.shape) + 1, axis)
    first, second = (own, other) if descending else (other, own)
    before, after = calls.less(first, second), calls.less(second, first)
    counted = calls.either(before, calls.both(calls.negated(after), earlier))
    return axis, calls.call("sum.dim_IntList", self=counted, dim=(axis + 1,))


def _largest(calls: Calls) -> tuple[Value, ...]:
    """`topk`, of equal elements the first."""
    value, type_ = calls.operand("self")
    wanted, largest = calls.node.arg("k"), calls.node.arg("largest", True) is True
    if not isinstance(wanted, int) or wanted <= 0:
        raise Unsupported("who knows how many elements")
    if wanted > MAX_SELECTED or not largest:
        axis, order = _order(calls, largest)
        first = calls.call("slice.Tensor", self=order, dim=axis, start=0, end=wanted)
        order = calls.call("clone.default", self=first, memory_format="contiguous_format")
        return calls.call("gather.default", self=value, dim=axis, index=order), order
    axis, count = _row(calls, type_, per_row=1)
    if wanted > count:
        raise Unsupported("more elements than there are")
    is_float = DTYPES[type_.dtype].kind == FLOAT
    places = calls.places(count, len(type_.shape), axis, "i32")
    everywhere = calls.call("expand.default", self=places, size=type_.shape)
    unknown = calls.call("isnan.default", self=value) if is_float else None
    taken: Value | None = None
    values, positions = list[Value](), list[Value]()
    for _ in range(wanted):
        left = value
        if taken is not None:
            left = calls.call("masked_fill.Scalar", self=value, mask=taken, value=lowest(type_.dtype))
        best = calls.call("amax.default", self=left, dim=(axis,), keepdim=True)
        here = calls.call("eq.Tensor", self=value, other=best)
        here = here if unknown is None else calls.either(here, unknown)
        here = here if taken is None else calls.both(here, calls.negated(taken))
        found = calls.call("masked_fill.Scalar", self=everywhere, mask=calls.negated(here), value=count)
        position = calls.call("amin.default", self=found, dim=(axis,), keepdim=True)
        now = calls.call("eq.Tensor", self=places, other=position)
        taken = now if taken is None else calls.either(taken, now)
        values.append(best)
        positions.append(position)
    both = (calls.call("cat.default", tensors=tuple(parts), dim=axis) for parts in (values, positions))
    selected, order = both
    return selected, calls.cast(order, "i64")


def _counts(calls: Calls) -> tuple[Value, ...]:
    """`histc` of integers, with a bin for each."""
    value, type_ = calls.operand("self")
    bins, low, high = (calls.node.arg(name, default) for name, default in (("bins", 100), ("min", 0), ("max", 0)))
    sizes = isinstance(bins, int) and all(isinstance(end, int | float) and end == int(end) for end in (low, high))
    if not sizes or DTYPES[type_.dtype].kind != INT or type_.strides != contiguous(type_.shape):
        raise Unsupported("bins of floats")
    assert isinstance(bins, int)
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    count = dim_expr("*", *type_.shape)
    if high - low + 1 != bins or bins < 2 or bins * typical(count) > MAX_COMPARED:
        raise Unsupported("other bins")
    wide: tuple[Dim, ...] = (1, count)
    edges = calls.call("arange.start", start=int(low), end=int(high) + 1, dtype=type_.dtype, device=MAIN)
    edges = calls.call("view.default", self=edges, size=(bins, 1))
    equal = calls.call("eq.Tensor", self=calls.call("view.default", self=value, size=wide), other=edges)
    return (calls.call("sum.dim_IntList", self=equal, dim=(1,), dtype=type_.dtype),)


def _below(calls: Calls, boundaries: str) -> tuple[Value, ...]:
    """`bucketize`, and `searchsorted` of one row; NaN is above all boundaries."""
    (value, type_), (edges, row) = calls.operand("self"), calls.operand(boundaries)
    right = calls.node.arg("right", False) is True or calls.node.arg("side") == "right"
    count = row.shape[0]
    if len(row.shape) != 1 or not isinstance(count, int) or not 0 < count <= MAX_BOUNDARIES:
        raise Unsupported("many boundaries")
    if calls.node.arg("sorter") is not None or typical(dim_expr("*", *type_.shape)) * count > MAX_COMPARED:
        raise Unsupported("boundaries in another order, or many elements")
    own = calls.call("unsqueeze.default", self=value, dim=-1)
    above = calls.negated(calls.call("gt.Tensor" if right else "ge.Tensor", self=edges, other=own))
    total = calls.call("sum.dim_IntList", self=above, dim=(len(type_.shape),))
    return (calls.cast(total, "i32" if calls.node.arg("out_int32", False) else "i64"),)


RULES: dict[str, Callable[[Calls], tuple[Value, ...]]] = {
    "aten.sort.default": _sorted,
    "aten.sort.stable": _sorted,
    "aten.topk.default": _largest,
    "aten.histc.default": _counts,
    "aten.bucketize.Tensor": lambda calls: _below(calls, "boundaries"),
    "aten.searchsorted.Tensor": lambda calls: _below(calls, "sorted_sequence"),
}
