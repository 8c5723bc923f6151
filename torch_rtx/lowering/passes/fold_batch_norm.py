"""Folds an inference batch norm into the convolution before it: scale into the weight, shift into the bias.

conv(x, w) * s + t equals conv(x, w * s) + t for s = gamma / sqrt(var + eps), t = beta + (bias - mean) * s, which depend
on parameters alone: `hoist_weights` makes them a recipe. Half-precision weights are not folded: rounding w * s biases
all elements of a channel alike (the error of MobileNet v3 in float16 grows fivefold), and kernels apply the norm to the
float32 accumulator anyway: see `affine_batch_norm`.
"""

from __future__ import annotations

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, type_dims
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.affine_batch_norm import BATCH_NORM, emitter, of_weights, scale_and_shift
from torch_rtx.lowering.rewrite import Rewriter, only_user, returned, rewrite, users

CONVOLUTIONS = frozenset(f"aten.conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding"))


def fold_batch_norm(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. A convolution with other readers than the norm is not folded."""
    readers, outputs = users(graph), returned(graph)
    weights = {weight.value.name for weight in graph.weights}
    norm_of: dict[str, Node] = {}  # by the convolution's output
    for node in graph.nodes:
        if node.op in CONVOLUTIONS and node.kind == "op":
            norm = only_user(node.outputs, readers, outputs)
            if norm is not None and _foldable(node, norm, weights):
                norm_of[node.outputs[0].name] = norm  # type: ignore[union-attr]

    def visit(node: Node, rewriter: Rewriter) -> bool:
        output = node.outputs[0] if node.outputs else None
        norm = norm_of.get(output.name) if output is not None else None
        if node.op not in CONVOLUTIONS or norm is None:
            return False
        try:
            folded = _fold(node, norm, rewriter)
        except Unsupported:
            return False
        rewriter.replace(norm.outputs[0], folded)
        return True

    folded = rewrite(graph, infer, visit)
    # Remove the folded batch norms, whose convolution no longer exists.
    defined = {value.name for value in folded.values()}
    nodes = tuple(n for n in folded.nodes if n.op != BATCH_NORM or all(v.name in defined for v in n.inputs))
    return Graph(folded.level, folded.inputs, folded.parameters, folded.weights, nodes, folded.outputs)


def _foldable(convolution: Node, norm: Node, weights: set[str]) -> bool:
    """Whether all operands except the input are f32 or f64 weights, and the norm's other results are unused."""
    if norm.op != BATCH_NORM or norm.kind != "op" or any(norm.outputs[1:]):
        return False
    if norm.arg("input") != convolution.outputs[0]:
        return False
    # For an unbatched convolution, the norm would use other dimensions as batch and channels.
    weight, mean, result = convolution.arg("weight"), norm.arg("running_mean"), convolution.outputs[0]
    ranks = {len(v.type.shape) for v in (weight, result) if isinstance(v, Value) and isinstance(v.type, TensorType)}
    if len(ranks) != 1 or not isinstance(mean, Value) or type_dims(mean.type)[:1] != type_dims(weight.type)[:1]:  # type: ignore[union-attr]
        return False
    own = [value for value in (weight, convolution.arg("bias")) if value is not None]
    if not of_weights(norm, weights) or not all(isinstance(v, Value) and v.name in weights for v in own):
        return False
    dtypes = {v.type.dtype for v in (*own, mean) if isinstance(v, Value) and isinstance(v.type, TensorType)}
    return dtypes in ({"f32"}, {"f64"})


def _fold(convolution: Node, norm: Node, rewriter: Rewriter) -> Value:
    emit, weight = emitter(norm, rewriter), convolution.arg("weight")
    assert isinstance(weight, Value)
    assert isinstance(weight.type, TensorType)
    scale, shift = scale_and_shift(norm, emit, convolution.arg("bias"))
    column = emit("view.default", self=scale, size=(-1,) + (1,) * (len(weight.type.shape) - 1))
    folded = emit("mul.Tensor", self=weight, other=column)
    args = {**dict(convolution.args), "weight": folded, "bias": shift}
    order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    pairs = tuple((key, args[key]) for key in order if key in args)
    mapped = Node("op", convolution.op, pairs, (norm.outputs[0],), None, convolution.loc)
    rewriter.keep(mapped)
    assert norm.outputs[0] is not None
    return norm.outputs[0]
