"""Writes norms of training graphs out: batch and group norms with statistics of their own, and gradients of all norms.

Each of these calls is several loops: a batch norm is statistics of channels and a standardization, the gradients of a
layer norm are a loop over rows and one over columns. As calls they become kernels, together with what is around them.
Norms are written out by the rules that kernels have for them (`kernels.reduction_rules`). All is float32 at least, as
in PyTorch's own kernels. What two loops need, such as the standardized input, is written once for each of them:
computing it twice is cheaper than storing it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, Values, argument, type_of
from torch_rtx.lowering.kernels.reduction_rules import written_out
from torch_rtx.lowering.rewrite import Rewriter, rewrite

Axes = tuple[int, ...]
Shape = tuple[Dim, ...]


def expand_norms(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Calls that there is no rule for, in eval mode for one, are left alone."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.kind != "op" or node.op not in NORMS:
            return False
        norm = _Norm(replace(node, args=node.map_inputs(rewriter.current)), rewriter)
        try:
            found = NORMS[node.op](norm, norm.node)
            fitting = [norm.fit(*pair) for pair in zip(found, node.outputs, strict=True)]
        except Unsupported:
            return False
        for old, new in zip(node.outputs, fitting, strict=True):
            if new is not None:
                rewriter.replace(old, new)
        return True

    return rewrite(graph, infer, visit)


class _Norm(BodyBuilder):
    """Calls in the place of `node`, in the graph that `rewriter` builds. Their types are inferred."""

    def __init__(self, node: Node, rewriter: Rewriter) -> None:
        super().__init__(set())
        self.node, self.rewriter = node, rewriter

    def calls(self, op: str, types: Iterable[TensorType], /, **args: Attr) -> Values:
        """The results of a call, with the types that ATen gives them."""
        self.rewriter.emit(f"aten.{op}", self.node.loc, None, **args)
        return tuple(value for value in self.rewriter.nodes[-1].outputs if value is not None)

    def fit(self, found: Value, result: Value | None) -> Value | None:
        """`found` in the shape, dtype and layout of a result."""
        if result is None:
            return None
        wanted = type_of(result)
        found = self.cast(self.reshape(found, wanted.shape), wanted.dtype)
        if found.type != wanted:
            form = "contiguous_format" if wanted.strides == contiguous(wanted.shape) else "channels_last"
            found = self.call("clone.default", wanted, self=found, memory_format=form)
        if found.type != wanted:
            raise Unsupported(f"the layout {wanted}")
        return found

    def shape(self) -> Shape:
        """The sizes of the input."""
        return type_of(argument(self.node, "input")).shape

    def wide(self, name: str, shape: Shape | None = None) -> Value:
        """An argument, in float32 at least, and in `shape`."""
        value = self.node.arg(name)
        if not isinstance(value, Value):
            raise Unsupported(f"{self.node.op} without {name}")
        wide = self.widen(value)
        return wide if shape is None else self.reshape(wide, shape)

    def has(self, name: str) -> bool:
        """Whether an argument is given."""
        return self.node.arg(name) is not None

    def sum(self, value: Value, axes: Axes, **options: bool) -> Value:
        """The sum over dimensions."""
        if not axes:
            raise Unsupported("a sum over no dimensions")
        return self.call("sum.dim_IntList", type_of(value), self=value, dim=axes, **options)

    def mean(self, total: Value, shape: Shape, axes: Axes) -> Value:
        """The mean over dimensions of `shape`, of the sum over these."""
        return self.pointwise("div.Scalar", total, other=dim_expr("*", 1, *(shape[axis] for axis in axes)))

    def input_gradient(self, gradient: Value, normal: Value, axes: Axes, shape: Shape, centered: bool = True) -> Value:
        """The gradient of x, but for the factor `scale`, where that of (x - mean) * scale is `gradient`: what a change
        of the mean and of the scale make of it is taken away."""
        along = self.mean(self.sum(self.mul(gradient, normal), axes, keepdim=True), shape, axes)
        left = self.sub(gradient, self.mul(normal, along))
        return self.sub(left, self.mean(self.sum(gradient, axes, keepdim=True), shape, axes)) if centered else left


def _batch_norm_backward(norm: _Norm, node: Node) -> Values:
    """All of it is one loop over channels: the sums of the weight and the bias are those of the input as well."""
    if not node.arg("train"):
        raise Unsupported("a batch norm by running statistics")
    shape = norm.shape()
    axes, column = (0, *range(2, len(shape))), (1, shape[1], *[1] * (len(shape) - 2))
    mean, scale = (norm.wide(name, column) for name in ("save_mean", "save_invstd"))
    gradient, normal = norm.wide("grad_out"), norm.mul(norm.sub(norm.wide("input"), mean), scale)
    of_weight = norm.sum(norm.mul(gradient, normal), axes, keepdim=True)
    of_bias = norm.sum(gradient, axes, keepdim=True)
    left = norm.sub(gradient, norm.mul(normal, norm.mean(of_weight, shape, axes)))
    left = norm.sub(left, norm.mean(of_bias, shape, axes))
    if norm.has("weight"):
        scale = norm.mul(scale, norm.wide("weight", column))
    return norm.mul(left, scale), of_weight, of_bias


def _layer_norm_backward(norm: _Norm, node: Node) -> Values:
    """A loop over rows, and one over columns. An RMS norm has no mean and no bias."""
    shape, sizes, centered = norm.shape(), node.arg("normalized_shape"), norm.has("mean")
    assert isinstance(sizes, tuple)
    first = len(shape) - len(sizes)
    outer, axes = tuple(range(first)), tuple(range(first, len(shape)))

    def normal() -> Value:
        value = norm.wide("input")
        return norm.mul(norm.sub(value, norm.wide("mean")) if centered else value, norm.wide("rstd"))

    weighted = norm.wide("grad_out")
    if norm.has("weight"):
        weighted = norm.mul(weighted, norm.wide("weight"))
    of_input = norm.mul(norm.input_gradient(weighted, normal(), axes, shape, centered), norm.wide("rstd"))
    gradient = norm.wide("grad_out")
    of_weight = norm.sum(norm.mul(gradient, normal()), outer)
    return (of_input, of_weight, norm.sum(gradient, outer)) if centered else (of_input, of_weight)


def _group_norm_backward(norm: _Norm, node: Node) -> Values:
    """A loop over groups, and one over channels."""
    batch, channels, *rest = norm.shape()
    groups = node.arg("group")
    assert isinstance(groups, int)
    each = dim_expr("//", channels, groups)
    shape, column = (batch, groups, each, *rest), (1, groups, each, *[1] * len(rest))
    axes, outer, row = tuple(range(2, len(shape))), (0, *range(3, len(shape))), (batch, groups, *[1] * (len(rest) + 1))

    def normal() -> Value:
        return norm.mul(norm.sub(norm.wide("input", shape), norm.wide("mean", row)), norm.wide("rstd", row))

    weighted = norm.wide("grad_out", shape)
    if norm.has("weight"):
        weighted = norm.mul(weighted, norm.wide("weight", column))
    of_input = norm.mul(norm.input_gradient(weighted, normal(), axes, shape), norm.wide("rstd", row))
    gradient = norm.wide("grad_out", shape)
    of_weight = norm.sum(norm.mul(gradient, normal()), outer, keepdim=True)
    return of_input, of_weight, norm.sum(gradient, outer, keepdim=True)


NORMS: Mapping[str, Callable[[_Norm, Node], Values]] = {
    "aten._native_batch_norm_legit_functional.default": written_out,
    "aten._native_batch_norm_legit.no_stats": written_out,
    "aten.native_group_norm.default": written_out,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
    "aten._fused_rms_norm_backward.default": _layer_norm_backward,
    "aten.native_group_norm_backward.default": _group_norm_backward,
}
