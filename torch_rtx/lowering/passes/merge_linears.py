"""Merges linear layers that read the same input into one with concatenated weights, such as query, key and value.

One large matmul uses the GPU better than three small ones. The concatenation is a recipe (`hoist_weights` moves it);
the results are slices of the merged result. Layers with results of different lifetimes merge only if that takes little
memory: the keys and values that all decoder layers compute from one encoder would stay alive until the last layer.

Equal operations on each element that follow all layers merge as well, step by step, such as the scales of int8:

    scale(int_mm(x, q), s), scale(int_mm(x, k), t)  ->  slices of scale(int_mm(x, cat(q, k)), cat(s, t))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_dims, type_dims
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.index import Index, from_dim, product
from torch_rtx.lowering.kernels.region import ANCHORS
from torch_rtx.lowering.merged_steps import Steps
from torch_rtx.lowering.merged_weights import MergedWeights, is_pointwise
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.rewrite import Rewriter, Users, from_weights, returned, rewrite, with_bases, with_sources
from torch_rtx.lowering.widening import storable
from torch_rtx.op_work import INT_MM, PRODUCTS, SCALED_MM

LINEAR, SCALE = "aten.linear.default", "scale_b"


def merge_linears(graph: Graph, infer: Inference, weight_copies: bool = True) -> Graph:
    """Level import to level import.

    Layers merge if their weights are parameters of one dtype, views of such or computed from such row by row, by equal
    calls; if nothing depends on the strides of their results (slices have others); and if no anchor between them
    depends on one of them, unless the merged result is no larger than the largest other tensor of the graph. A missing
    bias counts as zeros. Products of float8 with scales merge as well; a weight that scales all columns becomes one for
    each of them. Products of int8 merge with all operations on their elements, which are to be their epilogue, or not
    at all.

    Args:
        weight_copies: parameters may be stored once more, and not what recipes compute alone.
    """
    graph = dce(graph, infer)  # such as views that others have replaced: they hide that operations follow each other
    weights, views = _weights(graph)
    graph = _first(graph, set(map(id, views)))  # what the weights of a later layer need comes before the first one
    seen = returned(graph) | {v.name for n in graph.nodes if n.kind == "fallback" for v in n.inputs}
    layout_visible = with_bases(graph, seen)
    layout_visible |= with_sources(graph, {v.name for n in graph.nodes if n.op in aten.STRIDED for v in n.inputs})
    layout_visible |= aten.shared(graph)  # a copy to the captured strides would part results that share memory
    candidates = (n for n in graph.nodes if not any(v.name in layout_visible for v in n.results))
    computed, may_store = MergedWeights(graph), storable(graph, weight_copies)
    layers = {id(node): _group(node, weights, computed, may_store) for node in candidates}
    steps = Steps(graph, infer, layout_visible, computed)
    groups = [steps.after(group) for group in _groups(graph, layers) if len(group) > 1]
    groups = [group for group in groups if group[0][0].op != INT_MM or _is_whole(group[-1], steps.readers)]
    graph = _first(graph, steps.constants_of(groups))
    places = {id(node): (group, at, group[at]) for group in groups for at in range(len(group)) for node in group[at]}
    made: dict[int, list[Value]] = {}  # by group: the merged layer, and the merged steps after it so far
    spread: set[str] = set()

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if id(node) not in places:
            return _spread(node, spread, rewriter)
        group, at, step = places[id(node)]
        if node is group[0][0]:
            with suppress(Unsupported):
                made[id(group)] = [_Merging(step, rewriter, computed, weights).product()]
        if id(group) not in made:
            return False
        found = made[id(group)]
        if at == len(found):
            found.append(steps.emit(step, group[at - 1], found[-1], rewriter))
        if step is group[-1]:
            which = next(i for i, n in enumerate(step) if n is node)
            start = sum(map(_rows, group[0][:which]))
            end = start + _rows(group[0][which])
            piece = rewriter.emit("aten.slice.Tensor", node.loc, self=found[-1], dim=-1, start=start, end=end)
            rewriter.replace(node.outputs[0], piece)
        return True

    return rewrite(graph, infer, visit)


def _spread(node: Node, spread: set[str], rewriter: Rewriter) -> bool:
    """Keep a view of some elements of a slice, such as a chunk of it, with the strides that it has now. They can't be
    chosen as those of a whole result can: they are the distances in the memory of another.

    Args:
        spread: the names of all such results.
    """
    source = next(iter(node.inputs), None)
    if source is None or rewriter.current(source) is source or not aten.is_view(aten.overload(node.op)):
        return False
    if source.name not in spread and all(_count(value) == _count(source) for value in node.results):
        return False
    args = node.map_inputs(rewriter.current)
    try:
        types = rewriter.infer(node.op, args)
    except Unsupported:
        return False
    named = zip(node.outputs, types, strict=True)
    kept = [None if old is None or type_ is None else replace(old, type=type_) for old, type_ in named]
    for value, by in zip(node.outputs, kept, strict=True):
        if value is not None and by is not None:
            rewriter.replace(value, by)
            spread.add(value.name)
    rewriter.nodes.append(replace(node, args=args, outputs=tuple(kept)))
    return True


def _count(value: Value) -> Index:
    """The number of elements."""
    return product(map(from_dim, type_of(value).shape))


def _first(graph: Graph, nodes: Set[int]) -> Graph:
    """The graph with these nodes, by id, before all others."""
    return replace(graph, nodes=tuple(sorted(graph.nodes, key=lambda node: id(node) not in nodes)))


def _is_whole(results: list[Node], readers: Users) -> bool:
    """Nothing more is computed of the elements of these results alone."""
    return not any(
        is_pointwise(reader) for node in results for value in node.results for reader in readers.get(value.name, ())
    )


def _weights(graph: Graph) -> tuple[set[str], list[Node]]:
    """The names of the parameters that the graph does not write, of all views of them, and of what products of int8
    and float8 read that is computed from them; and the nodes of these. Nodes with sizes that vary are none: the node
    that such a size comes from may be a later one, and the result is no weight of a layer."""
    names, nodes = {weight.value.name for weight in graph.weights} - graph.written, []
    products = (node for node in graph.nodes if node.op in (INT_MM, SCALED_MM))
    read = {value.name for node in products for value in node.inputs} & from_weights(graph)
    for node in reversed(graph.nodes):
        if any(value.name in read for value in node.results):
            read.update(value.name for value in node.inputs)
    for node in graph.nodes:
        seen = node.kind == "op" and aten.is_view(aten.overload(node.op)) and bool(node.inputs)
        seen = seen and all(value.name in names for value in node.inputs) and not _varies(node)
        if seen or any(value.name in read for value in node.results):
            names.update(value.name for value in node.results)
            nodes.append(node)
    return names, nodes


def _varies(node: Node) -> bool:
    """A size in an argument or a result is no plain number."""
    given = any(True for _, attr in node.args for _ in attr_dims(attr))
    return given or any(not isinstance(dim, int) for value in node.results for dim in type_dims(value.type))


def _groups(graph: Graph, layers: Mapping[int, object]) -> list[list[Node]]:
    """The groups of nodes to merge.

    Args:
        layers: the key of each candidate, by node id; nodes with equal keys can merge.
    """
    largest = max((_bytes(node, unknown=0) for node in graph.nodes), default=0)
    groups: list[list[Node]] = []
    for subgroups in _independent(graph, layers).values():
        merged = [node for subgroup in subgroups for node in subgroup]
        groups += [merged] if sum(_bytes(node, unknown=inf) for node in merged) <= largest else subgroups
    return groups


def _bytes(node: Node, unknown: float) -> float:
    """Bytes of the node's largest static result; `unknown` if it has none."""
    types = [value.type for value in node.results if isinstance(value.type, TensorType)]
    counts = [(type_.dtype, product(map(from_dim, type_.shape)).number) for type_ in types]
    known = [count * aten.DTYPES[dtype].itemsize for dtype, count in counts if count is not None]
    return max(known, default=unknown)


