"""Which operations become one kernel: units of a graph that grow by merging along their edges.

A unit starts as one operation. It has a domain: a number of elements, or of rows and their size where it reduces. The
producer of a value and its consumer merge where their domains are one loop, where no way leads from the one to the
other through a third unit, and where code can be generated for both together. A producer of another size merges only if
the consumer is its only user: it is then computed where it is needed, as often as that is. Views belong to no unit:
each kernel absorbs those on its way in, and whoever reads the result through a view gets the view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import COPY, Graph, Loc, Node, TensorType, Value, attr_values
from torch_rtx.lowering.kernels.generate import forms, generate
from torch_rtx.lowering.kernels.index import Index, from_dim, product
from torch_rtx.lowering.kernels.kernel_ir import Load, Pointwise, Tensor, View, everything, load
from torch_rtx.lowering.kernels.loops import loop_kernel, rows_of
from torch_rtx.lowering.kernels.region import Region, express, region, tensor_type
from torch_rtx.lowering.widening import is_elementwise, widens
from torch_rtx.op_work import ANCHORS
from torch_rtx.targets import Arch

MAX_MEMBERS = 64
MAX_POINTERS = 24
# What may be computed again for every element that needs it, where the consumer is larger: operations per element.
CHEAP = 4
TINY = 4096  # elements of a loop that takes no longer than a launch
LONG_ROW = 16384  # so few rows of this size leave a GPU idle, unless they are reduced in parts
FEW_ROWS = 64
PLAIN = {"_native_batch_norm_legit_no_training": "batch_norm"}  # what operators are called in the names of kernels


@dataclass(frozen=True)
class Domain:
    """The loop of a unit: `count` elements, or `count` rows of `size` elements, which are neighbours or not."""

    count: Index
    size: Index | None = None
    inner: bool = False

    @property
    def elements(self) -> tuple[Index, ...]:
        """How many elements a result may have."""
        return (self.count,) if self.size is None else (self.count, self.count * self.size)


@dataclass(eq=False)
class Unit:
    """Nodes, by position, that run together. Without a domain: one node that is called as it is."""

    members: list[int]
    epoch: int
    domain: Domain | None = None
    cost: int = 0
    steps: list[Node] | None = None  # an anchor and what follows it, where these are one kernel


@lru_cache(maxsize=1024)  # layers of a model have equal regions
def _is_loop(body: Graph) -> bool:
    """Whether `body` is one loop over rows."""
    try:
        loop_kernel(region(body), "trial")
    except Unsupported:
        return False
    return True


@lru_cache(maxsize=1024)
def _is_kernel(body: Graph, arches: tuple[Arch, ...]) -> bool:
    """Whether a kernel can be generated for `body` on any of `arches`: on others it runs call by call."""
    for arch in arches:
        try:
            generate(body, "trial", arch, 0)
        except Unsupported:
            continue
        return True
    return False


@lru_cache(maxsize=1024)
def _is_split(body: Graph, arches: tuple[Arch, ...]) -> bool:
    """Whether a body of several kernels is expected to be the fastest way to run `body` on any of `arches`."""
    return any(forms(body, "trial", arch)[0][0].body is not None for arch in arches)


class Grouping:
    """The units of `graph`, merged.

    Args:
        arches: what kernels are for.
    """

    def __init__(self, graph: Graph, arches: tuple[Arch, ...]) -> None:
        self.graph, self.nodes, self.arches = graph, graph.nodes, arches
        self.producer = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs if v is not None}
        self.views = {i for i, node in enumerate(graph.nodes) if absorbed(node)}
        self.unit: dict[int, Unit] = {}  # of every node that is no view
        self.readers: dict[str, list[int]] = {}  # of a value, also through views
        self.reducing: set[int] = set()
        self.outside: set[str] = {self.base(v).name for v in attr_values(graph.outputs)}
        self._start()
        for index in sorted(self.unit):
            self._merge_into(index)
        for index in sorted(self.unit):
            if self.nodes[index].kind == "op" and self.nodes[index].op in ANCHORS:
                self._anchor(index)
        self._merge_siblings()

    # ---- the start ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        epoch = 0
        for index, node in enumerate(self.nodes):
            if index in self.views:
                continue
            for value in node.inputs:
                self.readers.setdefault(self.base(value).name, []).append(index)
            barrier = node.kind == "fallback" or node.op == COPY  # what they read and write may not move across them
            epoch += barrier
            domain, cost = (None, 0) if barrier or node.kind != "op" else domain_of(node)
            self.unit[index] = Unit([index], epoch, domain, cost)
            if domain is not None and domain.size is not None:
                self.reducing.add(index)
            epoch += barrier

    def base(self, value: Value) -> Value:
        """What `value` is a view of, or itself."""
        index = self.producer.get(value.name)
        while index in self.views:
            value = self.nodes[index].inputs[0]
            index = self.producer.get(value.name)
        return value

    # ---- merging -----------------------------------------------------------------------------------------------------

    def _merge_into(self, index: int) -> None:
        for value in self.nodes[index].inputs:
            before = self.producer.get(self.base(value).name)
            if before is None:
                continue
            first, second = self.unit[before], self.unit[index]
            domain = self._joined(first, second) if first is not second else None
            if domain is None or self._leads_around(first, second):
                continue
            self._unite(first, second, domain)

    def _unite(self, first: Unit, second: Unit, domain: Domain) -> None:
        """Makes both one unit, if it is small enough and has code."""
        merged = Unit(sorted(first.members + second.members), first.epoch, domain, first.cost + second.cost)
        if len(merged.members) <= MAX_MEMBERS:
            self._adopt(merged)

    def _joined(self, first: Unit, second: Unit) -> Domain | None:
        """The domain of both, where it is one."""
        one, two = first.domain, second.domain
        if one is None or two is None or first.epoch != second.epoch:
            return None
        if one.size is not None and two.size is not None:
            return one if one == two else None
        if one.size is None and (one.count in two.elements):
            return two
        if one.size is not None:
            return one if two.count in one.elements and not self._feeds_other_rows(second, one) else None
        alone = all(self.unit[i] is second for i in self.users(first)) and not self.escapes(first)
        return two if alone and (first.cost <= CHEAP or _no_more(two, one)) else None

    def _feeds_other_rows(self, unit: Unit, domain: Domain) -> bool:
        """Whether all that `unit` is for are reductions of other rows: columns, where `domain` is rows."""
        users = list(self.users(unit))
        return (
            bool(users)
            and not self.escapes(unit)
            and all(i in self.reducing and self.unit[i].domain != domain for i in users)
        )

    def users(self, unit: Unit) -> Iterator[int]:
        """The nodes outside of `unit` that read its results, also through views."""
        for value in self.results(unit):
            yield from (i for i in self.readers.get(value.name, ()) if self.unit[i] is not unit)

    def results(self, unit: Unit) -> Iterator[Value]:
        """Everything that the nodes of `unit` compute."""
        for member in unit.members:
            yield from (value for value in self.nodes[member].outputs if value is not None)

    def escapes(self, unit: Unit) -> bool:
        """Whether the graph returns a result of `unit`."""
        return any(value.name in self.outside for value in self.results(unit))

    def _leads_around(self, first: Unit, second: Unit) -> bool:
        """Whether a third unit needs `first` and is needed by `second`."""
        seen = {id(first), id(second)}
        left = [self.unit[i] for i in self.users(first) if self.unit[i] is not second]
        while left:
            unit = left.pop()
            if id(unit) in seen:
                continue
            seen.add(id(unit))
            for index in self.users(unit):
                if self.unit[index] is second:
                    return True
                left.append(self.unit[index])
        return False

    def _merge_siblings(self) -> None:
        """Merges loops of one domain that do not need each other: those that read the same value, which is then read
        once, and those that are so small that a launch is all they take."""
        for readers in self.readers.values():
            self._merge_alike(readers)
        self._merge_alike([index for index, unit in self.unit.items() if _is_tiny(unit.domain)])

    def _merge_alike(self, indices: list[int]) -> None:
        """Merges those units of nodes that are loops of one domain and do not need each other."""
        found: dict[tuple[int, Domain], Unit] = {}
        for index in indices:
            second = self.unit[index]
            if second.domain is None:
                continue
            loop = second.epoch, second.domain
            first = found.get(loop, second)
            if first is not second and not (self._leads(first, second) or self._leads(second, first)):
                self._unite(first, second, second.domain)
            found[loop] = self.unit[index]

    def _leads(self, first: Unit, second: Unit) -> bool:
        """Whether `second` needs `first`, by itself or through others."""
        return any(self.unit[i] is second for i in self.users(first)) or self._leads_around(first, second)

    def _adopt(self, unit: Unit) -> bool:
        """Puts `unit` in the place of its members' units, if code can then be generated for it: what they alone read is
        no result of it any more."""
        before = {member: self.unit[member] for member in unit.members}
        self.unit.update(dict.fromkeys(unit.members, unit))
        if self._has_code(unit):
            return True
        self.unit.update(before)
        return False

    def _has_code(self, unit: Unit) -> bool:
        inputs, outputs = self.interface(unit)
        if len(inputs) + len(outputs) > MAX_POINTERS:
            return False
        if unit.steps is not None:
            return _is_kernel(self.body(unit), self.arches)
        # maps of any kind are one loop
        return unit.domain is None or unit.domain.size is None or _is_loop(self.body(unit))

    # ---- anchors -----------------------------------------------------------------------------------------------------

    def _anchor(self, index: int) -> None:
        """Makes a kernel of the anchor at `index`: with the chains that widen its operands (the prologue) and the loop
        over its result (the epilogue), where these are its alone and there is code for all. Both stay kernels inside
        of that kernel: the anchor can so be left to a library call."""
        anchor = self.unit[index]
        readers = {id(self.unit[i]): self.unit[i] for i in self.users(anchor)}
        tail = next(iter(readers.values())) if len(readers) == 1 and not self.escapes(anchor) else None
        after = [tail] if tail is not None and self._follows(tail, anchor) else []
        before = self._prologue(index)
        choices = ([*before, anchor, *after], [anchor, *after], [*before, anchor], [anchor])
        for units in (units for at, units in enumerate(choices) if units not in choices[:at]):
            steps = [node for unit in units for node in self._steps(unit)]
            members = sorted(member for unit in units for member in unit.members)
            if self._adopt(Unit(members, anchor.epoch, steps=steps)):
                return

    def _steps(self, unit: Unit) -> list[Node]:
        """A unit inside of a kernel: a kernel of its own, or the calls where these are better."""
        loop = unit.domain is not None and self.worthwhile(unit)
        return [self.kernel(unit)] if loop else [self.nodes[member] for member in unit.members]

    def _prologue(self, index: int) -> list[Unit]:
        """The loops that widen operands of the anchor at `index` for it alone."""
        found: dict[int, Unit] = {}
        for value in self.nodes[index].inputs:
            unit = self.unit.get(self.producer.get(self.base(value).name, -1))
            if unit is None or unit.domain is None or unit.domain.size is not None or self.escapes(unit):
                continue
            inputs, outputs = self.interface(unit)
            types = [value.type for value in (*inputs, *outputs) if isinstance(value.type, TensorType)]
            alone = set(self.users(unit)) == {index} and len(outputs) == 1
            alone = alone and all(is_elementwise(self.nodes[member]) for member in unit.members)
            if alone and unit.epoch == self.unit[index].epoch and widens(types[:-1], types[-1]):
                found[id(unit)] = unit
        return list(found.values())

    def _follows(self, tail: Unit, anchor: Unit) -> bool:
        """Whether `tail` is a loop over the elements of the anchor's result."""
        (result,) = self.results(anchor)
        same = tail.domain is not None and tail.domain.size is None and tail.epoch == anchor.epoch
        return same and tail.domain.count == elements(result) and not self._leads_around(anchor, tail)  # type: ignore[union-attr]

    # ---- results -----------------------------------------------------------------------------------------------------

    def interface(self, unit: Unit) -> tuple[list[Value], list[Value]]:
        """The values that `unit` reads from memory, and those of its results that others need."""
        inside = {value.name for value in self.results(unit)}
        read = (self.base(value) for member in unit.members for value in self.nodes[member].inputs)
        inputs = {value.name: value for value in read if value.name not in inside}
        needed = self.outside.union(*(self._read_by(index) for index in self.users(unit)))
        return list(inputs.values()), [value for value in self.results(unit) if value.name in needed]

    def _read_by(self, index: int) -> set[str]:
        return {self.base(value).name for value in self.nodes[index].inputs}

    def body(self, unit: Unit) -> Graph:
        """The graph of `unit`, with the views on its way in, its names in order and without places in the model: equal
        regions have equal bodies."""
        inputs, outputs = self.interface(unit)
        names = {value.name: Value(f"in{i}", value.type) for i, value in enumerate(inputs)}
        nodes: list[Node] = []

        def add(node: Node) -> None:
            if all(value is None or value.name in names for value in node.outputs):
                return
            for value in node.inputs:
                if value.name not in names:  # a view: members come in order
                    add(self.nodes[self.producer[value.name]])
            first = len(inputs) + sum(len(earlier.outputs) for earlier in nodes)
            made = [None if v is None else Value(f"v{first + i}", v.type) for i, v in enumerate(node.outputs)]
            names.update({v.name: m for v, m in zip(node.outputs, made, strict=True) if v and m})
            args = node.map_inputs(lambda value: names[value.name])
            nodes.append(Node(node.kind, node.op, args, tuple(made), node.body))

        for node in unit.steps or (self.nodes[member] for member in unit.members):
            add(node)
        taken = tuple(names[value.name] for value in inputs)
        return Graph("import", taken, nodes=tuple(nodes), outputs=tuple(names[value.name] for value in outputs))

    def kernel(self, unit: Unit) -> Node:
        """`unit` as a kernel node."""
        inputs, outputs = self.interface(unit)
        body = self.body(unit)
        args = tuple((f"in{i}", value) for i, value in enumerate(inputs))
        return Node("kernel", name_of(body), args, tuple(outputs), body, self._loc(unit))

    def _loc(self, unit: Unit) -> Loc | None:
        """The place of the operation that says most: the first one with rows, else the last."""
        rows = [member for member in unit.members if member in self.reducing]
        return self.nodes[rows[0] if rows else unit.members[-1]].loc

    def worthwhile(self, unit: Unit) -> bool:
        """Whether a kernel is better than the calls: not for one copy, and for a few long rows only where there is more
        to do than one call does, and they can be reduced in parts."""
        if unit.domain is None:
            return unit.steps is not None
        count, size = unit.domain.count.number, None if unit.domain.size is None else unit.domain.size.number
        if size is not None and count is not None and count < FEW_ROWS and size > LONG_ROW:
            return len(unit.members) > 1 and _is_split(self.body(unit), self.arches)
        if len(unit.members) > 1:  # merging has seen to it that there is code
            return True
        has_code = unit.domain.size is None or _is_loop(self.body(unit))
        return has_code and self._computes(self.nodes[unit.members[0]])

    def _computes(self, node: Node) -> bool:
        computed = (not isinstance(tensor, Load | View) for tensor in everything(_expressed(node)))
        return any(computed) and bool(node.inputs)


