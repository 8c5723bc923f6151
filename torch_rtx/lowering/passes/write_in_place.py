"""Updates inputs in place, such as a KV cache, where a functional capture copies them twice.

A functional capture of `cache.index_copy_(2, position, keys)` is an updated copy of the cache, which a trailing `copy_`
writes back to the cache. If no other reader needs the copy, the update becomes one of `ir.UPDATES`.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import COPY, MAIN, UPDATES, Dim, Graph, Node, Sym, TensorType, Type, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users, with_bases

IN_PLACE = {call: update for update, call in UPDATES.items()}  # with the same arguments
# Updates at positions given by numbers; they become an `index_copy_` with an index tensor. PyTorch has it for no dtype
# of `FLOAT8`, but `index_put_`; for those of `COPIED`, neither.
SLICE, SELECT = "aten.slice_scatter.default", "aten.select_scatter.default"
FLOAT8 = frozenset(("f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz"))
COPIED = frozenset(("u16", "u32", "u64", "f8e8m0fnu", "f4e2m1fn_x2"))


def write_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. An update is done in place if its result is the final contents of its input, the
    result does not escape, and all other readers of the old contents precede the update in data flow."""
    search = _Search(graph)
    if not search.copies:
        return graph

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if id(node) in search.updates:
            rewriter.keep(search.in_place(node, rewriter))
        return id(node) in search.updates or id(node) in search.copies

    return rewrite(graph, infer, visit)


class _Search:
    """Finds the nodes of `graph` to do in place, and the copies that become redundant, by their ids."""

    def __init__(self, graph: Graph) -> None:
        self.producer = {value.name: node for node in graph.nodes for value in node.results}
        self.readers = users(graph)
        escapes = returned(graph) | {v.name for node in graph.nodes if node.kind == "fallback" for v in node.inputs}
        self.escapes = with_bases(graph, escapes)
        self.updates: set[int] = set()
        self.copies: set[int] = set()
        targets = [node.arg("self") for node in graph.nodes if node.writes]
        for node in graph.nodes:
            if node.writes and node.op == COPY and targets.count(node.arg("self")) == 1:
                chain = self._chain(node)
                self.updates.update(map(id, chain))
                self.copies |= {id(node)} if chain else set()

    def _chain(self, copy: Node) -> list[Node]:
        """The updates from the old contents of the target of `copy` to the new ones; empty if one must be a copy."""
        chain: list[Node] = []
        target, value = copy.arg("self"), copy.arg("src")
        while value != target:
            node = self.producer.get(value.name) if isinstance(value, Value) else None
            escapes = isinstance(value, Value) and value.name in self.escapes
            if node is None or escapes or not has_in_place_form(node) or not self._is_last(node, copy):
                return []
            chain.append(node)
            value = node.arg("self")
        return chain

    def _is_last(self, node: Node, copy: Node) -> bool:
        """Whether all reads of the old contents, directly or through views, precede `node` in data flow."""
        old = node.arg("self")
        assert isinstance(old, Value)
        names, pending = {old.name}, [old.name]
        reads: list[Node] = []
        while pending:
            for reader in self.readers.get(pending.pop(), ()):
                if aten.may_alias(reader):
                    views = {value.name for value in reader.results} - names
                    names |= views
                    pending += views
                if reader is not node and reader is not copy and not _is_view(reader):
                    reads.append(reader)
        if sum(value.name in names for value in node.inputs) > 1:
            return False
        ancestors = self._ancestors(node) if reads else set()
        return all(reader.kind == "op" and id(reader) in ancestors for reader in reads)

    def _ancestors(self, node: Node) -> set[int]:
        """The ids of the nodes on which `node` depends."""
        found: set[int] = set()
        pending = [node]
        while pending:
            for value in pending.pop().inputs:
                producer = self.producer.get(value.name)
                if producer is not None and id(producer) not in found:
                    found.add(id(producer))
                    pending.append(producer)
        return found

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def in_place(self, node: Node, rewriter: Rewriter) -> Node:
        """The in-place form of `node`, which writes to its argument `self`."""
        if node.op in IN_PLACE:
            return replace(node, op=IN_PLACE[node.op])
        source, dim = self._source(node), int(node.arg("dim", 0))  # type: ignore[arg-type]
        if node.op == SELECT:
            source = rewriter.emit("aten.unsqueeze.default", node.loc, self=source, dim=dim)
        index, old = _index(node, source.type.shape[dim], rewriter), node.arg("self")  # type: ignore[union-attr]
        assert isinstance(old, Value)
        if old.type.dtype in FLOAT8:  # type: ignore[union-attr]
            indices = (*(None,) * (dim % len(old.type.shape)), index)  # type: ignore[union-attr]
            return replace(
                node, op="aten.index_put_.default", args=(("self", old), ("indices", indices), ("values", source))
            )
        args = ("self", node.arg("self")), ("dim", dim), ("index", index), ("source", source)
        return replace(node, op="aten.index_copy_.default", args=args)

    def _source(self, node: Node) -> Value:
        """The values that `node` writes, without the capture's copy of them to the layout of the old contents."""
        source = node.arg("src")
        assert isinstance(source, Value)
        copy = self.producer.get(source.name)
        original = copy.arg("src") if copy is not None and copy.op == "aten.copy.default" else None
        if not isinstance(original, Value) or len(self.readers[source.name]) > 1 or source.name in self.escapes:
            return source
        return original if _without_strides(original) == _without_strides(source) else source


