"""Fusion: which operations become one kernel.

Each operation starts as a fusion group with an iteration space: elements, or rows of a size where it reduces. Producer
and consumer fuse if their iteration spaces agree, fusing creates no cycle, and code can be generated for the result
that is expected to be no slower than that of both: a consumer that reads its producer at many positions computes it
again at each. A producer of another size fuses only into its sole consumer, which computes it for each element. Views
belong to no group: kernels absorb the views on their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from math import inf

from torch_rtx import aten
from torch_rtx.accumulation import scatters
from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Loc, Node, TensorType, Value, attr_values
from torch_rtx.lowering.effects import draws, is_barrier
from torch_rtx.lowering.iteration_space import (
    IterationSpace,
    cut_copies,
    elements,
    expressed,
    is_absorbed_view,
    iteration_space_of,
)
from torch_rtx.lowering.kernels.generate import fastest, generate
from torch_rtx.lowering.kernels.index import variable
from torch_rtx.lowering.kernels.kernel_ir import Const, Load, Pointwise, Select, View, address, everything
from torch_rtx.lowering.kernels.loops import loop_operations
from torch_rtx.lowering.kernels.memory_model import bytes_of, streaming_us, typical
from torch_rtx.lowering.kernels.region import region, tensor_type
from torch_rtx.lowering.rewrite import COPIES
from torch_rtx.lowering.row_ranges import ranges_of_rows
from torch_rtx.lowering.widening import is_elementwise, widened_factors, widens
from torch_rtx.op_work import ANCHORS, PRODUCTS
from torch_rtx.targets import Arch

MAX_MEMBERS = 64
MAX_POINTERS = 24
FEW_ELEMENTS, MAX_POINTERS_OF_FEW = 32, 96  # loops over so few, such as counters, need a register for each pointer
MAX_RECOMPUTED_OPS = 4  # per element, of a producer that a much larger consumer computes again
MOST_AGAIN = 16  # times that a longer producer may be computed again
PRICE_ERROR = 1.25  # by as much a kernel may be faster than it is expected to be
SIBLING_GAIN = 8  # times that the shorter of two independent loops may take what fusing them saves
TINY_ELEMENTS = 4096  # a loop of so few takes no longer than its launch
RUN = 64  # elements that are neighbours in memory, so that it does not matter where the next ones are
MINOR = 8  # times as much is read beside an operand that a kernel may read in any order
GIVEN_BYTES = 1 << 20  # of a copy that the caller gets: to copy less once more takes no longer than a launch
NEAR_NODES = 32  # so far nodes may move from their place
FEW_ROWS, LONG_ROW_ELEMENTS = 64, 16384  # fewer rows, longer than this, leave a GPU idle unless they are split
SHORT_NAMES = {"_native_batch_norm_legit_no_training": "batch_norm"}  # of operators, in names of kernels


@dataclass(eq=False)
class FusionGroup:
    """Nodes, by index, that become one kernel. Without an iteration space: an anchor's kernel, or one plain call."""

    members: list[int]
    epoch: int
    space: IterationSpace | None = None
    steps: list[Node] | None = None  # of an anchor's kernel: prologue, anchor, epilogue
    us: float | None = None  # see `FusionPlan.us`
    users: tuple[int, ...] | None = None  # see `FusionPlan.users`


@lru_cache(maxsize=1024)  # layers of a model have equal regions
def _loop_us(body: Graph, arches: tuple[Arch, ...]) -> float:
    """The expected microseconds of the loop kernel of `body`, summed over `arches`; infinite if no code can be
    generated."""
    try:
        found = region(body)
        operations, tiles = loop_operations(found)
    except Unsupported:
        return inf
    total = 0.0
    for arch in arches:
        in_turn = max(typical(tiles) / arch.chip.processors, 1.0)
        compute_us = operations * in_turn / (arch.chip.plain / 2 / arch.chip.processors * 1e6)
        total += max(streaming_us(found.moved_types, arch), arch.chip.launch + compute_us)
    return total


