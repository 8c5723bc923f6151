"""Raises group norms of merged channels, which scale and shift every channel afterwards, to one call.

    view(group_norm(view(x, [n, groups, ...]))) * w + b  ->  group_norm(x, w, b)

Exporters that have norms of instances alone write group norms so. The raised call rounds fewer times.
"""

from __future__ import annotations

from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

NORM = "aten.group_norm.default"
VIEWS = ("aten.view.default", "aten._unsafe_view.default")


def raise_group_norm(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    readers, outputs, constants = users(graph), returned(graph), Constants(graph)

    def made_by(value: Attr, *ops: str) -> Node | None:
        """The node of one of `ops` whose result nothing else reads."""
        if not isinstance(value, Value) or value.name in outputs or len(readers[value.name]) != 1:
            return None
        node = constants.producer.get(value.name)
        return node if node is not None and node.op in ops else None

    def operands(node: Node, *ops: str) -> tuple[Node, Value] | None:
        """The node of one of `ops` that makes an operand, and the other operand, with a number for each channel."""
        for first, second in (("self", "other"), ("other", "self")):
            made, column = made_by(node.arg(first), *ops), node.arg(second)
            if made is not None and _is_column(column, node):
                return made, column  # type: ignore[return-value]  # it is a value, then
        return None

    def is_all(value: Attr, number: float) -> bool:
        found = constants.find(value)
        return value is None or (found is not None and bool((found == number).all()))

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != "aten.add.Tensor" or node.arg("alpha", 1) != 1:
            return False
        added = operands(node, "aten.mul.Tensor")
        scaled = operands(added[0], *VIEWS) if added else None
        norm = made_by(scaled[0].arg("self"), NORM) if scaled else None
        source = _unmerged(norm, node, constants) if norm is not None else None
        if added is None or scaled is None or norm is None or source is None:
            return False
        if not is_all(norm.arg("weight"), 1) or not is_all(norm.arg("bias"), 0):
            return False
        channels = _type(node.outputs[0]).shape[1]
        rows = [
            rewriter.emit("aten.view.default", node.loc, self=rewriter.current(column), size=(channels,))
            for _, column in (scaled, added)
        ]
        args = dict(norm.args) | {"input": rewriter.current(source), "weight": rows[0], "bias": rows[1]}
        found = rewriter.emit(NORM, node.loc, **args)
        if found.type != _type(node.outputs[0]):
            return False
        rewriter.replace(node.outputs[0], found)
        return True

    return rewrite(graph, infer, visit)


def _is_column(value: Attr, node: Node) -> bool:
    """Whether an operand of a node has one number for each channel of its result."""
    result = _type(node.outputs[0])
    if not isinstance(value, Value) or len(result.shape) < 3:
        return False
    rank = len(result.shape)
    return _type(value).dtype == result.dtype and _type(value).shape in (
        (result.shape[1], *[1] * (rank - 2)),
        (1, result.shape[1], *[1] * (rank - 2)),
    )


def _unmerged(norm: Node, last: Node, constants: Constants) -> Value | None:
    """What a norm has as [n, groups, ...], in the shape of the result of `last`; None: it is something else."""
    merged = norm.arg("input")
    view = constants.producer.get(merged.name) if isinstance(merged, Value) else None
    source = view.arg("self") if view is not None and view.op in VIEWS else None
    if not isinstance(merged, Value) or not isinstance(source, Value):
        return None
    shape = _type(last.outputs[0]).shape
    fits = _type(source).shape == shape and _type(merged).shape[:2] == (shape[0], norm.arg("num_groups"))
    return source if fits else None


def _type(value: Value | None) -> TensorType:
    assert value is not None
    assert isinstance(value.type, TensorType)
    return value.type
