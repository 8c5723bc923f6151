"""Updates inputs in place, such as a KV cache, where a functional capture copies them twice.

A functional capture of `cache.index_copy_(2, position, keys)` is an updated copy of the cache, which a trailing `copy_`
writes back to the cache. If no other reader needs the copy, the update becomes one of `ir.UPDATES`.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import COPY, UPDATES, Attr, Graph, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users, with_bases
from torch_rtx.lowering.written_parts import VIEWS, Part, part_of, update_of

IN_PLACE = {call: update for update, call in UPDATES.items()}  # with the same arguments
VIEW, INDEX_PUT = "aten.view.default", "aten.index_put.default"


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
        self.parts: dict[int, Part] = {}  # that updates at positions given by numbers replace
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
            if node is None or escapes:
                return []
            update, old = self._of_rows(node) or (node, node.arg("self"))
            if (update is node and not has_in_place_form(node)) or not self._is_last(node, update, old, copy):
                return []
            chain.append(node)
            value = old
        return chain

    def _is_last(self, node: Node, update: Node, old: Attr, copy: Node) -> bool:
        """Whether all reads of the contents of `old`, directly or through views, precede `node` in data flow. `update`
        writes to it, which may be `node` itself."""
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
        if sum(value.name in names for value in update.inputs) > 1:
            return False
        if node.op in VIEWS:
            self.parts[id(node)] = self._part(node, names)
        ancestors = self._ancestors(node) if reads else set()
        return all(reader.kind == "op" and id(reader) in ancestors for reader in reads)

    def _part(self, node: Node, names: set[str]) -> Part:
        """What `node` replaces of a tensor that is called, or viewed as, one of `names`. An update of a view inside of
        it, and the capture's copy of what is written, are left out unless they keep old contents from being read while
        they are replaced."""
        found = part_of(node, self._source, self._inside)
        if found is None or found.source.name in names:
            found = part_of(node, _src, lambda _: None)
        assert found is not None  # it has an in-place form
        return found

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
        if id(node) in self.parts:
            return update_of(node, self.parts[id(node)], rewriter)
        rows = self._of_rows(node)
        return replace(node, op=IN_PLACE[node.op]) if rows is None else _of_pages(node, *rows, rewriter)

    def _producer_of(self, attr: Attr) -> Node | None:
        return self.producer.get(attr.name) if isinstance(attr, Value) else None

    def _is_private(self, node: Node) -> bool:
        """One node reads the result of `node`, and nobody else gets it."""
        return all(len(self.readers.get(v.name, ())) == 1 and v.name not in self.escapes for v in node.results)

    def _of_rows(self, node: Node) -> tuple[Node, Value] | None:
        """Where `node` gives a tensor back its shape, after an update at positions along two dimensions as one, as of
        the slots of pages: the update, and the tensor."""
        update = self._producer_of(node.arg("self")) if node.op == VIEW else None
        view = self._producer_of(update.arg("self")) if update is not None and update.op == INDEX_PUT else None
        old = view.arg("self") if view is not None and view.op == VIEW else None
        if update is None or view is None or not isinstance(old, Value) or not self._is_private(update):
            return None
        axis = _merged(old, view.results[0])
        indices = update.arg("indices")
        one = isinstance(indices, tuple) and len(indices) == (axis or 0) + 1 and indices[:-1] == (None,) * (axis or 0)
        if axis is None or not one or old.type != node.results[0].type or not _is_integer(indices[-1]):  # type: ignore[index]
            return None
        return update, old

    def _inside(self, node: Node) -> Node | None:
        """The update that makes what `node` writes, of the view that it replaces, if nothing else reads its result."""
        made = node.arg("src")
        found = self._producer_of(made)
        if found is None or found.op not in VIEWS or not self._is_private(found):
            return None
        view = self._producer_of(found.arg("self"))
        if view is None or view.op != VIEWS[node.op] or view.arg("self") != node.arg("self"):
            return None
        return found if _numbers(view) == _numbers(node) else None

    def _source(self, node: Node) -> Value:
        """The values that `node` writes, without the capture's copy of them to the layout of the old contents."""
        source = node.arg("src")
        assert isinstance(source, Value)
        copy = self.producer.get(source.name)
        original = copy.arg("src") if copy is not None and copy.op == "aten.copy.default" else None
        if not isinstance(original, Value) or len(self.readers[source.name]) > 1 or source.name in self.escapes:
            return source
        return original if _without_strides(original) == _without_strides(source) else source


def _numbers(node: Node) -> dict[str, object]:
    """The arguments of a view, or of an update of one, that are no tensors."""
    return {key: attr for key, attr in node.args if not isinstance(attr, Value)}


def _merged(old: Value, view: Value) -> int | None:
    """The dimension of `view` that is this one of `old` and the next one together; None for other views."""
    assert isinstance(old.type, TensorType)
    assert isinstance(view.type, TensorType)
    long, short = old.type.shape, view.type.shape
    pairs = enumerate(zip(long, short, strict=False))
    axis = next((at for at, (one, other) in pairs if one != other), None)
    if axis is None or len(long) != len(short) + 1:
        return None
    same = short == (*long[:axis], dim_expr("*", long[axis], long[axis + 1]), *long[axis + 2 :])
    return axis if same else None


def _is_integer(attr: Attr) -> bool:
    return isinstance(attr, Value) and isinstance(attr.type, TensorType) and attr.type.dtype in ("i64", "i32")


def _of_pages(node: Node, update: Node, old: Value, rewriter: Rewriter) -> Node:
    """`update`, of rows of a view of `old`, as an update of `old` itself: a row is one of a page. Negative rows count
    from the end, and so do their pages."""
    indices = update.arg("indices")
    assert isinstance(old.type, TensorType)
    assert isinstance(indices, tuple)
    *before, rows = indices
    size = old.type.shape[len(before) + 1]
    page = rewriter.emit("aten.floor_divide.default", node.loc, self=rows, other=size)
    row = rewriter.emit("aten.remainder.Scalar", node.loc, self=rows, other=size)
    given: dict[str, Attr] = {"self": old, "indices": (*before, page, row)}
    args = tuple((key, given.get(key, attr)) for key, attr in update.args)
    return replace(node, op=IN_PLACE[INDEX_PUT], args=args)


def _is_view(node: Node) -> bool:
    return node.kind == "op" and aten.is_view(aten.overload(node.op))


def has_in_place_form(node: Node) -> bool:
    """Whether `node` has an in-place form with the same result."""
    old, (new, *_) = node.arg("self"), node.outputs or (None,)
    if node.kind != "op" or not isinstance(old, Value) or new is None or new.type != old.type:
        return False
    return node.op in IN_PLACE or (node.op in VIEWS and part_of(node, _src, lambda _: None) is not None)


def _src(node: Node) -> Value:
    source = node.arg("src")
    assert isinstance(source, Value)
    return source


def _without_strides(value: Value) -> object:
    """The type of a tensor without its strides."""
    return isinstance(value.type, TensorType) and (value.type.dtype, value.type.shape, value.type.device)
