"""Results that kernels write over an input or weight, where the program would copy them at its end.

An optimizer does so, or a decoder with the counters of its cache. The copy costs as much memory, and nearly as much
time, as the kernels themselves.
"""

from __future__ import annotations

from collections import Counter

import torch

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.ir import COPY, Dim, Graph, Node, TensorType, Value, attr_values, has_parts

COPIES = frozenset(f"aten.{name}.default" for name in ("_to_copy", "clone", "copy"))
SIZES = frozenset(  # calls that need no contents of `self`
    f"aten.{name}.default"
    for name in ("full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones", "copy")
)
# Views, each element of which is in the same place, unless it repeats: dimensions of size 1 come and go.
RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "reshape.default", "expand.default", "alias.default"),
        *("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)
# Calls that make an element of no other or of one at any place of an operand: a loop over elements has these, too.
CHOICES = frozenset(
    f"aten.{name}"
    for name in (
        *("arange.default", "arange.start", "arange.start_step", "full.default", "scalar_tensor.default"),
        *("cat.default", "stack.default", "split.Tensor", "split_with_sizes.default", "unsafe_split.Tensor"),
        *("gather.default", "index.Tensor", "index_select.default", "embedding.default"),
        *("constant_pad_nd.default", "flip.default", "roll.default", "repeat.default"),
    )
)


def overwritten(graph: Graph, trusted: frozenset[str] = frozenset()) -> dict[str, Value]:
    """By the name of a kernel's result: the input or weight that the kernel can write it to, since a copy would do so
    later, and nothing reads the old contents in between, nor does the caller or a fallback get the result, nor a kernel
    add to it.

    Args:
        graph: as it is run, see `inline_kernels`; what it writes to must overlap nothing else that it has.
        trusted: see `compile_graph`.
    """
    values = (*graph.inputs, *(weight.value for weight in graph.weights))
    given, base = {value.name for value in values}, aten.bases(graph, trusted)
    makers = {v.name: at for at, node in enumerate(graph.nodes) if node.kind == "kernel" for v in node.results}
    readers: dict[str, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        for name in {base.get(value.name, value.name) for value in node.inputs}:
            readers.setdefault(name, []).append(at)
    fallbacks = [at for at, node in enumerate(graph.nodes) if node.kind == "fallback"]
    seen = (value for at in fallbacks for value in graph.nodes[at].inputs)
    kept = {base.get(value.name, value.name) for value in (*attr_values(graph.outputs), *seen)}
    writes = Counter(base.get(value.name, value.name) for node in graph.nodes for value in node.targets)
    kept |= {name for node in graph.nodes for new, old in continued(node).items() for name in (new, old.name)}
    found: dict[str, Value] = {}
    for at, node in enumerate(graph.nodes):
        target, source = node.arg("self"), node.arg("src")
        if node.op != COPY or len(node.args) != 2 or not isinstance(target, Value) or not isinstance(source, Value):
            continue
        first = makers.get(source.name)
        if first is None or source.name in kept or source.type != target.type:
            continue
        between = [*fallbacks, *readers[target.name]]
        if target.name not in given or writes[target.name] > 1 or any(first < other < at for other in between):
            continue
        if _is_safe(graph.nodes[first], source, target, base):
            found[source.name] = target
    return found


def writes_early(graph: Graph) -> bool:
    """Whether code of `graph` may write to an input or weight before it has read all others. Without updates of parts
    it need not, and does not where a result lies in an input that it does not write to: the caller gets this input
    itself, with what the graph leaves in memory that it shares with another one."""
    base, unwritten = aten.bases(graph), {value.name for value in graph.inputs} - graph.written
    returned = {base.get(value.name, value.name) for value in attr_values(graph.outputs)}
    return bool(graph.written) and (has_updates(graph) or unwritten.isdisjoint(returned))


def has_updates(graph: Graph) -> bool:
    """Whether `graph` replaces parts of an input or weight."""
    return any(node.writes and node.op != COPY for node in graph.nodes)


def _is_safe(node: Node, result: Value, target: Value, base: dict[str, str]) -> bool:
    """The kernel `node` reads an element of `target` before it writes the element of `result` in its place, if ever."""
    read = [index for index, value in enumerate(node.inputs) if base.get(value.name, value.name) == target.name]
    if not read:
        return True
    body = node.body
    if body is None or len(read) > 1 or node.inputs[read[0]] != target:
        return False
    inner, made = body.inputs[read[0]], body.outputs[node.outputs.index(result)]
    if not isinstance(made, Value):
        return False
    if not any(inner in _read(part) for part in body.nodes):
        return True
    if has_parts(body):
        users = [part for part in body.nodes if inner in part.inputs]
        return all(made in part.outputs and _is_safe(part, made, inner, {}) for part in users)
    return _comes_from_same_place(body, inner, made)


def _comes_from_same_place(body: Graph, source: Value, result: Value) -> bool:
    """A loop over elements, in which each call that needs `source` computes an element from those at its own place
    alone, and `result` is of one of these: the thread that stores it has loaded `source` there, and no other has.

    In a loop over rows several threads load what a row has once, and one of them stores it.
    """
    moved, place = {source.name}, _place(source)
    for node in body.nodes:
        if node.kind != "op" or moved.isdisjoint(value.name for value in _read(node)):
            known = _is_elementwise(node.op) or node.op in CHOICES or node.op in SIZES or _is_view(node.op)
            if node.kind != "op" or not known:
                return False
            continue
        if not (_is_elementwise(node.op) or node.op in RESHAPES):
            return False
        if any(_place(value) != place for value in node.results):
            return False
        moved.update(value.name for value in node.results)
    return result.name in moved


def _read(node: Node) -> tuple[Value, ...]:
    """The values whose contents a call in the body of a kernel needs."""
    args = (attr for key, attr in node.args if key != "self" or node.op not in SIZES)
    return tuple(value for attr in args for value in attr_values(attr))


def _place(value: Value) -> tuple[Dim, ...]:
    """The sizes of a tensor but those of 1, which say nothing about where an element is."""
    assert isinstance(value.type, TensorType)
    return tuple(size for size in value.type.shape if size != 1)


def _is_view(op: str) -> bool:
    return aten.is_view(aten.overload(op))


def _is_elementwise(op: str) -> bool:
    return op in COPIES or torch.Tag.pointwise in aten.overload(op).tags
