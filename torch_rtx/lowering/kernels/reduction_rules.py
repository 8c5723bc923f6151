"""Reductions and norms, each written once, as calls around a statistic of rows.

A rule says what is reduced, by which statistic, and what follows from it. Three users read the same rule:

- a row loop (`region.express`) computes the statistic of whole rows: softmax and norms have no other declaration;
- a two-stage reduction (`split_reduction`) computes it for the chunks of a row and combines these;
- the pass `expand_norms` writes the norms of training out as calls.

Chunks have equal sizes, so that the mean of their means is the mean of the row, and their mean variance plus the
variance of their means is its variance (Chan, Golub and LeVeque, 1979): squares of a large mean are never subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, Values, argument, type_of

Dims = tuple[int, ...]
LOWEST = {"f32": -3.4028234663852886e38, "f64": -1.7976931348623157e308}  # the finite number furthest below 0
EPSILON = {"f32": 2.0**-23, "f64": 2.0**-52}  # the distance from 1 to the next number


# ---- statistics ------------------------------------------------------------------------------------------------------


class Statistic(NamedTuple):
    """What is known of rows. Dimensions that are reduced stay, with size 1.

    Attributes:
        whole: (body, x, dims) -> the statistic of x along dims.
        chunk: the same, where other chunks of the row follow; it must be finite wherever that of the row is.
        combine: (body, statistics of chunks, dims, elements of a chunk) -> the statistic of the rows.
    """

    whole: Callable[[BodyBuilder, Value, Dims], Values]
    chunk: Callable[[BodyBuilder, Value, Dims], Values]
    combine: Callable[[BodyBuilder, Values, Dims, int], Values]


def _reduced(body: BodyBuilder, op: str, value: Value, dims: Dims, dtype: str = "", **args: Attr) -> Value:
    return body.call(op, _row_type(value, dims, dtype), **{"self": value, **args, "dim": dims, "keepdim": True})


def _row_type(value: Value, dims: Dims, dtype: str = "") -> TensorType:
    old = type_of(value)
    shape = tuple(1 if axis in dims else size for axis, size in enumerate(old.shape))
    return TensorType(dtype or old.dtype, shape, contiguous(shape))


def _associative(op: str, **args: Attr) -> Statistic:
    """A reduction whose results for chunks combine by the same reduction."""
    dtype = "bool" if op[:3] in ("any", "all") else ""

    def once(body: BodyBuilder, value: Value, dims: Dims) -> Values:
        return (_reduced(body, op, value, dims, dtype, **args),)

    return Statistic(once, once, lambda body, chunks, dims, length: once(body, chunks[0], dims))


def _moments(body: BodyBuilder, value: Value, dims: Dims) -> Values:
    """Variance and mean."""
    types = [_row_type(value, dims)] * 2
    return body.calls("var_mean.correction", types, self=value, dim=dims, correction=0, keepdim=True)


def _combined_moments(body: BodyBuilder, chunks: Values, dims: Dims, length: int) -> Values:
    variance, mean = chunks
    between, whole = _moments(body, mean, dims)
    return body.add(_reduced(body, "mean.dim", variance, dims), between), whole


def _mean_square(body: BodyBuilder, value: Value, dims: Dims) -> Values:
    return (_reduced(body, "mean.dim", body.mul(value, value), dims),)


def _exponentials(body: BodyBuilder, value: Value, dims: Dims, lowest: Mapping[str, float] | None = None) -> Values:
    """The maximum m, and the sum of exp(x - m). With `lowest`, m is finite there, so that chunks of nothing but minus
    infinity sum to 0, not to NaN."""
    largest = _reduced(body, "amax.default", value, dims)
    base = largest if lowest is None else body.pointwise("clamp.default", largest, min=lowest[type_of(value).dtype])
    return largest, _reduced(body, "sum.dim_IntList", body.pointwise("exp.default", body.sub(value, base)), dims)


def _combined_exponentials(body: BodyBuilder, chunks: Values, dims: Dims, length: int) -> Values:
    largest, total = chunks
    whole = _reduced(body, "amax.default", largest, dims)
    decay = body.pointwise("exp.default", body.sub(largest, whole))
    return whole, _reduced(body, "sum.dim_IntList", body.mul(total, decay), dims)


def _extreme(op: str, body: BodyBuilder, value: Value, dims: Dims) -> Values:
    """The extreme along one dimension, and its position."""
    types = _row_type(value, dims), _row_type(value, dims, "i64")
    return body.calls(op, types, self=value, dim=dims[0], keepdim=True)


def _combined_extreme(op: str, body: BodyBuilder, chunks: Values, dims: Dims, length: int) -> Values:
    found, chunk = _extreme(op, body, chunks[0], dims)
    inside = body.call("gather.default", type_of(chunk), self=chunks[1], dim=dims[0], index=chunk)
    return found, body.add(body.pointwise("mul.Scalar", chunk, other=length), inside)


MOMENTS = Statistic(_moments, _moments, _combined_moments)
MEAN_SQUARE = Statistic(_mean_square, _mean_square, _associative("mean.dim").combine)
EXPONENTIALS = Statistic(_exponentials, partial(_exponentials, lowest=LOWEST), _combined_exponentials)


# ---- rules -----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """An operator as a statistic of rows, and what follows from it.

    Attributes:
        operand: what is reduced, in the dtype of registers, and over which dimensions.
        statistic: of the rows.
        finish: the node's results, up to their shapes and dtypes, from the operand and the statistic of whole rows.
    """

    operand: Callable[[BodyBuilder, Node], tuple[Value, Dims]]
    statistic: Callable[[Node], Statistic]
    finish: Callable[[BodyBuilder, Node, Value, Values], Values]


def written_out(body: BodyBuilder, node: Node) -> Values:
    """The results of `node`, up to their shapes and dtypes, by calls that its rule makes.

    Raises:
        Unsupported: there is no rule for it, or not for these arguments.
    """
    if node.op not in RULES:
        raise Unsupported(f"{node.op} in a kernel", loc=node.loc)
    rule = RULES[node.op]
    operand, axes = rule.operand(body, node)
    return rule.finish(body, node, operand, rule.statistic(node).whole(body, operand, axes))


def _dims(node: Node) -> Dims:
    """The dimensions `dim` of the argument `self`; all, if there are none."""
    rank, dim = len(type_of(node.arg("self")).shape), node.arg("dim")
    axes = (dim,) if isinstance(dim, int) else dim if isinstance(dim, tuple) else ()
    return tuple(axis % rank for axis in axes if isinstance(axis, int) and rank) or tuple(range(rank))


def _wide(body: BodyBuilder, node: Node) -> tuple[Value, Dims]:
    """The operand in the dtype to reduce in."""
    (result, *_) = (type_of(value) for value in node.outputs if value is not None)
    value = argument(node, "self")
    return value if result.dtype == "bool" else body.cast(value, register(result.dtype)), _dims(node)


def _simple(op: str, **defaults: Attr) -> Rule:
    """A reduction that is its own statistic, with the arguments named in `defaults`."""

    def statistic(node: Node) -> Statistic:
        return _associative(op, **{name: node.arg(name, default) for name, default in defaults.items()})

    return Rule(_wide, statistic, lambda body, node, operand, totals: totals)


def _variance(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    variance, mean = totals
    count = _count(operand, _dims(node))
    correction = node.arg("correction")
    correction = 1 if correction is None else correction
    if not isinstance(count, int) or not isinstance(correction, int | float) or count <= correction:
        raise Unsupported(f"the variance of {count} elements in chunks")
    variance = body.pointwise("mul.Scalar", variance, other=count / max(count - correction, 1e-300))
    if node.op.startswith("aten.std"):
        variance = body.pointwise("sqrt.default", variance)
    return (variance, mean)[: len(node.outputs)]


def _count(value: Value, axes: Dims) -> Dim:
    return dim_expr("*", 1, *(type_of(value).shape[axis] for axis in axes))


def _one_dim(body: BodyBuilder, node: Node) -> tuple[Value, Dims]:
    """The operand of a search for an extreme."""
    axes = _dims(node)
    if len(axes) != 1:
        raise Unsupported("the position of an extreme in several dimensions")
    return argument(node, "self"), axes


def _position(kind: str) -> Rule:
    """The extreme and its position, or the position alone."""
    statistic = Statistic(*2 * (partial(_extreme, f"{kind}.dim"),), partial(_combined_extreme, f"{kind}.dim"))
    return Rule(_one_dim, lambda node: statistic, lambda body, node, operand, totals: totals[2 - len(node.outputs) :])


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _softmax(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """exp(x - max) over the sum of these."""
    largest, total = totals
    power = body.pointwise("exp.default", body.sub(operand, largest))
    return (body.pointwise("div.Tensor", power, other=total),)


def _safe_softmax(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """The softmax; 0 where everything is minus infinity."""
    (found,) = _softmax(body, node, operand, totals)
    empty = body.call("eq.Scalar", _row_type(totals[0], (), "bool"), self=totals[0], other=-math.inf)
    return (body.pointwise("masked_fill.Scalar", found, mask=empty, value=0.0),)


def _log_softmax(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    largest, total = totals
    return (body.sub(body.sub(operand, largest), body.pointwise("log.default", total)),)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _trailing(body: BodyBuilder, node: Node) -> tuple[Value, Dims]:
    """The operand of a norm over the last dimensions."""
    value, sizes = argument(node, "input"), node.arg("normalized_shape")
    assert isinstance(sizes, tuple)
    rank = len(type_of(value).shape)
    return body.widen(value), tuple(range(rank - len(sizes), rank))


def _channels(body: BodyBuilder, node: Node) -> tuple[Value, Dims]:
    """The operand of a batch norm."""
    value = argument(node, "input")
    if node.arg("training", True) is False:
        raise Unsupported(f"{node.op} by running statistics", loc=node.loc)
    return body.widen(value), _all_but_channels(value)


def _all_but_channels(image: Value) -> Dims:
    """The dimensions of an image, or the like, but the second one."""
    return (0, *range(2, len(type_of(image).shape)))


def _groups(name: str, body: BodyBuilder, node: Node) -> tuple[Value, Dims]:
    """The operand of a group norm as [batch, groups, channels of a group, ...]."""
    value, groups = argument(node, "input"), node.arg(name)
    assert isinstance(groups, int)
    grouped = body.split_dim(body.widen(value), 1, groups)
    return grouped, tuple(range(2, len(type_of(grouped).shape)))


def _reciprocal_root(body: BodyBuilder, node: Node, square: Value, default: float) -> Value:
    """1 / sqrt(square + eps), `default` where the node has no eps."""
    eps = node.arg("eps", None)
    eps = default if eps is None else eps
    return body.pointwise("rsqrt.default", body.pointwise("add.Scalar", square, other=eps))


def _affine(body: BodyBuilder, node: Node, value: Value, trailing: int) -> Value:
    """`value` times the weight plus the bias of a norm, as far as there are any, both before `trailing` dimensions."""
    for name, combine in (("weight", body.mul), ("bias", body.add)):
        factor = node.arg(name)
        if isinstance(factor, Value):
            wide = body.cast(factor, type_of(value).dtype)
            value = combine(value, body.reshape(wide, (*type_of(wide).shape, *[1] * trailing)))
    return value


def _standardized(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """(x - mean) * scale, the mean, and scale = 1 / sqrt(variance + eps)."""
    variance, mean = totals
    scale = _reciprocal_root(body, node, variance, 1e-5)
    return body.mul(body.sub(operand, mean), scale), mean, scale


def _layer_norm(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """Ba et al., 2016."""
    normal, mean, scale = _standardized(body, node, operand, totals)
    return (_affine(body, node, normal, 0), mean, scale)[: len(node.outputs)]


def _image_norm(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """Group norm (Wu and He, 2018), and what batch norms begin with."""
    normal, mean, scale = _standardized(body, node, operand, totals)
    shape = type_of(argument(node, "input")).shape
    return (_affine(body, node, body.reshape(normal, shape), len(shape) - 2), mean, scale)[: len(node.outputs)]


def _batch_norm(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """Standardization by the batch's own statistics, these, and the new running ones (Ioffe and Szegedy, 2015)."""
    found = _image_norm(body, node, operand, totals)
    if not isinstance(node.arg("running_mean"), Value):
        return found
    momentum, count = node.arg("momentum"), _count(operand, _all_but_channels(operand))
    assert isinstance(momentum, int | float)
    variance, mean = totals
    unbiased = body.pointwise("mul.Scalar", variance, other=count)
    unbiased = body.pointwise("div.Scalar", unbiased, other=dim_expr("+", count, -1))
    moved = []
    for name, towards in (("running_mean", mean), ("running_var", unbiased)):
        before = body.cast(argument(node, name), type_of(towards).dtype)
        kept = body.pointwise("mul.Scalar", before, other=1 - momentum)
        flat = body.reshape(towards, type_of(kept).shape)
        moved.append(body.add(kept, body.pointwise("mul.Scalar", flat, other=momentum)))
    return *found, *moved


