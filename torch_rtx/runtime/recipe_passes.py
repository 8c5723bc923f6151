"""Recipes with fewer passes over memory, for GPUs, where each call reads its operands and writes its result.

| a recipe has | it runs as |
|---|---|
| the largest of all magnitudes: `abs`, `amax` | a norm, which writes no magnitudes |
| a cast to float32, read by arithmetic or by a norm, also behind views | these alone: they widen what they read |
| a cast to float32 and back | what was cast |

Bits stay as they are: a widening cast is exact, and so are magnitudes and their extremes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_map, attr_values, contiguous
from torch_rtx.runtime.joint_recipes import is_separate

_ABS, _MOST, _CAST = "aten.abs.default", "aten.amax.default", "aten._to_copy.default"
_NORM, _CAT = "aten.linalg_vector_norm.default", "aten.cat.default"
_ARITHMETIC = frozenset(f"aten.{name}.Tensor" for name in ("add", "div", "mul", "sub"))
_VIEWS = ("aten.permute.default", "aten.t.default", "aten.transpose.int", "aten.unsqueeze.default", "aten.view.default")
_HALVES = ("f16", "bf16")
_WIDENED = frozenset((*_HALVES, "i8", "u8", "i16"))  # what arithmetic with float32 widens, to what a cast gives


def fewer_passes(graph: Graph) -> Graph:
    """The graph with fewer calls, which give the same bits."""
    lean = _Lean({value.name: node for node in graph.nodes for value in node.results}, {v.name for v in graph.values()})
    for node in graph.nodes:
        lean.add(node)
    outputs = tuple(attr_map(output, lean.whole) for output in graph.outputs)
    made = replace(graph, nodes=tuple(lean.nodes), outputs=outputs)
    made = replace(made, nodes=_used(made))
    return made if is_separate(made) else graph


def joined_inputs(graph: Graph) -> tuple[Graph, list[tuple[int, ...]]]:
    """A graph of stacked inputs, which takes as one those that it only concatenates, member by member; and the inputs,
    by index, that each of its inputs has."""
    names = [value.name for value in graph.inputs]
    readers = Counter(value.name for node in graph.nodes for value in node.inputs)
    readers.update(value.name for value in attr_values(graph.outputs))
    groups: dict[str, tuple[int, ...]] = {name: (index,) for index, name in enumerate(names)}
    joined, nodes = dict[str, Value](), list[Node]()
    for node in graph.nodes:
        parts = [value.name for value in node.inputs]
        joins = node.op == _CAT and node.arg("dim", 0) == 1 and all(map(_is_contiguous, node.inputs))
        if joins and all(readers[part] == 1 and part in names for part in parts):
            joined[parts[0]] = node.results[0]
            groups[parts[0]] = tuple(map(names.index, parts))
            for part in parts[1:]:
                del groups[part]
        else:
            nodes.append(node)
    inputs = tuple(joined.get(value.name, value) for value in graph.inputs if value.name in groups)
    return replace(graph, inputs=inputs, nodes=tuple(nodes)), list(groups.values())


@dataclass
class _Lean:
    """The graph so far.

    Attributes:
        made: by its result's name, each call of the graph as it was.
        names: of all values.
        narrow: by its name, what a value in float32 is when it is not widened.
        cast: the names of these that are in memory as float32, too.
        same: by its name, the value that another one equals.
    """

    made: dict[str, Node]
    names: set[str]
    nodes: list[Node] = field(default_factory=list)
    narrow: dict[str, Value] = field(default_factory=dict)
    cast: set[str] = field(default_factory=set)
    same: dict[str, Value] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Add a call."""
        node = replace(node, args=node.map_inputs(lambda value: self.same.get(value.name, value)))
        if self.widens(node) or self.moves(node) or self.narrows(node):
            return
        node = self.norm(node)
        lazy = [value for value in node.inputs if value.name in self.narrow and self.takes(node, value)]
        read = {value.name: self.narrow[value.name] for value in lazy}
        args = node.map_inputs(lambda value: read.get(value.name) or self.whole(value))
        self.nodes.append(replace(node, args=(*args, ("dtype", "f32")) if lazy and node.op == _NORM else args))

    def whole(self, value: Value) -> Value:
        """The value as it was, in memory."""
        value = self.same.get(value.name, value)
        if value.name in self.narrow and value.name not in self.cast:
            self.cast.add(value.name)
            args = ("self", self.narrow[value.name]), ("dtype", "f32")
            self.nodes.append(Node("op", _CAST, args, (value,)))
        return value

    def widens(self, node: Node) -> bool:
        """Whether the call is a cast to float32, which waits until it is needed."""
        if not _is_cast(node) or _dtype(node.results[0]) != "f32" or _dtype(node.inputs[0]) not in _WIDENED:
            return False
        (wide,), (source,) = node.results, node.inputs
        assert isinstance(source.type, TensorType)
        if wide.type != replace(source.type, dtype="f32"):
            return False  # as of what was expanded: views of one are none of the other
        self.narrow[wide.name] = source
        return True

    def moves(self, node: Node) -> bool:
        """Whether the call is a view of what was not widened yet: it can wait as well."""
        if node.op not in _VIEWS or len(node.inputs) != 1 or node.inputs[0].name not in self.narrow:
            return False
        (out,), source = node.results, self.narrow[node.inputs[0].name]
        assert isinstance(out.type, TensorType)
        name = f"{out.name}_narrow"
        while name in self.names:
            name += "_"
        self.names.add(name)
        view = Value(name, replace(out.type, dtype=_dtype(source)))
        args = node.map_inputs(lambda value: source)
        self.nodes.append(replace(node, args=args, outputs=(view,)))
        self.narrow[out.name] = view
        return True

    def narrows(self, node: Node) -> bool:
        """Whether the call is a cast back to what there is."""
        source = self.narrow.get(node.inputs[0].name) if _is_cast(node) else None
        if source is None or source.type != node.results[0].type:
            return False
        self.same[node.results[0].name] = source
        return True

    def norm(self, node: Node) -> Node:
        """The call; of the largest magnitude, as a norm."""
        inner = self.made.get(node.inputs[0].name) if node.op == _MOST else None
        source = inner.inputs[0] if inner is not None and inner.op == _ABS else None
        if source is None or _rank(source) == 0 or _dtype(source) not in (*_HALVES, "f32", "f64"):
            return node
        source, keep = self.same.get(source.name, source), node.arg("keepdim", False)
        args: dict[str, Attr] = {"self": source, "ord": math.inf, "dim": node.arg("dim", ()) or None, "keepdim": keep}
        return replace(node, op=_NORM, args=tuple(args.items()))

    def takes(self, node: Node, value: Value) -> bool:
        """Whether a call gives the same for what was cast: a norm, which has a dtype, or arithmetic with another
        operand that is float32 and has dimensions. Else PyTorch takes the dtype of the one that has."""
        if node.op == _NORM:
            return _dtype(self.narrow[value.name]) in _HALVES
        others = [other for other in node.inputs if other.name != value.name]
        if node.op not in _ARITHMETIC or node.arg("alpha", 1) != 1 or len(others) != 1:
            return False
        return others[0].name not in self.narrow and _dtype(others[0]) == "f32" and _rank(others[0]) > 0


def _used(graph: Graph) -> tuple[Node, ...]:
    """The calls, without magnitudes, casts and views that nothing reads."""
    read, nodes = {value.name for value in attr_values(graph.outputs)}, list[Node]()
    for node in reversed(graph.nodes):
        if node.op not in (_ABS, _CAST, *_VIEWS) or any(value.name in read for value in node.results):
            nodes.append(node)
            read |= {value.name for value in node.inputs}
    return tuple(reversed(nodes))


def _is_cast(node: Node) -> bool:
    """A cast, and nothing else."""
    return node.op == _CAST and {name for name, _ in node.args} == {"self", "dtype"}


def _is_contiguous(value: Value) -> bool:
    """Each member is."""
    type_ = value.type
    return isinstance(type_, TensorType) and type_.strides[1:] == contiguous(type_.shape[1:])


def _dtype(value: Value) -> str:
    return value.type.dtype if isinstance(value.type, TensorType) else ""


def _rank(value: Value) -> int:
    return len(value.type.shape) if isinstance(value.type, TensorType) else 0
