"""Horizontal fusion: independent loops, or products, of equal code become one kernel, whose parts they are.

An optimizer updates each parameter by a loop of its own, autocast casts each weight and each gradient, and a batch norm
updates its statistics: many loops that take hardly longer than their launch. Loops become one kernel where this does
not raise the peak of memory, neither that of the values that only kernels exchange, nor that of all others.

A few short loops of other code join where they read one tensor, as the parts of a merged projection of a decoder do.

Products near each other become one kernel where the programs of each would leave a part of the chip idle: queries, keys
and values whose weights may not be merged, and in training the gradients of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from math import inf

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Graph, Node, TensorType, Value, attr_values, has_parts
from torch_rtx.lowering.effects import is_barrier
from torch_rtx.lowering.fusion import is_kernel, kernel_name, prefers_split
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.generate import fastest
from torch_rtx.lowering.kernels.horizontal import loop_of_part
from torch_rtx.lowering.kernels.memory_model import bytes_of
from torch_rtx.lowering.kernels.reduction_rules import RULES
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.split_reduction import split_evenly
from torch_rtx.lowering.rewrite import returned, with_bases
from torch_rtx.op_work import ANCHORS
from torch_rtx.targets import Arch, Target

MAX_PARTS = 64
MAX_POINTERS = 256  # of 8 bytes each: half of the memory that CUDA always has for parameters
MAX_BYTES = 128 << 20  # that the parts move: more takes so much longer than a launch that nothing is gained
MAX_KINDS = 4  # of code: a kernel has the registers of the largest
MAX_MIXED_BYTES = 16 << 20  # that parts of several kinds move
NEAR = 8  # nodes between two parts of several kinds, or two products
GAIN = 0.9  # of the time of products one after another that they may take together
MAX_GROWTH = 1 << 20  # bytes: of each peak of memory, by all kernels with parts together


def fuse_horizontally(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import, after `fuse`, to the same level. A kernel with parts has a body of kernels alone.

    Args:
        targets: loops that are better split on one of these stay alone.
    """
    arches = tuple(dict.fromkeys(target.arch for target in targets))
    graph = _in_chunks(graph, arches)
    for find in (_groups, _mixed):
        schedule = _Schedule(graph)
        graph = _merged(graph, schedule, find(graph, schedule, arches))
    return graph


def _merged(graph: Graph, schedule: _Schedule, groups: list[list[int]]) -> Graph:
    """`graph` with one kernel for each group."""
    merged = {group[0]: group for group in groups}
    gone = {index for group in merged.values() for index in group[1:]}
    order = sorted(range(len(graph.nodes)), key=lambda index: schedule.position[index])
    nodes = (_kernel([graph.nodes[at] for at in merged.get(index, (index,))]) for index in order if index not in gone)
    return replace(graph, nodes=tuple(nodes))


def _in_chunks(graph: Graph, arches: tuple[Arch, ...]) -> Graph:
    """`graph` with kernels for the chunks of several long rows, such as norms of gradients, where they can be parts of
    one kernel. One such row alone is left to a library."""
    forms = {index: form for index, node in enumerate(graph.nodes) if (form := _chunked(node, arches)) is not None}
    codes = {index: code for index, form in forms.items() if (code := _code(form.nodes[0], arches)) is not None}
    counts = Counter(codes.values())
    taken = {value.name for value in graph.values()} | graph.syms.keys()
    nodes: list[Node] = []
    for index, node in enumerate(graph.nodes):
        nodes += _inlined(node, forms[index], taken) if counts[codes.get(index)] > 1 else [node]
    return replace(graph, nodes=tuple(nodes))


def _chunked(node: Node, arches: tuple[Arch, ...]) -> Graph | None:
    """The kernels of a call that reduces one long row to a number; None for other nodes."""
    if node.kind != "op" or len(node.inputs) != 1 or len(node.results) != len(node.outputs) or node.op not in RULES:
        return None
    source, names = node.inputs[0], (Value(f"v{i}", value.type) for i, value in enumerate(node.results, 1))
    operand, results = Value("in0", source.type), tuple(names)
    call = replace(node, args=node.map_inputs(lambda _: operand), outputs=results, loc=None)
    body = Graph("import", (operand,), nodes=(call,), outputs=results)
    try:
        return split_evenly(body, kernel_name(body)) if prefers_split(body, arches) else None
    except Unsupported:
        return None


def _inlined(node: Node, form: Graph, taken: set[str]) -> Iterator[Node]:
    """The kernels of `form` in place of `node`."""
    inner, outer = (*form.inputs, *attr_values(form.outputs)), (*node.inputs, *node.results)
    names = {value.name: other for value, other in zip(inner, outer, strict=True)}
    for kernel in form.nodes:
        for value in kernel.results:
            if value.name not in names:
                base = f"{node.results[0].name}_{value.name}"
                name = next(name for at in count() if (name := f"{base}_{at}" if at else base) not in taken)
                taken.add(name)
                names[value.name] = Value(name, value.type)
        args, made = kernel.map_inputs(lambda value: names[value.name]), kernel.results
        yield replace(kernel, args=args, outputs=tuple(names[value.name] for value in made), loc=node.loc)