@lru_cache(maxsize=1024)
def is_kernel(body: Graph, arches: tuple[Arch, ...]) -> bool:
    """A kernel can be generated for `body` on one of `arches`; on others it runs call by call."""
    for arch in arches:
        try:
            generate(body, "trial", arch, 0)
        except Unsupported:
            continue
        return True
    return False


@lru_cache(maxsize=1024)
def prefers_split(body: Graph, arches: tuple[Arch, ...]) -> bool:
    """A split form of `body` is expected to be the fastest on one of `arches`."""
    return any((tactic := fastest(body, "trial", arch)) is not None and tactic.body is not None for arch in arches)


class FusionPlan:
    """The fusion groups of `graph`.

    Args:
        arches: the SM versions that kernels are generated for.
        atomics: kernels may add to memory in any order.

    Attributes:
        begun: the values to whose elements kernels write in memory, by name; kernels write these, too.
        group_of: the group of each node that is not an absorbed view.
        readers: the nodes that read a value, also through views.
        next_draw: for each call that draws random numbers, the one that has to come after it.
        reducing: the nodes that reduce rows.
        outside: the values that the graph returns, or inputs that it has written to, by name.
    """

    def __init__(self, graph: Graph, arches: tuple[Arch, ...], atomics: bool = True) -> None:
        self.atomics, self.begun = atomics, set[str]()
        self.graph, self.nodes, self.arches = graph, graph.nodes, arches
        self.producer = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs if v is not None}
        self.ranges = set(ranges_of_rows(graph.nodes))
        self.views = {i for i, node in enumerate(graph.nodes) if i not in self.ranges and is_absorbed_view(node)}
        self.views |= widened_factors(graph, self.views, self.producer)
        self.views |= cut_copies(graph, self.views, self.producer)
        self.group_of: dict[int, FusionGroup] = {}
        self.readers: dict[str, list[int]] = {}
        self.next_draw = dict(pairwise(draws(graph.nodes)))
        self.reducing: set[int] = set()
        self.outside: set[str] = {self.base(v).name for v in attr_values(graph.outputs)} | graph.updated.keys()
        self._start_groups()
        for index in sorted(self.group_of):
            self._merge_producers(index)
        for index in sorted(self.group_of):  # of nodes whose groups have more elements than they have by now
            if self.group_of[index].space != iteration_space_of(self.nodes[index]):
                self._merge_producers(index)
        anchors = [i for i in sorted(self.group_of) if self.nodes[i].kind == "op" and self.nodes[i].op in ANCHORS]
        anchors = [i for i in anchors if self.atomics or not scatters(self.nodes[i])]
        for index in anchors:
            self._narrow(index)
        # The last anchor first: a loop that reads results of several is the epilogue of the one that it waits for.
        for index in reversed(anchors):
            self._grow_anchor(index)
        self._merge_siblings()

    # ---- groups ------------------------------------------------------------------------------------------------------

    def _start_groups(self) -> None:
        epoch = 0
        for index, node in enumerate(self.nodes):
            if index in self.views:
                continue
            for value in node.inputs:
                self.readers.setdefault(self.base(value).name, []).append(index)
            barrier = is_barrier(node)
            epoch += barrier
            loop = node.kind == "op" and not barrier and index not in self.ranges
            loop = loop and (self.atomics or not scatters(node))
            space = iteration_space_of(node) if loop else None
            anchor = loop and node.op in ANCHORS
            if (space is not None or anchor) and scatters(node):
                self.begun.update(value.name for value in attr_values(node.arg("self")))
            self.group_of[index] = FusionGroup([index], epoch, space)
            if space is not None and space.size is not None:
                self.reducing.add(index)
            epoch += barrier

    def base(self, value: Value) -> Value:
        """The value that `value` is a view of, or itself."""
        index = self.producer.get(value.name)
        while index in self.views:
            value = self.nodes[index].inputs[0]
            index = self.producer.get(value.name)
        return value

    # ---- merging -----------------------------------------------------------------------------------------------------

    def _merge_producers(self, index: int) -> None:
        for value in self.nodes[index].inputs:
            before = self.producer.get(self.base(value).name)
            if before is None:
                continue
            first, second = self.group_of[before], self.group_of[index]
            space = self._common_space(first, second) if first is not second else None
            if space is None or self._widens_stored(self.base(value), index) or self._would_create_cycle(first, second):
                continue
            self._merge(first, second, space)

    def _widens_stored(self, value: Value, index: int) -> bool:
        """The node at `index` makes wider elements of integers that lie in memory in any case, for an anchor or another
        call: whoever reads these elements makes them again of what takes less memory."""
        assert isinstance(value.type, TensorType)
        stored = any(self.group_of[reader].space is None for reader in self.readers[value.name])
        wider = all(_bits(result) > _bits(value) for result in self.nodes[index].results)
        return stored and wider and DTYPES[value.type.dtype].kind == INT

    def _merge(self, first: FusionGroup, second: FusionGroup, space: IterationSpace) -> None:
        """Fuse two groups, if the result is small enough, and no slower."""
        merged = FusionGroup(sorted(first.members + second.members), first.epoch, space)
        if len(merged.members) <= MAX_MEMBERS:
            self._try_group(merged, PRICE_ERROR * (self.us(first) + self.us(second)))

    def us(self, group: FusionGroup) -> float:
        """What the loop of `group` takes, with the results that others read when this is asked first."""
        if group.us is None:
            group.us = _loop_us(self.body(group), self.arches)
        return group.us

    def _common_space(self, first: FusionGroup, second: FusionGroup) -> IterationSpace | None:
        """The iteration space of both fused; None if they do not agree."""
        one, two = first.space, second.space
        if one is None or two is None or first.epoch != second.epoch:
            return None
        if one.size is not None and two.size is not None:
            return one if one == two else None
        if one.size is None and (one.count in two.elements):
            return two
        sole_user = all(self.group_of[i] is second for i in self.users(first)) and not self.escapes(first)
        if one.size is not None:
            if two.count in one.elements:
                return None if self._feeds_other_axis(second, one) else one
            return one if sole_user and _is_padded(two, one) else None
        return two if sole_user and (_is_near(two, one) or self._is_short(first)) else None

    def _is_short(self, group: FusionGroup) -> bool:
        """A consumer of any size may compute `group` again for each of its elements."""
        tensors = (one for member in group.members for one in everything(expressed(self.nodes[member])))
        return sum(isinstance(one, Pointwise) for one in tensors) <= MAX_RECOMPUTED_OPS

    def _feeds_other_axis(self, group: FusionGroup, space: IterationSpace) -> bool:
        """Every consumer of `group` reduces over another axis than `space`, such as columns instead of rows."""
        users = self.users(group)
        return (
            bool(users)
            and not self.escapes(group)
            and all(i in self.reducing and self.group_of[i].space != space for i in users)
        )

    def users(self, group: FusionGroup) -> tuple[int, ...]:
        """The nodes outside of `group` that have to come after it: they read its results, also through views."""
        if group.users is None:
            after = [index for value in self.results(group) for index in self.readers.get(value.name, ())]
            after += [self.next_draw[member] for member in group.members if member in self.next_draw]
            group.users = tuple(dict.fromkeys(index for index in after if index not in group.members))
        return group.users

    def results(self, group: FusionGroup) -> Iterator[Value]:
        """All values that `group` computes."""
        for member in group.members:
            yield from (value for value in self.nodes[member].outputs if value is not None)

    def escapes(self, group: FusionGroup) -> bool:
        """The graph returns a result of `group`."""
        return any(value.name in self.outside for value in self.results(group))

    def _would_create_cycle(self, first: FusionGroup, second: FusionGroup) -> bool:
        """A third group depends on `first`, and `second` on it."""
        seen = {first}
        left = [group for index in self.users(first) if (group := self.group_of[index]) is not second]
        while left:
            group = left.pop()
            if group is second:
                return True
            if group not in seen:
                seen.add(group)
                left += [self.group_of[index] for index in self.users(group)]
        return False

    def _merge_siblings(self) -> None:
        """Fuse independent loops whose iteration spaces agree, if they read the same value or are launch-bound."""
        for readers in self.readers.values():
            self._merge_independent(readers)
        self._merge_independent([index for index, group in self.group_of.items() if _is_tiny(group.space)])

    def _merge_independent(self, indices: list[int]) -> None:
        """Fuse those groups of these nodes whose iteration spaces agree and that do not depend on each other."""
        found: dict[int, dict[IterationSpace, int]] = {}  # by epoch, the last node of each iteration space
        for index in indices:
            last = found.setdefault(self.group_of[index].epoch, {})
            for other in last.values():
                first, second = self.group_of[other], self.group_of[index]
                space = self._common_space(first, second) if first is not second else None
                if space is not None and not self._depend(first, second) and self._is_gain(first, second):
                    self._merge(first, second, space)
            space = self.group_of[index].space
            if space is not None:
                last[space] = index

    def _is_gain(self, first: FusionGroup, second: FusionGroup) -> bool:
        """One launch and what both read are a good part of the time of independent loops. Otherwise these are better
        off one by one: together they need the memory of the operands of both."""
        one, two = (self.interface(group)[0] for group in (first, second))
        shared = [value.type for value in one if value in two and isinstance(value.type, TensorType)]
        saved = sum(streaming_us(shared, arch) for arch in self.arches)
        return min(self.us(first), self.us(second)) <= SIBLING_GAIN * saved

    def _depend(self, first: FusionGroup, second: FusionGroup) -> bool:
        """One group depends on the other, or would have to wait for it out of turn: what the backward of a checkpoint
        computes again for one layer must not come before it is done with another."""
        pairs = (first, second), (second, first)
        return any(self._reaches(one, two) or self._reader_is_before(one, two) for one, two in pairs)

    def _reader_is_before(self, first: FusionGroup, second: FusionGroup) -> bool:
        """A reader of `first` comes long before an operand of `second`."""
        operands = (self.base(value).name for member in second.members for value in self.nodes[member].inputs)
        made = max((self.producer[name] for name in operands if name in self.producer), default=-1)
        return min(self.users(first), default=made) < made - NEAR_NODES

    def _reaches(self, first: FusionGroup, second: FusionGroup) -> bool:
        """`second` depends on `first`, directly or not."""
        return any(self.group_of[i] is second for i in self.users(first)) or self._would_create_cycle(first, second)

    def _try_group(self, group: FusionGroup, before_us: float = inf) -> bool:
        """Replace the groups of the members by `group`, if code can be generated for it, which takes no longer than
        `before_us`. Values that only members read are then not among its outputs."""
        before = {member: self.group_of[member] for member in group.members}
        self.group_of.update(dict.fromkeys(group.members, group))
        if self._can_generate(group, before_us):
            return True
        self.group_of.update(before)
        return False

    def _can_generate(self, group: FusionGroup, before_us: float) -> bool:
        inputs, outputs = self.interface(group)
        count = None if group.space is None else group.space.elements[-1].number
        few = count is not None and count <= FEW_ELEMENTS
        if len(inputs) + len(outputs) > (MAX_POINTERS_OF_FEW if few else MAX_POINTERS):
            return False
        if group.steps is not None:
            return is_kernel(self.body(group), self.arches)
        us = self.us(group)
        return us < inf and us <= before_us

    # ---- anchors -----------------------------------------------------------------------------------------------------

    def _grow_anchor(self, index: int) -> None:
        """Fuse the anchor at `index` with its prologue (loops that widen its operands) and its epilogue (the loop over
        its result), if nothing else reads these. Both stay kernels inside of the anchor's kernel, so that a library
        call can replace the anchor alone."""
        anchor = self.group_of[index]
        readers = {id(self.group_of[i]): self.group_of[i] for i in self.users(anchor)}
        tail = next(iter(readers.values())) if len(readers) == 1 and not self.escapes(anchor) else None
        after = [tail] if tail is not None and self._is_epilogue(tail, anchor) else []
        before = [] if scatters(self.nodes[index]) else self._prologue(index)
        choices = ([*before, anchor, *after], [anchor, *after], [*before, anchor], [anchor])
        for groups in (groups for at, groups in enumerate(choices) if groups not in choices[:at]):
            steps = [node for group in groups for node in self._steps(group)]
            members = sorted(member for group in groups for member in group.members)
            if self._try_group(FusionGroup(members, anchor.epoch, steps=steps)):
                return

    def _steps(self, group: FusionGroup) -> list[Node]:
        """The nodes of a group inside of an anchor's kernel: an inner kernel, or plain calls if that is better."""
        loop = group.space is not None and self.is_profitable(group)
        return [self.kernel(group)] if loop else [self.nodes[member] for member in group.members]

    def _prologue(self, index: int) -> list[FusionGroup]:
        """The loops that widen operands of the anchor at `index`, or that put a minor one or rows in order, and have no
        other reader."""
        found: dict[int, FusionGroup] = {}
        for value in self.nodes[index].inputs:
            group = self.group_of.get(self.producer.get(self.base(value).name, -1))
            if group is None or group.space is None or group.space.size is not None or self.escapes(group):
                continue
            inputs, outputs = self.interface(group)
            types = [value.type for value in (*inputs, *outputs) if isinstance(value.type, TensorType)]
            sole_user = set(self.users(group)) == {index} and len(outputs) == 1
            joins = sole_user and group.epoch == self.group_of[index].epoch
            joins = joins and (
                widens(types[:-1], types[-1])
                or self._is_minor_order(group, types[-1], index)
                or self._is_order_of_rows(group, index)
            )
            if joins and all(is_elementwise(self.nodes[member]) for member in group.members):
                found[id(group)] = group
        return list(found.values())

    def _is_minor_order(self, group: FusionGroup, result: TensorType, index: int) -> bool:
        """`group` only moves elements, which are few beside all that the anchor at `index` reads: in another order than
        that of memory they cost no more than a launch. Scales of blocks are such."""
        tensors = everything(tensor for member in group.members for tensor in expressed(self.nodes[member]))
        read = [value.type for value in self.nodes[index].inputs if isinstance(value.type, TensorType)]
        minor = MINOR * bytes_of(result) <= sum(map(bytes_of, read))
        return minor and all(isinstance(tensor, Load | View | Select | Const) for tensor in tensors)

    def _is_order_of_rows(self, group: FusionGroup, index: int) -> bool:
        """`group` only puts rows of the first factor of the product at `index` in another order, as windows of an image
        are: the product may as well read them where they lie."""
        node, (_, (result,)) = self.nodes[index], self.interface(group)
        factor = node.arg(PRODUCTS[node.op][0]) if node.op in PRODUCTS else None
        if not isinstance(factor, Value) or self.base(factor) != result:
            return False
        length, shape = tensor_type(factor).shape[-1], tensor_type(result).shape
        if not isinstance(length, int) or length < RUN or shape[-1:] != (length,):
            return False
        (tensor,) = region(self.body(group)).outputs
        position = tuple(variable(f"A{axis}", size) for axis, size in enumerate(tensor.shape))
        found = address(tensor, position)
        return found is not None and not set(position[-1].variables()) & set((found - position[-1]).variables())

    def _narrow(self, index: int) -> None:
        """Give the anchor at `index` an epilogue of its own, of the first operations of the loop that reads its result,
        down to one whose elements are narrower, where the loop itself reduces rows or is the epilogue of a later
        anchor. The sums of int8 then need not be written."""
        anchor, chain = self.group_of[index], list[int]()
        result, *others = self.results(anchor)
        if others or scatters(self.nodes[index]):
            return
        tails = [self.group_of[reader] for reader in self.users(anchor)]
        if len(set(map(id, tails))) != 1 or tails[0].epoch != anchor.epoch:
            return
        tail, value = tails[0], result
        if tail.space is None or self._is_last(tail, index):
            return
        while _bits(value) >= _bits(result):
            readers = set(self.readers.get(value.name, ()))
            at = readers.pop() if len(readers) == 1 and value.name not in self.outside else -1
            space = iteration_space_of(self.nodes[at]) if at in tail.members else None
            if space != IterationSpace(elements(result)) or len(self.nodes[at].results) != 1:
                return
            chain.append(at)
            (value,) = self.nodes[at].results
        rest = [member for member in tail.members if member not in chain]
        made = {value.name for member in rest for value in self.nodes[member].results}
        if not rest or any(self.base(given).name in made for at in chain for given in self.nodes[at].inputs):
            return
        parts = [FusionGroup(chain, tail.epoch, IterationSpace(elements(result)))]
        parts.append(FusionGroup(rest, tail.epoch, tail.space))
        if not all(map(self._try_group, parts)):
            self.group_of.update(dict.fromkeys(tail.members, tail))

    def _is_last(self, tail: FusionGroup, index: int) -> bool:
        """`tail` can be the epilogue of the anchor at `index`, and waits for no later one."""
        read = {self.producer.get(self.base(v).name, -1) for member in tail.members for v in self.nodes[member].inputs}
        last = max(one for one in read if one == index or (one >= 0 and self.nodes[one].op in ANCHORS))
        return last == index and self._is_epilogue(tail, self.group_of[index])

    def _is_epilogue(self, tail: FusionGroup, anchor: FusionGroup) -> bool:
        """`tail` is a loop over the elements of the anchor's result, or over pairs of them, as a gated unit has."""
        result, *others = self.results(anchor)
        space = tail.space
        if scatters(self.nodes[anchor.members[0]]):  # it is not complete before the kernel ends
            return False
        if others or space is None or space.size is not None or tail.epoch != anchor.epoch:
            return False
        whole = elements(result)
        return whole in (space.count, space.count + space.count) and not self._would_create_cycle(anchor, tail)

    # ---- results -----------------------------------------------------------------------------------------------------

    def interface(self, group: FusionGroup) -> tuple[list[Value], list[Value]]:
        """The values that `group` reads from memory, and the results that others read."""
        inside = {value.name for value in self.results(group)}
        read = (self.base(value) for member in group.members for value in self.nodes[member].inputs)
        inputs = {value.name: value for value in read if value.name not in inside}
        needed = self.outside.union(*(self._read_by(index) for index in self.users(group)))
        return list(inputs.values()), [value for value in self.results(group) if value.name in needed]

    def _read_by(self, index: int) -> set[str]:
        return {self.base(value).name for value in self.nodes[index].inputs}

    def body(self, group: FusionGroup) -> Graph:
        """The graph of `group` with the views on its inputs, canonical names and no locations, so that equal regions
        have equal bodies."""
        inputs, outputs = self.interface(group)
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

        for node in group.steps or (self.nodes[member] for member in group.members):
            add(node)
        taken = tuple(names[value.name] for value in inputs)
        return Graph("import", taken, nodes=tuple(nodes), outputs=tuple(names[value.name] for value in outputs))

    def kernel(self, group: FusionGroup) -> Node:
        """`group` as a kernel node."""
        inputs, outputs = self.interface(group)
        body = self.body(group)
        args = tuple((f"in{i}", value) for i, value in enumerate(inputs))
        return Node("kernel", kernel_name(body), args, tuple(outputs), body, self._loc(group))

    def _loc(self, group: FusionGroup) -> Loc | None:
        """The location of the first reduction, else of the last node."""
        rows = [member for member in group.members if member in self.reducing]
        return self.nodes[rows[0] if rows else group.members[-1]].loc

    def is_profitable(self, group: FusionGroup) -> bool:
        """A kernel is better than plain calls. It is not for a lone copy, unless the caller gets that: in a CUDA graph
        the result of a call would be copied once more. Few long rows need a split form."""
        if group.space is None:
            return group.steps is not None
        count, size = group.space.count.number, None if group.space.size is None else group.space.size.number
        if size is not None and count is not None and count < FEW_ROWS and size > LONG_ROW_ELEMENTS:
            return len(group.members) > 1 and prefers_split(self.body(group), self.arches)
        if len(group.members) > 1:  # fusion has checked that code can be generated
            return True
        node = self.nodes[group.members[0]]
        nbytes = sum(bytes_of(value.type) for value in node.results if isinstance(value.type, TensorType))
        given = node.op in COPIES and self.escapes(group) and nbytes >= GIVEN_BYTES
        return self.us(group) < inf and (given or self._computes(node))

    def _computes(self, node: Node) -> bool:
        if any(value.name in self.begun for value in node.results):
            return True
        if node.op in COPIES or aten.may_alias(node):  # which a kernel would turn into a copy
            return any(not isinstance(tensor, Load | View) for tensor in everything(expressed(node)))
        return bool(node.inputs)