def _running(node: Node) -> Statistic:
    """Variance and mean as a batch norm outside of training is given them."""

    def given(body: BodyBuilder, value: Value, dims: Dims) -> Values:
        shape, dtype = _row_type(value, dims).shape[1:], type_of(value).dtype
        running = (argument(node, name) for name in ("running_var", "running_mean"))
        return tuple(body.reshape(body.cast(one, dtype), shape) for one in running)

    return Statistic(given, given, lambda body, chunks, dims, length: chunks)


def _running_batch_norm(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """The saved statistics are empty."""
    found, *_ = _image_norm(body, node, operand, totals)
    return found, *(
        body.call("full.default", type_of(v), size=(0,), fill_value=0) if v else found for v in node.outputs[1:]
    )


def _rms_norm(body: BodyBuilder, node: Node, operand: Value, totals: Values) -> Values:
    """Zhang and Sennrich, 2019."""
    scale = _reciprocal_root(body, node, totals[0], EPSILON[type_of(operand).dtype])
    return (_affine(body, node, body.mul(operand, scale), 0), scale)[: len(node.outputs)]


# ---- the table -------------------------------------------------------------------------------------------------------


def _table() -> dict[str, Rule]:
    simple = {
        "sum.dim_IntList": "sum.default sum.dim_IntList",
        "mean.dim": "mean.default mean.dim",
        "amax.default": "amax.default max.default",
        "amin.default": "amin.default min.default",
        "any.dims": "any.default any.dim any.dims",
        "all.dims": "all.default all.dim all.dims",
        "logsumexp.default": "logsumexp.default",
    }
    groups = {"group_norm.default": "num_groups", "native_group_norm.default": "group"}
    batch = "_native_batch_norm_legit_functional.default _native_batch_norm_legit.no_stats"
    softmax = {
        _softmax: "softmax.int _softmax.default",
        _log_softmax: "log_softmax.int _log_softmax.default",
        _safe_softmax: "_safe_softmax.default",
    }
    norms = {
        "layer_norm.default native_layer_norm.default": Rule(_trailing, lambda node: MOMENTS, _layer_norm),
        "rms_norm.default _fused_rms_norm.default": Rule(_trailing, lambda node: MEAN_SQUARE, _rms_norm),
        batch: Rule(_channels, lambda node: MOMENTS, _batch_norm),
        "_native_batch_norm_legit_no_training.default": Rule(_channels, _running, _running_batch_norm),
    }
    rules = {
        **{ops: _simple(op) for op, ops in simple.items()},
        "linalg_vector_norm.default": _simple("linalg_vector_norm.default", ord=2),
        "var.correction std.correction var_mean.correction": Rule(_wide, lambda node: MOMENTS, _variance),
        "argmax.default max.dim": _position("max"),
        "argmin.default min.dim": _position("min"),
        **{ops: Rule(_wide, lambda node: EXPONENTIALS, finish) for finish, ops in softmax.items()},
        **{op: Rule(partial(_groups, name), lambda node: MOMENTS, _image_norm) for op, name in groups.items()},
        **norms,
    }
    return {f"aten.{op}": rule for ops, rule in rules.items() for op in ops.split()}


RULES: Mapping[str, Rule] = _table()