def _groups(graph: Graph, schedule: _Schedule, arches: tuple[Arch, ...]) -> list[list[int]]:
    """The positions of the nodes that become one kernel; the schedule has them at one position."""
    equal: dict[object, list[int]] = {}
    epoch = 0
    for index, node in enumerate(graph.nodes):
        epoch += is_barrier(node)
        key = _code(node, arches)
        if key is not None:
            equal.setdefault((epoch, key), []).append(index)
    found: list[list[int]] = []
    for indices in equal.values():
        group: list[int] = []
        for index in indices:
            nodes = [graph.nodes[at] for at in (*group, index)]
            is_near = not group or index - group[-1] <= NEAR or not _is_product(nodes[-1])
            if not (is_near and _is_small(nodes) and _are_apart(nodes) and schedule.places([*group, index])):
                found += _gained(graph, schedule, group, arches)
                group = []
            group.append(index)
        found += _gained(graph, schedule, group, arches)
    return found


def _gained(graph: Graph, schedule: _Schedule, group: list[int], arches: tuple[Arch, ...]) -> list[list[int]]:
    """`group` merged, unless it is of products that take no less time together than one after another."""
    nodes = [graph.nodes[at] for at in group]
    if len(nodes) > 1 and _is_product(nodes[0]):
        together, alone = _kernel(nodes).body, nodes[0].body
        assert together is not None
        assert alone is not None
        if not all(_us(together, arch) < GAIN * len(nodes) * _us(alone, arch) for arch in arches):
            return []
    return schedule.merge(group)


def _mixed(graph: Graph, schedule: _Schedule, arches: tuple[Arch, ...]) -> list[list[int]]:
    """As `_groups`: short loops of a few kinds that read one tensor, and so can begin together."""
    found: list[list[int]] = []
    group: list[int] = []
    for index, node in enumerate(graph.nodes):
        if is_barrier(node) or (group and index - group[-1] > NEAR):
            found += schedule.merge(group)
            group = []
        if _code(node, arches) is None or node.body is None or region(node.body).reductions or _is_product(node):
            continue
        nodes = [graph.nodes[at] for at in (*group, index)]
        shares = not {*node.inputs}.isdisjoint(value for before in nodes[:-1] for value in before.inputs)
        small = (
            (shares or not group)
            and len(nodes) <= MAX_KINDS
            and _is_small(nodes, MAX_MIXED_BYTES)
            and _are_apart(nodes)
        )
        together = small and (not group or is_kernel(_kernel(nodes).body, arches))
        if not together or not schedule.places([*group, index]):
            found += schedule.merge(group)
            group = []
        group.append(index)
    return [*found, *schedule.merge(group)]


def _code(node: Node, arches: tuple[Arch, ...]) -> object:
    """What kernels must share to be parts of one; None for other nodes."""
    if node.kind != "kernel" or node.body is None or None in node.outputs or has_parts(node.body):
        return None
    try:
        if _is_product(node):
            return node.op
        code = loop_of_part(node.body)
    except Unsupported:
        return None
    return None if prefers_split(node.body, arches) else (code, tuple(node.body.syms))


def _is_product(node: Node) -> bool:
    anchor = None if node.body is None else region(node.body).anchor
    return anchor is not None and ANCHORS[anchor.op] == "gemm"


@lru_cache(maxsize=1024)  # layers of a model have equal products
def _us(body: Graph, arch: Arch) -> float:
    """The expected time of a kernel, in microseconds; infinite where there is none."""
    try:
        found = fastest(body, "trial", arch)
    except Unsupported:
        return inf
    return inf if found is None else found.expected_us


def _is_small(nodes: Sequence[Node], most: int = MAX_BYTES) -> bool:
    values = {value.name: value for node in nodes for value in (*node.inputs, *node.results)}
    partly = {name for node in nodes for new, old in continued(node).items() for name in (new, old.name)}
    types = (value.type for value in values.values() if value.name not in partly)
    moved = sum(bytes_of(type_) for type_ in types if isinstance(type_, TensorType))
    return len(nodes) <= MAX_PARTS and len(values) <= MAX_POINTERS and moved <= most


def _are_apart(nodes: Sequence[Node]) -> bool:
    """What one of the nodes writes to in memory, none of them uses otherwise."""
    begun = {operand.name for node in nodes for operand in continued(node).values()}
    return all(count == 1 for name, count in Counter(v.name for n in nodes for v in n.inputs).items() if name in begun)


