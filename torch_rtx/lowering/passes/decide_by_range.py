"""Removes what is known of integers before they are: comparisons with numbers out of their range, clamps to it, and the
choices and fills by such comparisons. Mixtures of experts so mask rows of experts of other GPUs, also where all are on
one."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.ranges import Ranges
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite

ORDERS: dict[str, Callable[[float, float], bool]] = {
    f"aten.{name}.{overload}": getattr(operator, name)
    for name in ("lt", "le", "gt", "ge", "eq", "ne")
    for overload in ("Scalar", "Tensor")
}
CLAMPS = ("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
FILLS = ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")


def decide_by_range(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; comparisons that nothing reads any more are left to `dce`."""
    ranges, kept = Ranges(graph), escaping(graph)
    decided: dict[str, bool] = {}  # by name, what all elements of a condition are

    def visit(node: Node, rewriter: Rewriter) -> bool:
        out, source = node.outputs[0] if len(node.outputs) == 1 else None, node.arg("self")
        if out is None:
            return False
        if node.op in ORDERS:
            found = _compared(ORDERS[node.op], source, node.arg("other"), ranges)
            if found is not None:
                decided[out.name] = found
            return False
        if isinstance(source, Value) and source.name in decided and aten.is_view(aten.overload(node.op)):
            decided[out.name] = decided[source.name]
            return False
        by: Attr = None
        fills_nothing = node.op in FILLS and _decided(node.arg("mask"), decided) is False
        if fills_nothing or (node.op in CLAMPS and _clamps_nothing(node, ranges)):
            by = source
        elif node.op == "aten.where.self" and (holds := _decided(node.arg("condition"), decided)) is not None:
            by = source if holds else node.arg("other")
        if not isinstance(by, Value) or by.type != out.type or out.name in kept:
            return False
        rewriter.replace(out, rewriter.current(by))
        return True

    return rewrite(graph, infer, visit)


def _decided(condition: Attr, decided: dict[str, bool]) -> bool | None:
    return decided.get(condition.name) if isinstance(condition, Value) else None


def _is_integer(attr: Attr) -> bool:
    return isinstance(attr, Value) and isinstance(attr.type, TensorType) and DTYPES[attr.type.dtype].kind == INT


def _compared(holds: Callable[[float, float], bool], one: Attr, two: Attr, ranges: Ranges) -> bool | None:
    """Whether a comparison holds for all elements, or for none; None: that is not known."""
    if not _is_integer(one) or isinstance(two, bool) or not (_is_integer(two) or isinstance(two, int | float)):
        return None
    (low, high, _), (least, most, _) = ranges.of(one), ranges.of(two)
    if high < least or low > most or low == high == least == most:
        return holds(low, least)
    if holds is operator.le or holds is operator.lt:
        closed = holds is operator.le
        if high == least and closed:
            return True
        return False if low == most and not closed else None
    if holds is operator.ge or holds is operator.gt:
        closed = holds is operator.ge
        if low == most and closed:
            return True
        return False if high == least and not closed else None
    return None


def _clamps_nothing(node: Node, ranges: Ranges) -> bool:
    """Whether all elements are within the limits."""
    if not _is_integer(node.arg("self")):
        return False
    low, high, _ = ranges.of(node.arg("self"))
    least, most = node.arg("min"), node.arg("max")
    numbers = all(limit is None or isinstance(limit, int) for limit in (least, most))
    return numbers and (least is None or least <= low) and (most is None or high <= most)  # type: ignore[operator]
