"""Operand names and FLOPs of matrix products, convolutions and attention: one table for fusion, code generation,
performance models and profiles. It imports neither torch nor triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch_rtx.dtypes import PACKED
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value


class Operands(NamedTuple):
    """Argument names of a matrix product: the factors, and the addend ("": none)."""

    first: str
    second: str
    added: str = ""


INT_MM = "aten._int_mm.default"  # of int8, summed in int32
GROUPED_MM = "torch_rtx.grouped_mm.default"  # of groups of rows, each with a matrix of its own
SCALED_MM = "aten._scaled_mm.default"  # of float8, summed in f32
FIRST_SM, FIRST_SM_WITH_BLOCKS = 89, 100  # of which libraries have it, and have it with scales of blocks
BLOCK_SCALES = {(dtype, dtype) for dtype in ("f8e8m0fnu", "f8e4m3fn")}
SCALES = ("scale_a", "scale_b")  # its factors: of one element, or of a row [rows, 1] and of a column [1, columns]
PRODUCTS: Mapping[str, Operands] = {
    "aten.mm.default": Operands("self", "mat2"),
    "aten.bmm.default": Operands("self", "mat2"),
    "aten.mm.dtype": Operands("self", "mat2"),
    "aten.bmm.dtype": Operands("self", "mat2"),
    "aten.matmul.default": Operands("self", "other"),
    "aten.linear.default": Operands("input", "weight", "bias"),
    "aten.addmm.default": Operands("mat1", "mat2", "self"),
    "aten.baddbmm.default": Operands("batch1", "batch2", "self"),
    "aten.mv.default": Operands("self", "vec"),
    "aten.dot.default": Operands("self", "tensor"),
    INT_MM: Operands("self", "mat2"),
    SCALED_MM: Operands("self", "mat2", "bias"),
    "aten._addmm_activation.default": Operands("mat1", "mat2", "self"),
    GROUPED_MM: Operands("self", "mat2"),
}
INT_CONV = "torch_rtx.int_conv.default"  # of int8, summed in int32
SDPA = "aten.scaled_dot_product_attention.default"
ATTENTION = "torch_rtx.attention.default"  # as models write it out, see `aten`
ATTENTION_PARTIAL = "torch_rtx.attention_partial.default"  # to a range of the keys
ATTENTION_FORWARD = "torch_rtx.attention_forward.default"  # of training, see `attention_gradients`
ATTENTION_BACKWARD = "torch_rtx.attention_backward.default"
ATTENTION_BACKWARD_PARTIAL = "torch_rtx.attention_backward_partial.default"  # sums over ranges of the queries
FLEX = "torch_rtx.flex_attention.default"  # with modified scores, see `flex_attention`
FLEX_PARTIAL = "torch_rtx.flex_attention_partial.default"  # to shares of the keys
FLEX_GRAD_QUERY = "torch_rtx.flex_attention_grad_query.default"
FLEX_GRAD_KEY_VALUE = "torch_rtx.flex_attention_grad_key_value.default"
FLEX_GRAD_CAPTURED = "torch_rtx.flex_attention_grad_captured.default"
FLEX_GRADS = (FLEX_GRAD_QUERY, FLEX_GRAD_KEY_VALUE, FLEX_GRAD_CAPTURED)
BACKWARDS = (ATTENTION_BACKWARD, ATTENTION_BACKWARD_PARTIAL)
POOLING = "aten.max_pool2d_with_indices.default"
POOLING_BACKWARD = "aten.max_pool2d_with_indices_backward.default"
# Anchors: the operators that a kernel is built around (TVM's term), with the family that generates it. A region has at
# most one; its other operations become prologue and epilogue.
ANCHORS: Mapping[str, str] = {
    **dict.fromkeys((f"aten.{op}.default" for op in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")), "gemm"),
    INT_MM: "gemm",
    SCALED_MM: "gemm",
    GROUPED_MM: "grouped",
    **dict.fromkeys((f"aten.{op}.default" for op in ("conv1d", "conv2d", "conv3d", "convolution")), "conv"),
    INT_CONV: "conv",
    **dict.fromkeys((SDPA, ATTENTION, ATTENTION_PARTIAL, ATTENTION_FORWARD), "attention"),
    **dict.fromkeys(BACKWARDS, "attention_backward"),
    **dict.fromkeys((FLEX, FLEX_PARTIAL, *FLEX_GRADS), "attention_flex"),
}


def kind_in_float32(body: Graph) -> str | None:
    """The kind of the anchor in a kernel's body, if it multiplies float32."""
    for node in body.nodes:
        types = [value.type for value in node.inputs if isinstance(value.type, TensorType)]
        if node.op in ANCHORS and any(type_.dtype == "f32" for type_ in types):
            return ANCHORS[node.op]
    return None


