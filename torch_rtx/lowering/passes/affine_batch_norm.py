"""Rewrites an inference batch norm to one multiplication and one addition per element.

(x - mean) / sqrt(var + eps) * gamma + beta equals x * s + t for s = gamma / sqrt(var + eps), t = beta - mean * s, which
depend on parameters alone: `hoist_weights` makes them recipes. Like PyTorch's own norm, the computation is in float32
or wider and rounds the result once; fused into a convolution, it reads the unrounded accumulator.
"""

from __future__ import annotations

from collections.abc import Callable

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Type, Value, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
# Ops whose types `_known` computes: inference for each channel count of a network would dominate the pass.
POINTWISE = frozenset(("add.Scalar", "rsqrt.default", "mul.Tensor", "sub.Tensor", "neg.default", "add.Tensor"))
HALF = ("f16", "bf16")
Emit = Callable[..., Value]


def affine_batch_norm(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Norms whose statistics are not weights stay."""
    weights = {weight.value.name for weight in graph.weights}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        result = node.outputs[0] if node.outputs else None
        if node.op != BATCH_NORM or result is None or any(node.outputs[1:]) or not of_weights(node, weights):
            return False
        image, emit = node.arg("input"), emitter(node, rewriter)
        assert isinstance(image, Value)
        assert isinstance(image.type, TensorType)
        column = (-1,) + (1,) * (len(image.type.shape) - 2)
        try:
            scale, shift = (emit("view.default", self=one, size=column) for one in scale_and_shift(node, emit))
            found = emit("addcmul.default", self=shift, tensor1=rewriter.current(image), tensor2=scale)
            if found.type != result.type:
                found = emit("_to_copy.default", self=found, dtype=image.type.dtype)
        except Unsupported:
            return False
        rewriter.replace(result, found)
        return True

    return rewrite(graph, infer, visit)


def of_weights(norm: Node, weights: set[str]) -> bool:
    """Whether all operands of a batch norm except its input are weights."""
    needed = [norm.arg("running_mean"), norm.arg("running_var")]
    needed += [value for value in (norm.arg("weight"), norm.arg("bias")) if value is not None]
    return all(isinstance(value, Value) and value.name in weights for value in needed)


def scale_and_shift(norm: Node, emit: Emit, bias: Attr = None) -> tuple[Value, Value]:
    """The factor and the summand of a batch norm, [channels], in float32 or float64.

    Args:
        bias: of the convolution before the norm, folded into the summand.
    """

    def upcast(value: Attr) -> Attr:
        narrow = isinstance(value, Value) and isinstance(value.type, TensorType) and value.type.dtype in HALF
        return emit("_to_copy.default", self=value, dtype="f32") if narrow else value

    scale = emit("rsqrt.default", self=emit("add.Scalar", self=upcast(norm.arg("running_var")), other=norm.arg("eps")))
    if norm.arg("weight") is not None:
        scale = emit("mul.Tensor", self=scale, other=upcast(norm.arg("weight")))
    mean = upcast(norm.arg("running_mean"))
    offset = mean if bias is None else emit("sub.Tensor", self=mean, other=upcast(bias))
    shift = emit("neg.default", self=emit("mul.Tensor", self=offset, other=scale))
    if norm.arg("bias") is not None:
        shift = emit("add.Tensor", self=shift, other=upcast(norm.arg("bias")))
    return scale, shift


def emitter(node: Node, rewriter: Rewriter) -> Emit:
    """A function that adds calls at the location of `node`."""

    def emit(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", node.loc, _known(op, args), **args)

    return emit


def _known(op: str, args: dict[str, Attr]) -> tuple[Type] | None:
    """The result type if all operands are contiguous, of one dtype, and broadcast to the first; else None."""
    types = [value.type for value in args.values() if isinstance(value, Value) and isinstance(value.type, TensorType)]
    dense = all(type_.strides == contiguous(type_.shape) for type_ in types)
    if op not in POINTWISE or not dense or len({type_.dtype for type_ in types}) != 1:
        return None
    fits = all(b in (1, a) for type_ in types for a, b in zip(types[0].shape, type_.shape, strict=False))
    return (types[0],) if fits and len({len(type_.shape) for type_ in types}) == 1 else None