def _kernel(nodes: Sequence[Node]) -> Node:
    """A kernel whose parts are `nodes`; of one node it is that node."""
    if len(nodes) == 1:
        return nodes[0]
    given = list({value.name: value for node in nodes for value in node.inputs}.values())
    made = [value for node in nodes for value in node.results]
    names = {value.name: Value(f"in{i}", value.type) for i, value in enumerate(given)}
    names |= {value.name: Value(f"v{i}", value.type) for i, value in enumerate(made, len(given))}
    inner = tuple(
        replace(
            node,
            args=node.map_inputs(lambda value: names[value.name]),
            outputs=tuple(names[value.name] for value in node.results),
            loc=None,
        )
        for node in nodes
    )
    inputs, outputs = (tuple(names[value.name] for value in values) for values in (given, made))
    body = Graph("import", inputs, nodes=inner, outputs=outputs)
    args = tuple((f"in{i}", value) for i, value in enumerate(given))
    return Node("kernel", kernel_name(body), args, tuple(made), body, nodes[0].loc)


@dataclass
class _Memory:
    """The memory of a result and its views: its bytes, the node that makes it, and the nodes that read it."""

    nbytes: int
    made: int
    readers: list[int]
    in_arena: bool


class _Schedule:
    """The order of the nodes of `graph`, while some are merged.

    Attributes:
        position: of each node; merged nodes have the same.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self.position = list(range(len(graph.nodes)))
        self._producer = {value.name: index for index, node in enumerate(graph.nodes) for value in node.results}
        self._readers: dict[str, list[int]] = {}
        for index, node in enumerate(graph.nodes):
            for value in node.inputs:
                self._readers.setdefault(value.name, []).append(index)
        self._memories = list(self._memory(graph))
        self._most = [self._peak(in_arena) + MAX_GROWTH for in_arena in (True, False)]

    def _memory(self, graph: Graph) -> Iterator[_Memory]:
        base, end = aten.bases(graph), len(graph.nodes)
        for node in graph.nodes:
            base |= {name: base.get(start.name, start.name) for name, start in continued(node).items()}
        base = {name: base.get(owner, owner) for name, owner in base.items()}
        found: dict[str, _Memory] = {}
        seen = {v.name for node in graph.nodes if node.kind == "fallback" for v in node.inputs}  # it may keep these
        kept = with_bases(graph, returned(graph))
        outside = kept | with_bases(graph, seen)
        for index, value in ((i, value) for i, node in enumerate(graph.nodes) for value in node.results):
            if isinstance(value.type, TensorType) and value.type.device == MAIN and value.name not in base:
                node = graph.nodes[index]
                inside = (node.kind == "kernel" or node.op in aten.OUT) and value.name not in outside
                found[value.name] = _Memory(bytes_of(value.type), index, [end] if value.name in kept else [], inside)
        for name, readers in self._readers.items():
            if (memory := found.get(base.get(name, name))) is not None:
                memory.readers += readers
        yield from found.values()

    def _peak(self, in_arena: bool) -> int:
        """The most bytes that are alive at once, in the arena or outside of it."""
        changes = [0] * (len(self.nodes) + 2)
        at = [*self.position, len(self.nodes)]
        for memory in self._memories:
            if memory.in_arena == in_arena:
                changes[at[memory.made]] += memory.nbytes
                changes[max(at[index] for index in (memory.made, *memory.readers)) + 1] -= memory.nbytes
        return max(accumulate(changes))

    def places(self, group: Sequence[int]) -> list[int]:
        """Where the nodes of a group can be one: at the last of them, before others read their results, unless that
        keeps inputs of the graph, such as activations, longer; or at the first, after their operands are made."""
        positions = [self.position[index] for index in group]
        last, first = max(positions), min(positions)
        operands = {value.name for index in group for value in self.nodes[index].inputs}
        results = {value.name for index in group for value in self.nodes[index].results}
        made = [self.position[self._producer[name]] for name in operands if name in self._producer]
        read = {name: [self.position[at] for at in self._readers.get(name, ())] for name in operands | results}
        late = all(min(read[name], default=last + 1) > last for name in results)
        late = late and all(max(read[name]) >= last for name in operands if name not in self._producer)
        return [last] * late + [first] * all(at < first for at in made)

    def merge(self, group: Sequence[int]) -> list[list[int]]:
        """Merge the nodes of a group; where this takes memory, those of its halves."""
        if len(group) < 2:
            return []
        before = list(self.position)
        for place in self.places(group):
            for index in group:
                self.position[index] = place
            if self._peak(True) <= self._most[0] and self._peak(False) <= self._most[1]:
                return [[*group]]
            self.position = list(before)
        half = len(group) // 2
        return self.merge(group[:half]) + self.merge(group[half:])