def loops_us(graph: Graph, arches: tuple[Arch, ...]) -> float:
    """The expected microseconds of the loops of a graph, summed over `arches`; infinite if a part of it is none."""
    plan = FusionPlan(graph, arches)
    return sum(plan.us(group) for group in {id(group): group for group in plan.group_of.values()}.values())


def _bits(value: Value) -> int:
    """Bits of an element of a tensor."""
    assert isinstance(value.type, TensorType)
    return DTYPES[value.type.dtype].bits


def _is_tiny(space: IterationSpace | None) -> bool:
    """A pointwise loop is launch-bound."""
    return space is not None and space.size is None and (space.count.number or TINY_ELEMENTS + 1) <= TINY_ELEMENTS


def _is_near(consumer: IterationSpace, producer: IterationSpace) -> bool:
    """`consumer` is known to have at most `MOST_AGAIN` times the elements of `producer`. Then the price decides, which
    does not know what a kernel of much work keeps from joining later, such as a padding of its result."""
    here, there = consumer.elements[-1].number, producer.elements[-1].number
    return here is not None and there is not None and here <= MOST_AGAIN * there


def _is_padded(consumer: IterationSpace, producer: IterationSpace) -> bool:
    """`consumer` is known to have a few more elements than `producer`, which is computed once for each of them."""
    here, there = consumer.elements[-1].number, producer.elements[-1].number
    return here is not None and there is not None and there < here <= there + there // 8


def kernel_name(body: Graph) -> str:
    """The name of the kernel of `body`: its operations and a digest of the body."""
    ops = [node.op.split(".")[1] for node in _calls(body) if not aten.is_view(aten.overload(node.op))]
    words = list(dict.fromkeys(SHORT_NAMES.get(op, op.strip("_")) for op in ops))
    shown = words if len(words) <= 4 else [*words[:2], *words[-2:]]
    return "_".join([*shown, blake2b(str(body).encode(), digest_size=4).hexdigest()])


def _calls(body: Graph) -> Iterator[Node]:
    """The operations of `body`, also inside of its kernels."""
    for node in body.nodes:
        if node.body is None:
            yield node
        else:
            yield from _calls(node.body)
