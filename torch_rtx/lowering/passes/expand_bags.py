"""Writes bags of embeddings out where all bags have one size: look-ups, and a reduction of each bag.

PyTorch's call takes where each bag begins, as its layer for bags of one size counts them; a loop reads the rows of a
bag without any of this.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

BAGS = frozenset(("aten.embedding_bag.default", "aten.embedding_bag.padding_idx"))
REDUCTIONS = ("sum.dim_IntList", "mean.dim", "amax.default")  # by mode


def expand_bags(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Bags without a constant size, or with an entry that counts as none, are left."""
    producer = {value.name: node for node in graph.nodes for value in node.results}
    needed = users(graph).keys() | returned(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op not in BAGS or any(value.name in needed for value in node.outputs[1:] if value is not None):
            return False
        size = _size(node, producer)
        return size is not None and rewriter.expand(node, lambda: (_reduced(node, size, rewriter), *node.outputs[1:]))

    return rewrite(graph, infer, visit)


def _size(node: Node, producer: Mapping[str, Node]) -> int | None:
    """How many entries each bag has, if the bags begin at its multiples, up to the last entry."""
    offsets, indices, padding = node.arg("offsets"), node.arg("indices"), node.arg("padding_idx")
    counted = producer.get(offsets.name) if isinstance(offsets, Value) else None
    if counted is None or counted.op != "aten.arange.start_step" or counted.arg("start") != 0:
        return None
    if not isinstance(indices, Value) or not isinstance(indices.type, TensorType) or len(indices.type.shape) != 1:
        return None
    step, plain = counted.arg("step", 1), not node.arg("include_last_offset", False) and padding in (None, -1)
    whole = counted.arg("end") == indices.type.shape[0]
    return step if isinstance(step, int) and step > 0 and plain and whole else None


def _reduced(node: Node, size: int, rewriter: Rewriter) -> Value | None:
    result, mode, scales = node.outputs[0], node.arg("mode", 0), node.arg("per_sample_weights")
    if result is None or not isinstance(result.type, TensorType) or mode not in (0, 1, 2):
        return None

    def call(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", node.loc, **args)

    weight, indices = (rewriter.current(value) for value in node.inputs[:2])
    bags = result.type.shape[0], size
    rows = call("embedding.default", weight=weight, indices=call("view.default", self=indices, size=bags))
    if isinstance(scales, Value):
        factors = call("view.default", self=rewriter.current(scales), size=(*bags, 1))
        rows = call("mul.Tensor", self=rows, other=factors)
    assert isinstance(mode, int)
    return call(REDUCTIONS[mode], self=rows, dim=(1,))