def _independent(graph: Graph, layers: Mapping[int, object]) -> dict[object, list[list[Node]]]:
    """The nodes of each key in subgroups: no anchor between two nodes of a subgroup depends on one of them."""
    found: dict[object, list[list[Node]]] = {}
    current: dict[object, list[Node]] = {}  # the open subgroup of each key
    sources: dict[str, set[object]] = {}  # keys of the open subgroups on which a value depends without an anchor
    for node in graph.nodes:
        needed = set[object]().union(*(sources.get(value.name, ()) for value in node.inputs))
        if node.op in ANCHORS:
            for key in needed:
                current.pop(key, None)
            needed = set()
        key = layers.get(id(node))
        if key is not None:
            if key not in current:
                current[key] = []
                found.setdefault(key, []).append(current[key])
            current[key].append(node)
            needed = {key}
        sources.update((value.name, needed) for value in node.results if needed)
    return found


def _group(node: Node, weights: set[str], computed: MergedWeights, may_store: Callable[[Value], bool]) -> object:
    """The properties that layers must share to merge; None for other nodes."""
    if node.op not in (LINEAR, INT_MM, SCALED_MM) or node.kind != "op":
        return None
    source, weight = (node.arg(name) for name in PRODUCTS[node.op][:2])
    # What each layer has of its own; the scale of all columns may be a number that all layers share.
    separate = PRODUCTS[node.op].second, "bias", *((SCALE,) if _scale_is_weight(node, weights) else ())
    if not isinstance(source, Value) or not isinstance(weight, Value) or not isinstance(weight.type, TensorType):
        return None
    if not may_store(weight):
        return None
    how = computed.key(weight, 0) if node.op == LINEAR and weight.name not in weights else None
    own = [attr for attr in map(node.arg, separate) if isinstance(attr, Value) and (how is None or attr is not weight)]
    if any(value.name not in weights for value in own) or not _has_scales_of_columns(node):
        return None
    rest = tuple((name, attr) for name, attr in node.args if name not in separate)
    return node.op, source.name, weight.type.dtype, weight.type.device, how, rest