def _is_view(node: Node) -> bool:
    return node.kind == "op" and aten.is_view(aten.overload(node.op))


def has_in_place_form(node: Node) -> bool:
    """Whether `node` has an in-place form with the same result."""
    old, (new, *_) = node.arg("self"), node.outputs or (None,)
    if node.kind != "op" or not isinstance(old, Value) or new is None or new.type != old.type:
        return False
    return node.op in IN_PLACE or (node.op in (SLICE, SELECT) and _starts(node) is not None)


def _without_strides(value: Value) -> object:
    """The type of a tensor without its strides."""
    return isinstance(value.type, TensorType) and (value.type.dtype, value.type.shape, value.type.device)


def _starts(node: Node) -> Dim | None:
    """The first position that a SLICE or SELECT writes; None if an index tensor can't express the positions."""
    old, source, dim = node.arg("self"), node.arg("src"), node.arg("dim", 0)
    assert isinstance(old, Value)
    assert isinstance(source, Value)
    if not isinstance(old.type, TensorType) or old.type.device != MAIN or source.type.dtype != old.type.dtype:  # type: ignore[union-attr]
        return None
    if old.type.dtype in COPIED:
        return None
    size = old.type.shape[dim]  # type: ignore[index]
    first = node.arg("index" if node.op == SELECT else "start") or 0
    if isinstance(first, int) and isinstance(size, int):
        return min(max(first + size, 0) if first < 0 else first, size)
    if isinstance(first, Sym) and first.min >= 0 and node.arg("step", 1) == 1:
        return first  # the size of `src` bounds the range
    return None


def _index(node: Node, count: Dim, rewriter: Rewriter) -> Value:
    """The `count` positions that a SLICE or SELECT writes."""
    start, step = _starts(node), node.arg("step", 1)
    types: tuple[Type, ...] = (TensorType("i64", (count,), (1,)),)
    if isinstance(start, int) and isinstance(step, int) and isinstance(count, int):
        end = start + count * step
        return rewriter.emit("aten.arange.start_step", node.loc, types, start=start, end=end, step=step, device=MAIN)
    index = rewriter.emit("aten.arange.default", node.loc, types, end=count, device=MAIN)
    return rewriter.emit("aten.add.Tensor", node.loc, types, self=index, other=start)
