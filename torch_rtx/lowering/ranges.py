"""What a graph says of the elements of its tensors: bounds, and whether they are whole numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.dtypes import BOOL, DTYPES, FLOAT, INT, highest, lowest
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.constants import Constants

MAX_CONSTANT = 1 << 16  # elements of a constant that is looked at
MAX_DEPTH = 64  # calls that are looked at before one, such as those of a chain of residual sums


class Range(NamedTuple):
    """Every element is NaN, or at least `low` and at most `high`; `whole`: and an integer."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def within(self, other: Range) -> Range:
        """What is also known by `other`."""
        return Range(max(self.low, other.low), min(self.high, other.high), self.whole or other.whole)


ANY = Range()


class Ranges:
    """The ranges of the values of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._constants = Constants(graph)
        self._known: dict[str, Range] = {}
        self._depth = 0

    def of(self, attr: Attr) -> Range:
        """What is known of a value, or of a number."""
        if isinstance(attr, int | float):
            return Range(attr, attr, float(attr).is_integer())
        if not isinstance(attr, Value) or not isinstance(attr.type, TensorType):
            return ANY
        if attr.name not in self._known:
            self._depth += 1
            made = self._made(attr, attr.type.dtype) if self._depth < MAX_DEPTH else ANY
            self._depth -= 1
            self._known[attr.name] = _held(attr.type.dtype).within(made)
        return self._known[attr.name]

    def _made(self, value: Value, dtype: str) -> Range:
        node = self._constants.producer.get(value.name)
        if node is None or node.kind != "op":
            return ANY
        constant = self._constants.find(value) if not node.inputs or node.op.startswith("aten.lift") else None
        if constant is not None and 0 < constant.numel() <= MAX_CONSTANT and not constant.is_complex():
            low, high = (float(found) for found in constant.double().aminmax())
            return Range(low, high, bool((constant.double().round() == constant).all()))
        if value == node.outputs[-1] and node.op in _POSITIONS:
            return _positions(node)
        rule = _RULES.get(node.op) or (_all if _keeps(node.op) else None)
        if rule is None or (node.outputs[0] != value and not aten.is_view(aten.overload(node.op))):
            return ANY
        found = rule(self, node)
        if DTYPES[dtype].kind in (INT, BOOL):  # what does not fit wraps around, and casts drop fractions
            held, found = _held(dtype), Range(_floor(found.low), -_floor(-found.high), True)
            return found if held.low <= found.low and found.high <= held.high else ANY
        # Sums and casts round, which keeps the order of numbers, and whole numbers whole.
        return Range(_rounded(found.low, dtype), _rounded(found.high, dtype), found.whole)


def _held(dtype: str) -> Range:
    """What a dtype says of its elements."""
    kind = DTYPES[dtype].kind
    if kind == BOOL:
        return Range(0, 1, True)
    return Range(lowest(dtype), highest(dtype), True) if kind == INT else ANY


def _rounded(number: float, dtype: str) -> float:
    if DTYPES[dtype].kind != FLOAT or not math.isfinite(number) or dtype not in aten.DTYPES:
        return number
    return float(torch.tensor(number, dtype=torch.float64).to(aten.DTYPES[dtype]))


def _floor(number: float) -> float:
    return float(math.floor(number)) if math.isfinite(number) else number


def _keeps(name: str) -> bool:
    """Whether each element of the result is an element of an operand."""
    view = aten.is_view(aten.overload(name)) and name != "aten.view.dtype" and "view_as" not in name
    return name in _SELECTING or view


_SELECTING = frozenset(
    f"aten.{name}.default"
    for name in (
        *("clone", "_unsafe_view", "cat", "stack", "lift", "lift_fresh_copy", "amax", "amin"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
    )
)


_POSITIONS = frozenset(  # calls whose last result is positions along a dimension
    f"aten.{name}" for name in ("topk.default", "sort.default", "sort.stable", "max.dim", "min.dim")
)


_OF_SELF = (  # calls whose first result is elements of the operand `self`
    *("_to_copy.default", "sort.default", "sort.stable", "topk.default", "max.dim", "min.dim"),
    *("gather.default", "index_select.default", "index.Tensor"),
)


def _positions(node: Node) -> Range:
    source = node.arg("self")
    assert isinstance(source, Value)
    assert isinstance(source.type, TensorType)
    dim = node.arg("dim", -1)
    size = source.type.shape[dim] if source.type.shape and isinstance(dim, int) else 1
    return Range(0, size - 1 if isinstance(size, int) else math.inf, True)


def _all(ranges: Ranges, node: Node) -> Range:
    """The range of the elements of all operands."""
    found = [ranges.of(value) for value in node.inputs]
    return Range(min(r.low for r in found), max(r.high for r in found), all(r.whole for r in found))


def _round(ranges: Ranges, node: Node) -> Range:
    """Rounding to whole numbers, in any direction."""
    low, high, _ = ranges.of(node.arg("self"))
    if node.op == "aten.round.default":
        low, high = (float(round(number)) if math.isfinite(number) else number for number in (low, high))
        return Range(low, high, True)
    return Range(_floor(low), -_floor(-high), True)


def _clamped(least: str, most: str) -> Callable[[Ranges, Node], Range]:
    """Limits that are the arguments of these names; None: no limit."""

    def rule(ranges: Ranges, node: Node) -> Range:
        low, high, whole = ranges.of(node.arg("self"))
        if (limit := node.arg(least)) is not None:
            limits = ranges.of(limit)
            low, high, whole = max(low, limits.low), max(high, limits.high), whole and limits.whole
        if (limit := node.arg(most)) is not None:
            limits = ranges.of(limit)
            low, high, whole = min(low, limits.low), min(high, limits.high), whole and limits.whole
        return Range(low, high, whole)

    return rule


def _relu(ranges: Ranges, node: Node) -> Range:
    low, high, whole = ranges.of(node.arg("self"))
    return Range(max(low, 0.0), max(high, 0.0), whole)


def _negative(ranges: Ranges, node: Node) -> Range:
    low, high, whole = ranges.of(node.arg("self"))
    return Range(-high, -low, whole)


def _cast(ranges: Ranges, node: Node) -> Range:
    return ranges.of(node.arg("self"))


def _sum(sign: int) -> Callable[[Ranges, Node], Range]:
    def rule(ranges: Ranges, node: Node) -> Range:
        if node.arg("alpha", 1) != 1:
            return ANY
        one, two = ranges.of(node.arg("self")), ranges.of(node.arg("other"))
        low, high = (two.low, two.high) if sign > 0 else (-two.high, -two.low)
        return Range(one.low + low, one.high + high, one.whole and two.whole)

    return rule


_RULES: dict[str, Callable[[Ranges, Node], Range]] = {
    **dict.fromkeys((f"aten.{name}" for name in _OF_SELF), _cast),
    **dict.fromkeys((f"aten.{name}.default" for name in ("round", "floor", "ceil", "trunc")), _round),
    "aten.relu.default": _relu,
    "aten.neg.default": _negative,
    **dict.fromkeys(("aten.add.Tensor", "aten.add.Scalar"), _sum(1)),
    **dict.fromkeys(("aten.sub.Tensor", "aten.sub.Scalar"), _sum(-1)),
    **dict.fromkeys(("aten.clamp.default", "aten.clamp.Tensor"), _clamped("min", "max")),
    **dict.fromkeys(("aten.clamp_min.default", "aten.clamp_min.Tensor"), _clamped("min", "")),
    **dict.fromkeys(("aten.clamp_max.default", "aten.clamp_max.Tensor"), _clamped("", "max")),
    "aten.maximum.default": _clamped("other", ""),
    "aten.minimum.default": _clamped("", "other"),
}
