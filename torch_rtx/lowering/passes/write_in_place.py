"""Writes the new part of an input in place, where a capture copies the whole of it twice.

A functional capture of `cache.index_copy_(2, position, keys)` is a copy of the cache with other rows and, at the end, a
copy of all that back into the cache. Where nobody can tell the difference, the update becomes one of `ir.UPDATES`.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import COPY, MAIN, Dim, Graph, Node, Sym, TensorType, Type, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

# The functional call, and the one in place with the same arguments.
UPDATES = {
    "aten.index_copy.default": "aten.index_copy_.default",
    "aten.index_put.default": "aten.index_put_.default",
    "aten.scatter.src": "aten.scatter_.src",
    "aten.scatter.value": "aten.scatter_.value",
}
# Updates at positions that are numbers; indices are made of these.
SLICE, SELECT = "aten.slice_scatter.default", "aten.select_scatter.default"
# What may return its input although its schema says a new tensor.
HIDDEN_VIEWS = frozenset(f"aten.{name}.default" for name in ("_unsafe_view", "lift", "channel_shuffle"))
HIDDEN_VIEWS |= {"aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", "aten.unsafe_split.Tensor"}


def write_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. An update is written in place if its result is what its input holds in the end,
    nobody outside gets the result, and whatever else reads the old contents leads to the update."""
    search = _Search(graph)
    if not search.copies:
        return graph

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if id(node) in search.updates:
            rewriter.keep(search.in_place(node, rewriter))
        return id(node) in search.updates or id(node) in search.copies

    return rewrite(graph, infer, visit)


class _Search:
    """The nodes of `graph` to write in place, and the copies that are then needless, by their ids."""

    def __init__(self, graph: Graph) -> None:
        self.producer = {value.name: node for node in graph.nodes for value in node.outputs if value is not None}
        self.readers = users(graph)
        kept = returned(graph) | {
            value.name for node in graph.nodes if node.kind == "fallback" for value in node.inputs
        }
        self.kept = self._aliased(kept, graph)
        self.updates: set[int] = set()
        self.copies: set[int] = set()
        targets = [node.arg("self") for node in graph.nodes if node.writes]
        for node in graph.nodes:
            if node.writes and node.op == COPY and targets.count(node.arg("self")) == 1:
                chain = self._chain(node)
                self.updates.update(map(id, chain))
                self.copies |= {id(node)} if chain else set()

    @staticmethod
    def _aliased(names: set[str], graph: Graph) -> set[str]:
        """`names`, and the values that may share memory with them, upwards: what they are views of."""
        found = set(names)
        for node in reversed(graph.nodes):
            if _aliases(node) and any(value is not None and value.name in found for value in node.outputs):
                found.update(value.name for value in node.inputs)
        return found

    def _chain(self, copy: Node) -> list[Node]:
        """The updates between the old contents of what `copy` writes to and the new ones; none if one of them has to be
        a copy."""
        chain: list[Node] = []
        target, value = copy.arg("self"), copy.arg("src")
        while value != target:
            node = self.producer.get(value.name) if isinstance(value, Value) else None
            if node is None or value.name in self.kept or not _updates(node) or not self._is_last(node, copy):  # type: ignore[union-attr]
                return []
            chain.append(node)
            value = node.arg("self")
        return chain

    def _is_last(self, node: Node, copy: Node) -> bool:
        """Whether nothing reads the old contents, through views as well, once `node` has written the new ones."""
        old = node.arg("self")
        assert isinstance(old, Value)
        names, left = {old.name}, [old.name]
        reading: list[Node] = []
        while left:
            for reader in self.readers.get(left.pop(), ()):
                if _aliases(reader):
                    fresh = {value.name for value in reader.outputs if value is not None} - names
                    names |= fresh
                    left += fresh
                if reader is not node and reader is not copy and not _is_view(reader):
                    reading.append(reader)
        if sum(value.name in names for value in node.inputs) > 1:
            return False
        before = self._before(node) if reading else set()
        return all(reader.kind == "op" and id(reader) in before for reader in reading)

    def _before(self, node: Node) -> set[int]:
        """The ids of the nodes that lead to `node`."""
        found: set[int] = set()
        left = [node]
        while left:
            for value in left.pop().inputs:
                producer = self.producer.get(value.name)
                if producer is not None and id(producer) not in found:
                    found.add(id(producer))
                    left.append(producer)
        return found

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def in_place(self, node: Node, rewriter: Rewriter) -> Node:
        """The call that does what `node` does, to the memory of its argument `self`."""
        if node.op in UPDATES:
            return replace(node, op=UPDATES[node.op])
        source, dim = self._uncopied(node), int(node.arg("dim", 0))  # type: ignore[arg-type]
        if node.op == SELECT:
            source = rewriter.emit("aten.unsqueeze.default", node.loc, self=source, dim=dim)
        index = _index(node, source.type.shape[dim], rewriter)  # type: ignore[union-attr]
        args = ("self", node.arg("self")), ("dim", dim), ("index", index), ("source", source)
        return replace(node, op="aten.index_copy_.default", args=args)

    def _uncopied(self, node: Node) -> Value:
        """What `node` writes, without the copy to the layout of the old contents that a capture makes of it."""
        source = node.arg("src")
        assert isinstance(source, Value)
        copy = self.producer.get(source.name)
        before = copy.arg("src") if copy is not None and copy.op == "aten.copy.default" else None
        if not isinstance(before, Value) or len(self.readers[source.name]) > 1 or source.name in self.kept:
            return source
        return before if _plain(before) == _plain(source) else source


def _is_view(node: Node) -> bool:
    return node.kind == "op" and aten.is_view(aten.overload(node.op))


def _aliases(node: Node) -> bool:
    """Whether a result of `node` may share memory with what it reads."""
    return _is_view(node) or (node.kind == "op" and node.op in HIDDEN_VIEWS)


def _updates(node: Node) -> bool:
    """Whether `node` has a counterpart in place that gives the same tensor."""
    old, (new, *_) = node.arg("self"), node.outputs or (None,)
    if node.kind != "op" or not isinstance(old, Value) or new is None or new.type != old.type:
        return False
    return node.op in UPDATES or (node.op in (SLICE, SELECT) and _starts(node) is not None)


def _plain(value: Value) -> object:
    """The type of a tensor without its strides."""
    return isinstance(value.type, TensorType) and (value.type.dtype, value.type.shape, value.type.device)


def _starts(node: Node) -> Dim | None:
    """The first position that a SLICE or SELECT writes; None where a range of positions can't be made of it."""
    old, source, dim = node.arg("self"), node.arg("src"), node.arg("dim", 0)
    assert isinstance(old, Value)
    assert isinstance(source, Value)
    if not isinstance(old.type, TensorType) or old.type.device != MAIN or source.type.dtype != old.type.dtype:  # type: ignore[union-attr]
        return None
    size = old.type.shape[dim]  # type: ignore[index]
    first = node.arg("index" if node.op == SELECT else "start") or 0
    if isinstance(first, int) and isinstance(size, int):
        return min(max(first + size, 0) if first < 0 else first, size)
    if isinstance(first, Sym) and node.arg("step", 1) == 1:
        return first  # never negative, and the size of what is written says that it ends in time
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
