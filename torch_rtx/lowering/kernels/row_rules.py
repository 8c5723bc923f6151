"""Reductions of rows as statistics: of each part of a row, of all parts, and what operators make of these; see
`row_parts`.

Parts have equal sizes, so that the mean of means is the mean, and the mean variance of the parts plus the variance of
their means is the variance (Chan, Golub and LeVeque, 1979): squares of a large mean are never subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.calls import Calls, type_of
from torch_rtx.lowering.kernels.product import argument

Dims = tuple[int, ...]


# ---- statistics: of a part, and of all parts -------------------------------------------------------------------------

Values = tuple[Value, ...]


class Statistic(NamedTuple):
    """What is known of a row: of each part of it, and of the whole of these. Dimensions that are reduced stay, with
    size 1."""

    partial: Callable[[Calls, Value, Dims], Values]
    total: Callable[[Calls, Values, Dims, int], Values]  # the last argument: the elements of a part


def _reduced(calls: Calls, op: str, value: Value, dims: Dims, dtype: str = "", **args: Attr) -> Value:
    return calls.call(op, _without(value, dims, dtype), **{"self": value, **args, "dim": dims, "keepdim": True})


def _without(value: Value, dims: Dims, dtype: str = "") -> TensorType:
    old = type_of(value)
    shape = tuple(1 if axis in dims else size for axis, size in enumerate(old.shape))
    return TensorType(dtype or old.dtype, shape, contiguous(shape))


def _again(op: str, **args: Attr) -> Statistic:
    """Of a reduction that parts can be put together by."""
    dtype = "bool" if op[:3] in ("any", "all") else ""

    def once(calls: Calls, value: Value, dims: Dims) -> Value:
        return _reduced(calls, op, value, dims, dtype, **args)

    return Statistic(
        lambda calls, value, dims: (once(calls, value, dims),),
        lambda calls, parts, dims, length: (once(calls, parts[0], dims),),
    )


def _variance_mean(calls: Calls, value: Value, dims: Dims) -> Values:
    types = [_without(value, dims)] * 2
    return calls.calls("var_mean.correction", types, self=value, dim=dims, correction=0, keepdim=True)


def _moments(calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    """Variance and mean of rows, from those of their parts."""
    variance, mean = parts
    between, whole = _variance_mean(calls, mean, dims)
    within = _reduced(calls, "mean.dim", variance, dims)
    return calls.same("add.Tensor", within, other=between), whole


def _exponentials(calls: Calls, value: Value, dims: Dims) -> Values:
    """The maximum, and the sum of exponentials of what is less than it. It is finite at least, so that parts that are
    minus infinity are 0."""
    least = -1.7976931348623157e308 if type_of(value).dtype == "f64" else -3.4028234663852886e38
    largest = calls.same("clamp.default", _reduced(calls, "amax.default", value, dims), min=least)
    power = calls.same("exp.default", calls.same("sub.Tensor", value, other=largest))
    return largest, _reduced(calls, "sum.dim_IntList", power, dims)


def _sum_of_exponentials(calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    largest, total = parts
    whole = _reduced(calls, "amax.default", largest, dims)
    scale = calls.same("exp.default", calls.same("sub.Tensor", largest, other=whole))
    return whole, _reduced(calls, "sum.dim_IntList", calls.same("mul.Tensor", total, other=scale), dims)


def _extreme(op: str, calls: Calls, value: Value, dims: Dims) -> Values:
    """The extreme and where it is, along one dimension."""
    types = _without(value, dims), _without(value, dims, "i64")
    return calls.calls(op, types, self=value, dim=dims[0], keepdim=True)


def _extreme_of_parts(op: str, calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    found, which = _extreme(op, calls, parts[0], dims)
    inside = calls.call("gather.default", type_of(which), self=parts[1], dim=dims[0], index=which)
    return found, calls.same("add.Tensor", calls.same("mul.Scalar", which, other=length), other=inside)


MOMENTS = Statistic(_variance_mean, _moments)
EXPONENTIALS = Statistic(_exponentials, _sum_of_exponentials)
EXTREMES = {
    kind: Statistic(partial(_extreme, f"{kind}.dim"), partial(_extreme_of_parts, f"{kind}.dim"))
    for kind in ("max", "min")
}


# ---- operators as statistics and what is made of these ---------------------------------------------------------------


class Rule(NamedTuple):
    """An operator as a statistic of its rows.

    Attributes:
        operand: what is reduced, in the dtype of registers, and over which dimensions.
        statistic: of the rows.
        finish: calls that compute the node's results of the operand and the whole statistic.
    """

    operand: Callable[[Calls, Node], tuple[Value, Dims]]
    statistic: Callable[[Node], Statistic]
    finish: Callable[[Calls, Node, Value, Values], None]


def _wide(calls: Calls, node: Node, name: str = "self") -> tuple[Value, Dims]:
    """An operand, and the dimensions `dim` of it; all, if there are none."""
    value, dim = argument(node, name), node.arg("dim")
    (result, *_) = (type_of(value) for value in node.outputs if value is not None)
    rank = len(type_of(value).shape)
    axes = (dim,) if isinstance(dim, int) else dim if isinstance(dim, tuple) else ()
    known = tuple(axis % rank for axis in axes if isinstance(axis, int)) or tuple(range(rank))
    kept = result.dtype == "bool" or node.op in POSITIONS
    return (value if kept else calls.cast(value, register(result.dtype))), known


def _results(calls: Calls, node: Node, found: Iterable[Value]) -> None:
    """Gives the results of `node`, as far as anyone needs them, what was found."""
    for result, value in zip(node.outputs, found, strict=True):
        if result is not None:
            type_ = type_of(result)
            shaped = calls.reshaped(value, type_.shape) if type_of(value).shape != type_.shape else value
            op, args = ("_to_copy", {"dtype": type_.dtype}) if type_of(value).dtype != type_.dtype else ("clone", {})
            calls.call(f"{op}.default", type_, self=shaped, **args)
            calls.ends_in(result)


def _plain(op: str, **names: Attr) -> Rule:
    def statistic(node: Node) -> Statistic:
        return _again(op, **{name: node.arg(name, default) for name, default in names.items()})

    return Rule(_wide, statistic, lambda calls, node, _, stats: _results(calls, node, stats))


def _variance(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    variance, mean = stats
    shape, axes = type_of(operand).shape, _wide(Calls(set()), node)[1]
    count = dim_expr("*", 1, *(shape[axis] for axis in axes))
    correction = node.arg("correction")
    correction = 1 if correction is None else correction
    if not isinstance(count, int) or not isinstance(correction, int | float) or count <= correction:
        raise Unsupported(f"the variance of {count} elements in parts")
    variance = calls.same("mul.Scalar", variance, other=count / max(count - correction, 1e-300))
    if node.op.startswith("aten.std"):
        variance = calls.same("sqrt.default", variance)
    _results(calls, node, (variance, mean)[: len(node.outputs)])


def _softmax(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    largest, total = stats
    value = calls.same("sub.Tensor", operand, other=largest)
    if "log" in node.op:
        found = calls.same("sub.Tensor", value, other=calls.same("log.default", total))
    else:
        found = calls.same("div.Tensor", calls.same("exp.default", value), other=total)
    _results(calls, node, (found,))


def _along(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """The operand of a search along one dimension."""
    operand, axes = _wide(calls, node)
    if len(axes) != 1:
        raise Unsupported("the place of an extreme in several dimensions")
    return operand, axes


def _place_of_extreme(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    _results(calls, node, stats[2 - len(node.outputs) :])


def _trailing(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """The operand of a norm over the last dimensions."""
    value, sizes = argument(node, "input"), node.arg("normalized_shape")
    assert isinstance(sizes, tuple)
    rank = len(type_of(value).shape)
    return calls.cast(value, register(type_of(value).dtype)), tuple(range(rank - len(sizes), rank))


def _grouped(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """Images, or the like, with groups of channels in the place of channels: [batch, groups, channels, ...]."""
    value, groups = argument(node, "input"), node.arg("num_groups")
    assert isinstance(groups, int)
    grouped = calls.divided(value, 1, groups)
    rank = len(type_of(grouped).shape)
    return calls.cast(grouped, register(type_of(value).dtype)), tuple(range(2, rank))


def _scale(calls: Calls, node: Node, variance: Value, least: float) -> Value:
    eps = node.arg("eps", least)
    return calls.same("rsqrt.default", calls.same("add.Scalar", variance, other=least if eps is None else eps))


def _affine(calls: Calls, node: Node, value: Value, trailing: int = 0) -> Value:
    """`value` times the weight plus the bias of a norm, which lie before `trailing` dimensions."""
    for name, op in (("weight", "mul.Tensor"), ("bias", "add.Tensor")):
        factor = node.arg(name)
        if isinstance(factor, Value):
            wide = calls.cast(factor, type_of(value).dtype)
            value = calls.same(op, value, other=calls.reshaped(wide, (*type_of(wide).shape, *[1] * trailing)))
    return value


def _standardized(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    """Layer norms and group norms, and, for those that have them as results, the mean and the scale."""
    variance, mean = stats
    scale = _scale(calls, node, variance, 1e-5)
    value = calls.same("mul.Tensor", calls.same("sub.Tensor", operand, other=mean), other=scale)
    trailing = 0
    if node.op == GROUP_NORM:
        value = calls.reshaped(value, type_of(argument(node, "input")).shape)
        trailing = len(type_of(value).shape) - 2
    _results(calls, node, (_affine(calls, node, value, trailing), mean, scale)[: len(node.outputs)])


def _squares(node: Node) -> Statistic:
    """The mean of squares."""
    mean = _again("mean.dim")
    return mean._replace(
        partial=lambda calls, value, dims: mean.partial(calls, calls.same("mul.Tensor", value, other=value), dims)
    )


def _rms(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    least = 2.220446049250313e-16 if type_of(operand).dtype == "f64" else 1.1920928955078125e-07
    scale = _scale(calls, node, stats[0], least)
    value = calls.same("mul.Tensor", operand, other=scale)
    _results(calls, node, (_affine(calls, node, value), scale)[: len(node.outputs)])


GROUP_NORM = "aten.group_norm.default"
POSITIONS = {"aten.argmax.default": "max", "aten.max.dim": "max", "aten.argmin.default": "min", "aten.min.dim": "min"}
AGAIN = {
    **dict.fromkeys(("aten.sum.default", "aten.sum.dim_IntList"), _plain("sum.dim_IntList")),
    **dict.fromkeys(("aten.mean.default", "aten.mean.dim"), _plain("mean.dim")),
    **dict.fromkeys(("aten.amax.default", "aten.max.default"), _plain("amax.default")),
    **dict.fromkeys(("aten.amin.default", "aten.min.default"), _plain("amin.default")),
    **dict.fromkeys((f"aten.any.{which}" for which in ("default", "dim", "dims")), _plain("any.dims")),
    **dict.fromkeys((f"aten.all.{which}" for which in ("default", "dim", "dims")), _plain("all.dims")),
    "aten.linalg_vector_norm.default": _plain("linalg_vector_norm.default", ord=2),
    "aten.logsumexp.default": _plain("logsumexp.default"),
}
SOFTMAX = Rule(_wide, lambda node: EXPONENTIALS, _softmax)
RULES: Mapping[str, Rule] = {
    **AGAIN,
    **{f"aten.{name}.correction": Rule(_wide, lambda node: MOMENTS, _variance) for name in ("var", "std", "var_mean")},
    **{f"aten.{name}": SOFTMAX for name in ("softmax.int", "_softmax.default")},
    **{f"aten.{name}": SOFTMAX for name in ("log_softmax.int", "_log_softmax.default")},
    **{op: Rule(_along, lambda node: EXTREMES[POSITIONS[node.op]], _place_of_extreme) for op in POSITIONS},
    **dict.fromkeys(
        ("aten.layer_norm.default", "aten.native_layer_norm.default"),
        Rule(_trailing, lambda node: MOMENTS, _standardized),
    ),
    **dict.fromkeys(("aten.rms_norm.default", "aten._fused_rms_norm.default"), Rule(_trailing, _squares, _rms)),
    GROUP_NORM: Rule(_grouped, lambda node: MOMENTS, _standardized),
}