def elements(value: Value) -> Index:
    """The number of elements of a tensor."""
    assert isinstance(value.type, TensorType)
    return product(map(from_dim, value.type.shape))


def _is_tiny(domain: Domain | None) -> bool:
    """Whether a loop without rows is over before the next launch."""
    return domain is not None and domain.size is None and (domain.count.number or TINY + 1) <= TINY


def _no_more(consumer: Domain, producer: Domain) -> bool:
    """Whether `consumer` has at most as many elements as `producer`."""
    here, there = consumer.elements[-1].number, producer.elements[-1].number
    return here is not None and there is not None and here <= there


def absorbed(node: Node) -> bool:
    """Whether kernels take `node` as position arithmetic."""
    if node.kind != "op" or len(node.inputs) != 1 or not aten.is_view(aten.overload(node.op)):
        return False
    try:
        return bool(_expressed(node))
    except Unsupported:
        return False


def _expressed(node: Node) -> list[Tensor]:
    values: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    return list(express(node, values).values())


def domain_of(node: Node) -> tuple[Domain | None, int]:
    """The domain of one operation and its cost per element; None if kernels do not have it."""
    if node.op in ANCHORS or not all(isinstance(v.type, TensorType) for v in node.inputs):
        return None, 0
    try:
        tensors = _expressed(node)
        if not tensors:
            return None, 0
        found = Region(Graph("import", outputs=tuple(v for v in node.outputs if v)), tuple(tensors), None, {})
        rows = rows_of(found)
    except Unsupported:
        return None, 0
    cost = sum(isinstance(inner, Pointwise) for inner in everything(tensors))
    if not rows.axes:
        return Domain(product(tensors[0].shape)), cost
    return Domain(rows.count, rows.size, rows.inner), cost


def name_of(body: Graph) -> str:
    """A name for the kernel of `body`: its operations and a digest of all that it does."""
    ops = [node.op.split(".")[1] for node in _calls(body) if not aten.is_view(aten.overload(node.op))]
    words = list(dict.fromkeys(PLAIN.get(op, op.strip("_")) for op in ops))
    shown = words if len(words) <= 4 else [*words[:2], *words[-2:]]
    return "_".join([*shown, blake2b(str(body).encode(), digest_size=4).hexdigest()])


def _calls(body: Graph) -> Iterator[Node]:
    """The operations of `body`, those of the kernels in it among them."""
    for node in body.nodes:
        if node.body is None:
            yield node
        else:
            yield from _calls(node.body)
