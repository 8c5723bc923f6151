"""Writes norms of training graphs out: batch and group norms with statistics of their own, and gradients of all norms.

Each of these calls is several loops: a batch norm is statistics of channels and a standardization, the gradients of a
layer norm are a loop over rows and one over columns. As operations they become kernels, together with what is around
them. All is float32 at least, as in PyTorch's own kernels. What two loops need, such as the standardized input, is
written down for each of them: it is cheaper to compute twice than to store in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.affine_batch_norm import HALF
from torch_rtx.lowering.rewrite import Rewriter, rewrite

Axes = tuple[int, ...]
Results = tuple[Value | None, ...]


def expand_norms(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Calls that there is no rule for, in eval mode for one, are left alone."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.kind != "op" or node.op not in RULES:
            return False
        calls = _Calls(node, rewriter)
        try:
            found = [calls.fitting(*pair) for pair in zip(RULES[node.op](calls), node.outputs, strict=True)]
        except Unsupported:
            return False
        for old, new in zip(node.outputs, found, strict=True):
            rewriter.replace(old, new)
        return True

    return rewrite(graph, infer, visit)


class _Calls:
    """The calls that stand for `node`."""

    def __init__(self, node: Node, rewriter: Rewriter) -> None:
        self.node, self.rewriter = node, rewriter

    def emit(self, op: str, /, **args: Attr) -> Value:
        """A call, with the types that ATen gives it."""
        return self.rewriter.emit(f"aten.{op}", self.node.loc, None, **args)

    # ---- arguments and results ---------------------------------------------------------------------------------------

    def shape(self, name: str = "input") -> tuple[Dim, ...]:
        """The sizes of an argument."""
        return _type(self.node.arg(name)).shape

    def wide(self, name: str) -> Value:
        """An argument, in float32 at least."""
        value = self.node.arg(name)
        if not isinstance(value, Value):
            raise Unsupported(f"{self.node.op} without {name}")
        now = self.rewriter.current(value)
        return self.emit("_to_copy.default", self=now, dtype="f32") if _type(value).dtype in HALF else now  # type: ignore[return-value]

    def has(self, name: str) -> bool:
        """Whether an argument is given."""
        return self.node.arg(name) is not None

    def fitting(self, found: Value | None, result: Value | None) -> Value | None:
        """`found` in the dtype and the layout of a result."""
        if result is None:
            return None
        if found is None:
            raise Unsupported(f"a result of {self.node.op}")
        wanted = _type(result)
        if _type(found).dtype != wanted.dtype:
            found = self.emit("_to_copy.default", self=found, dtype=wanted.dtype)
        if found.type != wanted:
            form = "contiguous_format" if wanted.strides == contiguous(wanted.shape) else "channels_last"
            found = self.emit("clone.default", self=found, memory_format=form)
        if found.type != wanted:
            raise Unsupported(f"the layout {wanted}")
        return found

    # ---- operations --------------------------------------------------------------------------------------------------

    def add(self, one: Value, two: Value) -> Value:
        """one + two."""
        return self.emit("add.Tensor", self=one, other=two)

    def sub(self, one: Value, two: Value) -> Value:
        """one - two."""
        return self.emit("sub.Tensor", self=one, other=two)

    def mul(self, one: Value, two: Value) -> Value:
        """one * two."""
        return self.emit("mul.Tensor", self=one, other=two)

    def view(self, value: Value, shape: Iterable[Dim]) -> Value:
        """The same elements in another shape."""
        return self.emit("view.default", self=value, size=tuple(shape))

    def sum(self, value: Value, axes: Axes, keepdim: bool = True) -> Value:
        """The sum over dimensions."""
        if not axes:
            raise Unsupported("a sum over no dimensions")
        return self.emit("sum.dim_IntList", self=value, dim=axes, **({"keepdim": True} if keepdim else {}))

    def mean(self, total: Value, shape: tuple[Dim, ...], axes: Axes) -> Value:
        """What a sum over dimensions of `shape` is of a mean."""
        return self.emit("div.Scalar", self=total, other=_count(shape, axes))

    def standardized(self, value: Value, axes: Axes) -> tuple[Value, Value, Value, Value]:
        """(x - mean) * scale for the mean and scale = 1 / sqrt(variance + eps) of dimensions; these, the variance."""
        variance = self.emit("var_mean.correction", self=value, dim=axes, correction=0, keepdim=True)
        mean = self.rewriter.nodes[-1].outputs[1]
        assert mean is not None
        scale = self.emit("rsqrt.default", self=self.emit("add.Scalar", self=variance, other=self.node.arg("eps")))
        return self.mul(self.sub(value, mean), scale), mean, scale, variance

    def affine(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        """`value` times the weight plus the bias, which have `shape`, as far as there are any."""
        if self.has("weight"):
            value = self.mul(value, self.view(self.wide("weight"), shape))
        return self.add(value, self.view(self.wide("bias"), shape)) if self.has("bias") else value


def _type(value: Attr) -> TensorType:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return value.type


def _count(shape: tuple[Dim, ...], axes: Axes) -> Dim:
    return dim_expr("*", 1, *(shape[axis] for axis in axes))


# ---- forward ---------------------------------------------------------------------------------------------------------


def _per_channel(shape: tuple[Dim, ...]) -> tuple[Axes, tuple[Dim, ...]]:
    """The dimensions of an image but for its channels, and the shape of one value per channel."""
    return (0, *range(2, len(shape))), (1, shape[1], *[1] * (len(shape) - 2))


def _batch_norm(calls: _Calls) -> Results:
    """Standardization by the batch's own statistics, these, and, if the call has them, the new running ones."""
    shape, stats = calls.shape(), calls.has("running_mean")
    if not calls.node.arg("training"):
        raise Unsupported("a batch norm by running statistics")
    axes, column = _per_channel(shape)
    normal, mean, scale, variance = calls.standardized(calls.wide("input"), axes)
    mean, scale, variance = (calls.view(value, shape[1:2]) for value in (mean, scale, variance))
    found = calls.affine(normal, column), mean, scale
    if not stats:
        return found
    count = _count(shape, axes)
    unbiased = calls.emit("mul.Scalar", self=variance, other=count)
    unbiased = calls.emit("div.Scalar", self=unbiased, other=dim_expr("+", count, -1))
    return *found, _moved(calls, "running_mean", mean), _moved(calls, "running_var", unbiased)