def _scale_is_weight(node: Node, weights: set[str]) -> bool:
    scale = node.arg(SCALE)
    return isinstance(scale, Value) and scale.name in weights


def _has_scales_of_columns(node: Node) -> bool:
    """What scales the product is one number, or one for each column; or nothing does."""
    scale = node.arg(SCALE)
    if not isinstance(scale, Value) or not isinstance(scale.type, TensorType):
        return scale is None
    return scale.type.dtype == "f32" and scale.type.shape in ((), (1,), (1, 1), (1, _rows(node)))


def _rows(node: Node) -> int:
    """Rows of a layer's weight: columns of its result."""
    (result,) = node.results
    assert isinstance(result.type, TensorType)
    return result.type.shape[-1]  # type: ignore[return-value]  # parameters have no symbolic sizes


@dataclass(frozen=True)
class _Merging:
    """One layer in place of a group of layers.

    Args:
        weights: see `_weights`.
    """

    group: list[Node]
    rewriter: Rewriter
    computed: MergedWeights
    weights: set[str]

    def product(self) -> Value:
        """The merged layer."""
        first = self.group[0]
        second, order = PRODUCTS[first.op].second, aten.schema(aten.overload(first.op))
        args = {name: self.rewriter.current(attr) if isinstance(attr, Value) else attr for name, attr in first.args}
        args[second] = self._weight([value for node in self.group if isinstance(value := node.arg(second), Value)])
        if _scale_is_weight(first, self.weights):
            args[SCALE] = self._cat(list(map(self._scale, self.group)), dim=1)
        if any(node.arg("bias") is not None for node in self.group):
            args["bias"] = self._cat([self._bias(node, args[second]) for node in self.group])
        return self.rewriter.emit(first.op, first.loc, **{name: args[name] for name in order if name in args})

    def _weight(self, weights: list[Value]) -> Value:
        op, axis = self.group[0].op, 0 if self.group[0].op == LINEAR else 1
        if weights[0].name not in self.weights or (op != LINEAR and self.computed.are_equal(weights, axis)):
            found = self.computed.merged(weights, axis, self.rewriter)
            if op == LINEAR or type_of(found).strides[0] == 1:
                return found
        if op == LINEAR:
            return self._cat(weights)
        # its rows are to stay contiguous along K
        loc = self.group[0].loc
        rows = self._cat([self.rewriter.emit("aten.t.default", loc, self=weight) for weight in weights])
        return self.rewriter.emit("aten.t.default", loc, self=rows)

    def _bias(self, node: Node, weight: Attr) -> Attr:
        if node.arg("bias") is not None:
            return node.arg("bias")
        dtype = {} if node.op == LINEAR else {"dtype": node.arg("out_dtype")}
        return self.rewriter.emit("aten.new_zeros.default", node.loc, self=weight, size=(_rows(node),), **dtype)

    def _scale(self, node: Node) -> Attr:
        scale, shape = node.arg(SCALE), (1, _rows(node))
        if isinstance(scale, Value) and isinstance(scale.type, TensorType) and scale.type.shape != shape:
            one = self.rewriter.emit("aten.view.default", node.loc, self=scale, size=(1, 1))
            return self.rewriter.emit("aten.expand.default", node.loc, self=one, size=shape)
        return scale

    def _cat(self, tensors: Sequence[Attr], **dim: Attr) -> Value:
        return self.rewriter.emit("aten.cat.default", self.group[0].loc, tensors=tuple(tensors), **dim)
