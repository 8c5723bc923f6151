"""Gradients of attention in ranges of queries, where few heads to few keys would leave a GPU idle.

The first kernel is one call of `torch_rtx.attention_backward_partial` (see `attention_gradients`): its programs have a
range of the queries each, and what that adds to the gradients of keys and values. The second kernel adds these up.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, TensorType, Value, contiguous
from torch_rtx.lowering.kernels.attention_backward import MAX_ROWS
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, argument, kernel, names_in, needed, type_of
from torch_rtx.lowering.kernels.split import added
from torch_rtx.op_work import ATTENTION_BACKWARD, ATTENTION_BACKWARD_PARTIAL

KEPT = ("grad_out", "query", "key", "value", "attn_mask", "scale", "mask_gradient", "bias")  # arguments of both calls


def split_queries(body: Graph, name: str, num_splits: int) -> Graph:
    """`body`, of the kernel `name`, with the queries of its anchor in at most `num_splits` ranges of whole blocks.

    Raises:
        Unsupported: the anchor can't be split.
    """
    anchor = next(node for node in body.nodes if node.op == ATTENTION_BACKWARD)
    queries, heads = type_of(argument(anchor, "query")).shape[-2], type_of(argument(anchor, "query")).shape[1]
    if not isinstance(queries, int) or anchor.arg("is_causal") or type_of(argument(anchor, "key")).shape[1] != heads:
        raise Unsupported("ranges of queries that are causal, of an open number, or of heads that share keys")
    rows = -(-queries // (MAX_ROWS * num_splits)) * MAX_ROWS
    parts, read = -(-queries // rows), {value.name for value in body.outputs if isinstance(value, Value)}
    args = {name: attr for name, attr in anchor.args if name in KEPT}
    taken = names_in(body)
    first = BodyBuilder(taken, needed(body.nodes, tuple(args.values())))
    shapes = [(parts, *type_of(argument(anchor, name)).shape) for name in ("key", "value")]
    sums = [TensorType("f32", shape, contiguous(shape)) for shape in shapes]
    results = first.calls(ATTENTION_BACKWARD_PARTIAL, sums, **args, rows=rows)
    of_query, *wholes, of_mask = anchor.outputs
    first.nodes[-1] = replace(first.nodes[-1], outputs=(of_query, *results, of_mask))
    second = BodyBuilder(taken)
    pairs = [(whole, part) for whole, part in zip(wholes, results, strict=True) if whole and whole.name in read]
    for whole, part in pairs:
        terms = second.unbind(part, 0)
        second.define(whole, added(second, terms, type_of(terms[0]).strides))
    made = [value for value in (of_query, of_mask) if value and value.name in read]
    nodes = (
        kernel(f"{name}_parts{num_splits}", body.inputs, first.nodes, (*made, *(part for _, part in pairs))),
        kernel(f"{name}_sum{num_splits}", results, second.nodes, tuple(whole for whole, _ in pairs)),
    )
    return Graph("import", body.inputs, nodes=nodes, outputs=body.outputs)
