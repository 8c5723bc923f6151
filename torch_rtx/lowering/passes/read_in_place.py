"""Removes layout copies of attention operands, and repeated key and value heads (grouped-query attention): the kernels
read any strides and share heads. Masks are read along the keys of a row: one that lies otherwise, as biases of relative
positions do, whose table has heads side by side, is laid out so, once for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.arrangement import CLONE, PERMUTES, RESHAPES, arrangement, emit, in_order
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import ATTENTION, SDPA


def read_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    given, along_keys = {value.name for value in graph.inputs}, dict[str, Value]()
    chains = _Chains({value.name: node for node in graph.nodes for value in node.results if node.kind == "op"})

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op not in (SDPA, ATTENTION):
            return False
        operands = {name: node.arg(name) for name in ("query", "key", "value")}
        shared = {name: chains.key_value_heads(chains.skip_copies(operands[name])) for name in ("key", "value")}
        groups = {_shape(value)[:2] for value in shared.values() if isinstance(value, Value)}
        grouped = None not in shared.values() and len(groups) == 1 and not node.arg("enable_gqa")
        if grouped:
            operands |= shared
        operands = {name: chains.in_place(value, rewriter) for name, value in operands.items()}
        for name in ("attn_mask", "bias"):
            mask = node.arg(name)
            if isinstance(mask, Value) and mask.name not in given and _is_scattered(mask):
                if mask.name not in along_keys:
                    current, form = rewriter.current(mask), "contiguous_format"
                    along_keys[mask.name] = rewriter.emit(CLONE, node.loc, self=current, memory_format=form)
                operands[name] = along_keys[mask.name]
        pairs = tuple((name, operands.get(name, attr)) for name, attr in node.args)
        rewriter.keep(replace(node, args=(*pairs, ("enable_gqa", True)) if grouped else pairs))
        return True

    return rewrite(graph, infer, visit)


class _Chains:
    """The views and copies that values are made by. `producer`: the call that computes each, by its name."""

    def __init__(self, producer: Mapping[str, Node]) -> None:
        self._producer = producer

    def _source(self, value: Attr, *ops: str) -> Attr:
        """The argument `self` of the op that computes `value`, if it is one of `ops`."""
        node = self._producer.get(value.name) if isinstance(value, Value) else None
        return node.arg("self") if node is not None and node.op in ops else None

    def skip_copies(self, value: Attr) -> Attr:
        """What `value` is a copy of, or `value`."""
        while (before := self._source(value, CLONE)) is not None:
            value = before
        return value

    def in_place(self, value: Attr, rewriter: Rewriter) -> Attr:
        """`value`, or views without the copies that it was made by."""
        value = self.skip_copies(value)
        before = value
        while (source := self._source(before, *RESHAPES, *PERMUTES)) is not None:
            before = source
        if not isinstance(value, Value) or self._source(before, CLONE) is None:
            return value
        count = len(rewriter.nodes)
        try:
            return emit(arrangement(value, self._producer), rewriter)
        except Unsupported:  # no view is enough
            del rewriter.nodes[count:]
            return value

    def key_value_heads(self, value: Attr) -> Attr:
        """The distinct heads, each of which `value`, [batch, heads, length, width], repeats for a group of queries."""
        repeated = self._source(value, "aten.repeat_interleave.self_int")
        if repeated is not None:
            assert isinstance(value, Value)
            return repeated if self._producer[value.name].arg("dim") in (1, -3) else None
        if not isinstance(value, Value) or len(_shape(value)) != 4:
            return None
        found = arrangement(value, self._producer)
        unsqueezed = self._source(found.root, "aten.expand.default")
        heads = self._source(unsqueezed, "aten.unsqueeze.default")
        if not isinstance(heads, Value) or found != in_order(found.root).reshaped(_shape(value)):
            return None
        one, shape, repeats = _shape(unsqueezed), _shape(heads), _shape(found.root)
        if len(shape) != 4 or one != (*shape[:2], 1, *shape[2:]) or repeats != (*shape[:2], repeats[2], *shape[2:]):
            return None
        return heads if _shape(value) == (shape[0], dim_expr("*", *repeats[1:3]), *shape[2:]) else None


def _is_scattered(mask: Value) -> bool:
    """The keys of a row are not neighbours in memory, and no element is several of the mask."""
    assert isinstance(mask.type, TensorType)
    strides = [stride for size, stride in zip(mask.type.shape, mask.type.strides, strict=True) if size != 1]
    return bool(strides) and 0 not in strides and mask.type.strides[-1] != 1 and mask.type.shape[-1] != 1


def _shape(value: Attr) -> tuple[Dim, ...]:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return value.type.shape