def _moved(calls: _Calls, name: str, towards: Value) -> Value:
    """A running statistic, moved by `momentum` of the way."""
    momentum = calls.node.arg("momentum")
    assert isinstance(momentum, int | float)
    kept = calls.emit("mul.Scalar", self=calls.wide(name), other=1 - momentum)
    return calls.add(kept, calls.emit("mul.Scalar", self=towards, other=momentum))


def _grouped(calls: _Calls) -> tuple[tuple[Dim, ...], Axes, tuple[Dim, ...]]:
    """The shape of an image in groups of channels, the dimensions of a group, the shape of one value per channel."""
    batch, channels, *rest = calls.shape()
    groups = calls.node.arg("group")
    assert isinstance(groups, int)
    each = dim_expr("//", channels, groups)
    return (batch, groups, each, *rest), tuple(range(2, 3 + len(rest))), (1, groups, each, *[1] * len(rest))


def _group_norm(calls: _Calls) -> Results:
    """Standardization of groups of channels, and the statistics."""
    shape, axes, column = _grouped(calls)
    normal, mean, scale, _ = calls.standardized(calls.view(calls.wide("input"), shape), axes)
    found = calls.view(calls.affine(normal, column), calls.shape())
    return found, calls.view(mean, shape[:2]), calls.view(scale, shape[:2])


# ---- gradients -------------------------------------------------------------------------------------------------------


