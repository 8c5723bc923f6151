"""Gradients of look-ups as additions in memory, and sums that begin with another addend instead of zeros.

The gradient of an embedding becomes zeros, to which rows are added: a loop that writes zeros, and one over the rows of
the gradient, with what computes these. PyTorch's own call sorts the indices first.

The sum of such a call, from zeros, and of another tensor starts from that tensor: a table that is tied to the last
layer gets the gradient of the product first, and then the rows of the embedding, with neither zeros nor a sum of
tables. Zeros belong to one call alone, which adds to them in place, and wait for no other tensor whose dtype they have.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate as accumulated

from torch_rtx.accumulation import accumulates
from torch_rtx.ir import MAIN, Attr, Graph, Node, TensorType, Value, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.ops.accumulations import DTYPES
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

EMBEDDING = "aten.embedding_dense_backward.default"
ADD = "aten.add.Tensor"
ZEROS = frozenset(f"aten.{name}.default" for name in ("zeros", "zeros_like", "new_zeros"))
FULL = frozenset(f"aten.{name}.default" for name in ("full", "full_like", "new_full"))


def accumulate(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Gradients of embeddings by frequency, and of other dtypes than those that kernels
    add to, remain calls."""
    search = _Search(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if id(node) in search.moved:
            return True  # its sum takes its place
        call = search.calls.get(id(node))
        if call is not None:
            (addend,) = (value for value in node.inputs if value not in call.outputs)
            _add(call, rewriter, rewriter.current(addend), node.outputs)  # type: ignore[arg-type]
            return True
        if not search.begins_with_zeros(node):
            return False
        zeros = search.zeros(node)
        if zeros is not None and not zeros.inputs and len(search.users[zeros.results[0].name]) == 1:
            return False
        _add(node, rewriter, _zeros(node, rewriter), node.outputs)
        return True

    return rewrite(graph, infer, visit)


class _Search:
    """What to rewrite in `graph`.

    Attributes:
        users: see `rewrite.users`.
        calls: by the id of a sum, the call whose place it takes; `moved` has the ids of these calls.
    """

    def __init__(self, graph: Graph) -> None:
        self.users, kept = users(graph), returned(graph)
        self._producer = {value.name: node for node in graph.nodes for value in node.results}
        self.calls: dict[int, Node] = {}
        self.moved: set[int] = set()
        epochs = accumulated(node.kind == "fallback" or node.writes for node in graph.nodes)
        epoch = dict(zip(map(id, graph.nodes), epochs, strict=True))  # no call moves across a write
        for node in graph.nodes:
            for value in node.inputs if node.op == ADD and len(node.inputs) == 2 else ():
                call = self._producer.get(value.name)
                if call is None or value.name in kept or id(node) in self.calls or len(self.users[value.name]) > 1:
                    continue
                if self.begins_with_zeros(call) and _is_sum(node, value) and epoch[id(call)] == epoch[id(node)]:
                    self.calls[id(node)] = call
                    self.moved.add(id(call))

    def begins_with_zeros(self, node: Node) -> bool:
        """`node` adds to zeros, as kernels can."""
        if node.kind != "op" or len(node.results) != 1 or not _is_added_to(node.results[0]):
            return False
        if node.op == EMBEDDING:
            return node.arg("scale_grad_by_freq") is False
        return accumulates(node) and self.zeros(node) is not None

    def zeros(self, node: Node) -> Node | None:
        """The call whose zeros `node` adds to."""
        start = node.arg("self")
        source = self._producer.get(start.name) if isinstance(start, Value) else None
        if source is None or source.results[0].type != node.results[0].type:
            return None
        is_zero = source.op in FULL and source.arg("fill_value") == 0
        return source if is_zero or source.op in ZEROS else None


def _is_added_to(value: Value) -> bool:
    type_ = value.type
    if not isinstance(type_, TensorType) or type_.device != MAIN or type_.dtype not in DTYPES:
        return False
    return type_.strides == contiguous(type_.shape)


def _is_sum(node: Node, value: Value) -> bool:
    """`node` adds `value` to another tensor of one type."""
    given = [node.arg("self"), node.arg("other")]
    if value not in given or node.arg("alpha", 1) != 1 or len(node.results) != 1:
        return False
    other, (result,) = given[1 - given.index(value)], node.results
    return isinstance(other, Value) and other != value and other.type == result.type == value.type


def _zeros(node: Node, rewriter: Rewriter) -> Value:
    """Zeros like the result of `node`, which depend on nothing and which nothing else reads."""
    (type_,) = (value.type for value in node.results)
    assert isinstance(type_, TensorType)
    args: dict[str, Attr] = {"size": type_.shape, "fill_value": 0, "dtype": type_.dtype, "device": MAIN}
    return rewriter.emit("aten.full.default", node.loc, (type_,), **args)


def _add(node: Node, rewriter: Rewriter, start: Value, outputs: tuple[Value | None, ...]) -> None:
    """Add what `node` adds to zeros to `start`."""
    if node.op != EMBEDDING:
        args = tuple((key, start if key == "self" else attr) for key, attr in node.args)
        rewriter.keep(replace(node, args=args, outputs=outputs))
        return
    gradient, indices = (rewriter.current(node.arg(name)) for name in ("grad_output", "indices"))  # type: ignore[arg-type]
    padding = node.arg("padding_idx")
    if isinstance(padding, int) and padding >= 0:
        hidden = rewriter.emit("aten.eq.Scalar", node.loc, self=indices, other=padding)
        hidden = rewriter.emit("aten.unsqueeze.default", node.loc, self=hidden, dim=-1)
        gradient = rewriter.emit("aten.masked_fill.Scalar", node.loc, self=gradient, mask=hidden, value=0)
    args = ("self", start), ("indices", (indices,)), ("values", gradient), ("accumulate", True)
    rewriter.nodes.append(replace(node, op="aten.index_put.default", args=args, outputs=outputs))
