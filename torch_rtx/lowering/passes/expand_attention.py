"""Writes attention that no kernel computes out as two products around a softmax, which have kernels.

Kernels of attention keep a query's row of the result in registers. Very wide heads, as of autoencoders with a single
one, or of attention over channels, whose heads are as wide as an image has pixels, do not fit; beside the products of
such heads the scores cost little memory traffic. They are computed in float32.
"""

from __future__ import annotations

import math

from torch_rtx.ir import Attr, Graph, Node, Value, dim_expr
from torch_rtx.lowering.fusion import is_kernel
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import ANCHORS, SDPA
from torch_rtx.targets import Target

MOST_SCORES = 1 << 26  # which need memory now; a library call needs none for them


def expand_attention(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import to level import.

    Args:
        targets: of the kernels.
    """
    arches = tuple(dict.fromkeys(target.arch for target in targets))

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if ANCHORS.get(node.op) != "attention" or is_kernel(_alone(node), arches):
            return False
        return rewriter.expand(node, lambda: _expanded(node, rewriter))

    return rewrite(graph, infer, visit)


def _alone(node: Node) -> Graph:
    """`node` as a body of its own."""
    inputs = tuple(dict.fromkeys(node.inputs))
    return Graph("import", inputs, nodes=(node,), outputs=node.results)


def _expanded(node: Node, rewriter: Rewriter) -> Value | None:
    """The same as products and a softmax; None for what PyTorch's call does beside that.

    Raises:
        Unsupported: operands that products do not take.
    """

    def call(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", node.loc, **args)

    query, key, value = (rewriter.current(argument(node, name)) for name in ("query", "key", "value"))
    asked = any(node.arg(name) for name in ("enable_gqa", "is_causal", "dropout_p", "band"))
    assert isinstance(query, Value)
    assert isinstance(key, Value)
    *lead, queries, width = type_of(query).shape
    if asked or len(node.outputs) != 1 or not isinstance(width, int) or not width:
        return None
    if typical(dim_expr("*", *lead, queries, type_of(key).shape[-2])) > MOST_SCORES:
        return None
    mask, bias, scale, fill = (node.arg(name) for name in ("attn_mask", "bias", "scale", "fill"))
    if type_of(query).dtype in ("f16", "bf16"):
        query, key = (call("_to_copy.default", self=one, dtype="f32") for one in (query, key))
    scores = call("matmul.default", self=query, other=call("transpose.int", self=key, dim0=-2, dim1=-1))
    scores = call("mul.Tensor", self=scores, other=1 / math.sqrt(width) if scale is None else scale)
    masked = isinstance(mask, Value) and type_of(mask).dtype == "bool"
    for one in (bias, None if masked else mask):
        if isinstance(one, Value):
            scores = call("add.Tensor", self=scores, other=rewriter.current(one))
    if masked and isinstance(mask, Value):
        hidden = call("logical_not.default", self=rewriter.current(mask))
        number = -math.inf if fill is None else fill
        scores = call("masked_fill.Scalar", self=scores, mask=hidden, value=number)
    sink, keys = node.arg("sink"), type_of(scores).shape[-1]
    if isinstance(sink, Value):
        dtype = type_of(scores).dtype
        column = call("_to_copy.default", self=rewriter.current(sink), dtype=dtype)
        scores = call("cat.default", tensors=(scores, column), dim=-1)
    safe = node.op == SDPA and mask is not None  # zeros for a query that sees no key
    weights = call("_safe_softmax.default" if safe else "softmax.int", self=scores, dim=-1)
    if isinstance(sink, Value):
        weights = call("slice.Tensor", self=weights, dim=-1, start=0, end=keys)
    dtype = type_of(argument(node, "value")).dtype
    weights = weights if type_of(weights).dtype == dtype else call("_to_copy.default", self=weights, dtype=dtype)
    return call("matmul.default", self=weights, other=value)
