"""Sorts rows of integers of which few differ by counting, as the experts of tokens: one kernel has a program for each
integer, which finds where its elements go.

    ends      for each integer, how many elements are not greater
    place     of an element: those that are smaller, and equal ones up to it, less one
    order     the positions of the elements in sorted order: each is put at its place

What mixtures of experts compute of a sorted row is among these: the sum of its histogram up to each integer is `ends`,
and the inverse of the order is `place`. So no element is looked up, counted or sorted again, and products of groups of
rows know that no row is behind the last group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Attr, Graph, Node, Value
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.rows import PERSISTENT
from torch_rtx.lowering.passes.expand_sorts import MAX_COMPARED, Calls, few_integers
from torch_rtx.lowering.ranges import Ranges
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite
from torch_rtx.op_work import GROUPED_MM

SORTS = ("aten.sort.default", "aten.sort.stable")
CAST = "aten._to_copy.default"


def sort_by_counting(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    counting = _Counting(graph)
    return rewrite(graph, infer, counting.visit)


@dataclass(frozen=True)
class _Sorted:
    """A sorted row: the integers from `low` to `high`, and what was computed; `ends` are None if they descend."""

    low: int
    high: int
    order: Value
    place: Value
    ends: Value | None


class _Counting:
    """Visits the nodes of `graph`."""

    def __init__(self, graph: Graph) -> None:
        self._constants, self._ranges, self._kept = Constants(graph), Ranges(graph), escaping(graph)
        self._shared: dict[object, Value] = {}
        self._values: dict[str, _Sorted] = {}  # by the names of sorted elements, and of those before
        self._orders: dict[str, _Sorted] = {}
        self._ends: set[str] = set()  # names of values that are ends, in the new graph

    def visit(self, node: Node, rewriter: Rewriter) -> bool:
        """See `rewrite`."""
        if node.op in SORTS:
            return self._inverse_of(node, rewriter) or self._sorted(node, rewriter)
        if node.op == "aten.cumsum.default":
            return self._summed(node, rewriter)
        if node.op == "aten.index_put.default":
            indices = node.arg("indices")
            one = indices[0] if isinstance(indices, tuple) and len(indices) == 1 else None
            return not node.arg("accumulate", False) and self._is_inverse(node, one, "values", rewriter)
        if node.op == "aten.scatter.src":
            return self._is_inverse(node, node.arg("index"), "src", rewriter)
        return node.op == GROUPED_MM and self._grouped(node, rewriter)

    def _calls(self, node: Node, rewriter: Rewriter) -> Calls:
        return Calls(node, rewriter, self._shared, self._ranges)

    def _sorted(self, node: Node, rewriter: Rewriter) -> bool:
        """A sort of integers of which few differ."""
        made, before = list[_Sorted](), dict(self._shared)
        is_kept = node.outputs[1] is not None and node.outputs[1].name in self._kept

        def expand() -> tuple[Value, Value]:
            calls = self._calls(node, rewriter)
            found = _by_counting(calls)
            made.append(found)
            value, _ = calls.operand("self")
            order = calls.call("clone.default", self=found.order) if is_kept else found.order
            return calls.call("gather.default", self=value, dim=0, index=found.order), order

        if not rewriter.expand(node, expand):
            self._shared = before
            return False
        (found,) = made
        values, order = node.outputs
        names = [value.name for value in (values, argument(node, "self")) if value is not None]
        self._values |= dict.fromkeys(names, found)
        if order is not None:
            self._orders[order.name] = found
        if found.ends is not None:
            self._ends.add(found.ends.name)
        return True

    def _inverse_of(self, node: Node, rewriter: Rewriter) -> bool:
        """A sort of an order, as of `argsort` of it: the positions, and the inverse."""
        order, outputs = node.arg("self"), node.outputs
        found = self._orders.get(order.name) if isinstance(order, Value) else None
        if (
            found is None
            or node.arg("descending", False)
            or any(v is not None and v.name in self._kept for v in outputs)
        ):
            return False
        (count,) = type_of(found.place).shape
        assert isinstance(count, int)
        return rewriter.expand(node, lambda: (self._calls(node, rewriter).places(count, 1, 0), found.place))

    def _is_inverse(self, node: Node, order: Attr, name: str, rewriter: Rewriter) -> bool:
        """Positions that are put at those of an order."""
        (out,), found = node.outputs, self._orders.get(order.name) if isinstance(order, Value) else None
        if out is None or found is None or out.type != found.place.type or out.name in self._kept:
            return False
        positions, count = self._constants.find(node.arg(name)), type_of(found.place).shape[0]
        if positions is None or not isinstance(count, int) or not torch.equal(positions, torch.arange(count)):
            return False
        rewriter.replace(out, found.place)
        return True

    def _summed(self, node: Node, rewriter: Rewriter) -> bool:
        """The sum of a histogram up to each integer."""
        source, (out,) = node.arg("self"), node.outputs
        histogram = self._constants.producer.get(source.name) if isinstance(source, Value) else None
        if histogram is None or histogram.op != "aten.histc.default" or out is None or out.name in self._kept:
            return False
        counted = histogram.arg("self")
        while isinstance(counted, Value) and counted.name not in self._values:
            cast = self._constants.producer.get(counted.name)
            if cast is None or cast.op != CAST or not _is_exact(type_of(counted).dtype):
                return False
            counted = cast.arg("self")
        found = self._values[counted.name] if isinstance(counted, Value) else None
        bins = tuple(histogram.arg(name, default) for name, default in (("bins", 100), ("min", 0), ("max", 0)))
        if found is None or found.ends is None or bins != (found.high - found.low + 1, found.low, found.high):
            return False
        ends, calls = found.ends, self._calls(node, rewriter)

        def expand() -> Value:
            made = calls.cast(ends, type_of(out).dtype)
            self._ends.add(made.name)
            return made

        return rewriter.expand(node, expand)

    def _grouped(self, node: Node, rewriter: Rewriter) -> bool:
        """A product of groups that end where numbers of a row of as many elements as there are rows do."""
        ends = rewriter.current(argument(node, "offs"))
        if not isinstance(ends, Value) or ends.name not in self._ends or node.arg("whole", False):
            return False
        rewriter.keep(replace(node, args=(*node.args, ("whole", True))))
        return True


def _is_exact(dtype: str) -> bool:
    """Whether a cast of integers below MAX_VALUES keeps them; CPUs have histograms of floats alone."""
    return DTYPES[dtype].kind == INT or dtype in ("f32", "f64")


def _by_counting(calls: Calls) -> _Sorted:
    """The row of a sort.

    Raises:
        Unsupported: there may be many different integers, or too many.
    """
    value, type_ = calls.operand("self")
    low, high, count = few_integers(calls)
    values = high - low + 1
    if not 0 < count <= min(PERSISTENT, MAX_COMPARED // values):
        raise Unsupported("a long row")
    is_down = calls.node.arg("descending", False) is True
    first, last, step = (high, low - 1, -1) if is_down else (low, high + 1, 1)
    row = calls.call("unsqueeze.default", self=value, dim=0)
    edges = calls.call("arange.start_step", start=first, end=last, step=step, dtype=type_.dtype, device=MAIN)
    edges = calls.call("view.default", self=edges, size=(values, 1))
    own = calls.call("eq.Tensor", self=row, other=edges)
    upto = calls.call("ge.Tensor" if is_down else "le.Tensor", self=row, other=edges)
    ends = calls.call("sum.dim_IntList", self=upto, dim=(1,), dtype="i32")
    equal = calls.call("sum.dim_IntList", self=own, dim=(1,), dtype="i32")
    smaller = calls.call("unsqueeze.default", self=calls.call("sub.Tensor", self=ends, other=equal), dim=1)
    running = calls.call("cumsum.default", self=own, dim=1, dtype="i32")
    after = calls.call("add.Tensor", self=running, other=smaller)
    place = calls.cast(calls.call("sub.Scalar", self=after, other=1), "i64")
    positions = calls.call("expand.default", self=calls.places(count, 2, 1), size=(values, count))
    behind, other = calls.call("add.Scalar", self=positions, other=count), calls.negated(own)

    def put(where: Value, what: Value) -> Value:
        """`what` of own elements at `where`. All others are 0 and go behind the row, each to a place of its own: many
        writes to one place would wait for each other."""
        room = calls.call("full.default", size=(2 * count,), fill_value=0, dtype="i64", device=MAIN)
        at = calls.call("where.self", condition=own, self=where, other=behind)
        given = calls.call("masked_fill.Scalar", self=what, mask=other, value=0)
        found = calls.call("index_put.default", self=room, indices=(at,), values=given)
        return calls.call("slice.Tensor", self=found, dim=0, start=0, end=count)

    return _Sorted(low, high, put(place, positions), put(positions, place), None if is_down else ends)