def flops(node: Node, size: Callable[[Dim], int]) -> int:
    """Twice the multiplications of a product, a convolution or an attention (masked or not); 0 for other operations.

    Args:
        size: the number for a dim.
    """
    name = node.op.split(".")[1] if node.op.count(".") == 2 else node.op
    result = node.outputs[0] if node.outputs else None
    if result is None or node.kind == "fallback":
        return 0
    if node.op in PRODUCTS:
        first = node.arg(PRODUCTS[node.op].first)
        return 2 * _numel(result, size) * _shape(first, size)[-1] * _values(first)
    if ANCHORS.get(node.op) == "conv" or (name.removeprefix("cudnn_").startswith("conv") and "backward" not in name):
        swapped = "transpose" in name or node.arg("transposed") is True
        weight = _shape(node.arg("weight"), size)
        return 2 * _numel(node.arg("input") if swapped else result, size) * math.prod(weight[1:])
    if node.op in BACKWARDS:  # the scores again, and two products for each of the forward's
        query, grad_out = (_numel(node.arg(name), size) for name in ("query", "grad_out"))
        return 2 * _shape(node.arg("key"), size)[-2] * (3 * query + 2 * grad_out)
    if node.op in FLEX_GRADS:  # the scores again, their gradient, and one product for each result
        query, grad_out = (_numel(node.arg(name), size) for name in ("query", "grad_out"))
        keys = _shape(node.arg("key"), size)[-2]
        results = {FLEX_GRAD_QUERY: query, FLEX_GRAD_KEY_VALUE: query + grad_out}
        return 2 * keys * (query + grad_out + results.get(node.op, 0))
    if (
        "scaled_dot_product" in name or ANCHORS.get(node.op) in ("attention", "attention_flex")
    ) and "backward" not in name:
        keys = _shape(node.arg("key"), size)[-2]
        return 2 * keys * (_numel(node.arg("query"), size) + _numel(result, size))
    return 0


def library_has(sm: int, types: Mapping[str, TensorType], result: TensorType) -> bool:
    """Whether a GPU's library has a product of float8.

    Args:
        sm: its SM version.
        types: of the arguments of `SCALED_MM` that are tensors, by name.
    """
    a, b = (types[name] for name in PRODUCTS[SCALED_MM][:2])
    lies_along_k = a.strides[-1] == 1 and b.strides[0] == 1
    sizes = a.shape[-1], b.shape[-1], a.strides[0], b.strides[1]
    aligned = all(isinstance(size, int) and size % 16 == 0 for size in sizes)
    scales = scales_of(types)
    scaled = scales == "whole" or (scales in ("by row", "by block") and result.dtype == "bf16")
    first_sm = FIRST_SM_WITH_BLOCKS if scales == "by block" else FIRST_SM
    added = "bias" not in types or types["bias"].dtype == result.dtype != "f32"
    dtypes = result.dtype in ("f16", "bf16", "f32") and {a.dtype, b.dtype} != {"f8e5m2"}
    return sm >= first_sm and lies_along_k and aligned and scaled and added and dtypes


def scales_of(types: Mapping[str, TensorType]) -> str:
    """The scales of a product of float8 as PyTorch's call takes them: "whole" (one for each operand), "by row" (one for
    each row and each column), "by block" (of K, see `block_formats`) or "" (it takes no such ones).

    Args:
        types: see `library_has`.
    """
    a, b, scale_a, scale_b = (types[name] for name in (*PRODUCTS[SCALED_MM][:2], *SCALES))
    if (scale_a.dtype, scale_b.dtype) in BLOCK_SCALES:
        return "by block"
    if {scale_a.dtype, scale_b.dtype} != {"f32"}:
        return ""
    if set(scale_a.shape) | set(scale_b.shape) <= {1}:
        return "whole"
    each = (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[-1]))
    return "by row" if each and scale_a.strides[0] == scale_b.strides[1] == 1 else ""


def _shape(value: object, size: Callable[[Dim], int]) -> list[int]:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return [size(dim) for dim in value.type.shape]


def _values(value: object) -> int:
    """The values of an element."""
    assert isinstance(value, Value)
    return 2 if isinstance(value.type, TensorType) and value.type.dtype == PACKED else 1


def _numel(value: object, size: Callable[[Dim], int]) -> int:
    return math.prod(_shape(value, size))