def _of_input(
    calls: _Calls, gradient: Value, normal: Value, axes: Axes, shape: tuple[Dim, ...], centered: bool = True
) -> Value:
    """The gradient of x, but for its scale, where that of (x - mean) * scale is `gradient`: what a change of the mean,
    and of the scale, makes of it is taken away."""
    along = calls.mean(calls.sum(calls.mul(gradient, normal), axes), shape, axes)
    left = calls.sub(gradient, calls.mul(normal, along))
    return calls.sub(left, calls.mean(calls.sum(gradient, axes), shape, axes)) if centered else left


def _batch_norm_backward(calls: _Calls) -> Results:
    """All of it is one loop over channels: the sums of the weight and the bias are those of the input as well."""
    if not calls.node.arg("train"):
        raise Unsupported("a batch norm by running statistics")
    shape = calls.shape()
    axes, column = _per_channel(shape)
    mean, scale = (calls.view(calls.wide(name), column) for name in ("save_mean", "save_invstd"))
    gradient, normal = calls.wide("grad_out"), calls.mul(calls.sub(calls.wide("input"), mean), scale)
    of_weight, of_bias = calls.sum(calls.mul(gradient, normal), axes), calls.sum(gradient, axes)
    left = calls.sub(gradient, calls.mul(normal, calls.mean(of_weight, shape, axes)))
    left = calls.sub(left, calls.mean(of_bias, shape, axes))
    if calls.has("weight"):
        scale = calls.mul(scale, calls.view(calls.wide("weight"), column))
    return calls.mul(left, scale), *(calls.view(one, shape[1:2]) for one in (of_weight, of_bias))


def _layer_norm_backward(calls: _Calls) -> Results:
    """A loop over rows, and one over columns. An RMS norm has no mean and no bias."""
    shape, sizes, centered = calls.shape(), calls.node.arg("normalized_shape"), calls.has("mean")
    assert isinstance(sizes, tuple)
    first = len(shape) - len(sizes)
    outer, axes = tuple(range(first)), tuple(range(first, len(shape)))

    def normal() -> Value:
        value = calls.wide("input")
        return calls.mul(calls.sub(value, calls.wide("mean")) if centered else value, calls.wide("rstd"))

    weighted = calls.wide("grad_out")
    if calls.has("weight"):
        weighted = calls.mul(weighted, calls.wide("weight"))
    of_input = calls.mul(_of_input(calls, weighted, normal(), axes, shape, centered), calls.wide("rstd"))
    gradient = calls.wide("grad_out")
    of_weight = calls.sum(calls.mul(gradient, normal()), outer, keepdim=False)
    return (of_input, of_weight, calls.sum(gradient, outer, keepdim=False)) if centered else (of_input, of_weight)


def _group_norm_backward(calls: _Calls) -> Results:
    """A loop over groups, and one over channels."""
    shape, axes, column = _grouped(calls)
    outer = (0, *range(3, len(shape)))

    def grouped(name: str) -> Value:
        return calls.view(calls.wide(name), shape)

    def statistic(name: str) -> Value:
        return calls.view(calls.wide(name), (*shape[:2], *[1] * len(axes)))

    def normal() -> Value:
        return calls.mul(calls.sub(grouped("input"), statistic("mean")), statistic("rstd"))

    weighted = grouped("grad_out")
    if calls.has("weight"):
        weighted = calls.mul(weighted, calls.view(calls.wide("weight"), column))
    of_input = calls.mul(_of_input(calls, weighted, normal(), axes, shape), statistic("rstd"))
    gradient = grouped("grad_out")
    sums = calls.sum(calls.mul(gradient, normal()), outer), calls.sum(gradient, outer)
    return calls.view(of_input, calls.shape()), *(calls.view(one, calls.shape()[1:2]) for one in sums)


RULES: Mapping[str, Callable[[_Calls], Results]] = {
    "aten._native_batch_norm_legit_functional.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _batch_norm,
    "aten.native_group_norm.default": _group_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
    "aten._fused_rms_norm_backward.default": _layer_norm_backward,
    "aten.native_group_norm_backward.default": _group_norm_backward,
}
