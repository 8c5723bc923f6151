"""Sums over all rows join the product that computes what they sum, in its epilogue.

A batch norm in training reads the result of a convolution once for its statistics and once to standardize it; its
gradient reads a gradient, and the norm's input, twice as well. The first of both reads is a sum over all rows in
blocks. Where a block has as many rows as a tile of the product, the program that computes the tile has them in
registers:

    y, parts = kernel: convolution, sums of tiles        # before: y
    mean, scale = kernel: sums of parts                  # and a kernel for the parts, that reads y
    z = kernel: (y - mean) * scale

What the epilogue computes of the product, and narrow enough, is stored in place of the product itself: the gradient
behind an activation for the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values
from torch_rtx.lowering.effects import is_barrier
from torch_rtx.lowering.fusion import MAX_POINTERS
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import flat, needed, type_of
from torch_rtx.lowering.kernels.index import from_dim, product
from torch_rtx.lowering.kernels.memory_model import bytes_of, streaming_us, typical
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.split_reduction import reduces, split_by_blocks
from torch_rtx.lowering.loop_nodes import expected_us, is_loop_node, joined, kernel_of
from torch_rtx.lowering.widening import is_elementwise
from torch_rtx.op_work import ANCHORS
from torch_rtx.targets import Arch, Target

BLOCKS = (128, 64)  # rows of a tile
GOOD_PART = 0.8  # of the time of a kernel of their own, which sums may add to the product: models are imprecise
MIN_ELEMENTS = 1 << 19  # of a product; sums of less are not worth kernels of their own


def sum_in_tiles(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import, after `fuse`, to the same level.

    Args:
        targets: sums join a product where that is expected to be faster on one of these.
    """
    arches = tuple(dict.fromkeys(target.arch for target in targets))
    state = _State(graph)
    for index, node in enumerate(graph.nodes):
        if is_loop_node(node) and any(map(reduces, flat([node]))):
            found = next(state.choices(index), None)
            if found is not None and any(found.is_faster(arch) for arch in arches):
                state.take(found)
    return replace(graph, nodes=tuple(node for nodes in state.nodes for node in nodes))


@dataclass(frozen=True)
class _Choice:
    """Kernels in the place of others.

    Attributes:
        nodes: by the position in the graph, what replaces the node there.
        products: those that are replaced, and what replaces them.
        parts, left: the loop that sums blocks, and what is left of it.
    """

    nodes: Mapping[int, tuple[Node, ...]]
    products: Sequence[tuple[Node, Node]]
    parts: Node
    left: Sequence[Node]

    def is_faster(self, arch: Arch) -> bool:
        """The sums of blocks are expected to take a good part less time than as a kernel of their own."""
        longer = sum(expected_us(after.body, arch) - expected_us(before.body, arch) for before, after in self.products)
        longer += sum(_streaming_us(node, arch) for node in self.left)
        longer += sum(_read(*pair) for pair in self.products) / (arch.chip.memory * 1e3)
        return longer < GOOD_PART * _streaming_us(self.parts, arch)


def _read(before: Node, after: Node) -> int:
    """Bytes that the epilogue of a product reads: measured, these take about twice as long as in a loop."""
    types = [value.type for value in after.inputs if value not in before.inputs]
    return sum(bytes_of(type_) for type_ in types if isinstance(type_, TensorType))


def _streaming_us(loop: Node, arch: Arch) -> float:
    assert loop.body is not None
    return streaming_us(region(loop.body).moved_types, arch)


class _State:
    """The graph as it is rewritten.

    Attributes:
        nodes: what there is by now at the position of each node.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[tuple[Node, ...]] = [(node,) for node in graph.nodes]
        self.producer = {value.name: index for index, node in enumerate(graph.nodes) for value in node.results}
        self.barriers = [index for index, node in enumerate(graph.nodes) if is_barrier(node)]
        self.readers: dict[str, set[int]] = {value.name: {len(graph.nodes)} for value in attr_values(graph.outputs)}
        for index, node in enumerate(graph.nodes):
            for value in node.inputs:
                self.readers.setdefault(value.name, set()).add(index)

    def take(self, choice: _Choice) -> None:
        """Replace nodes."""
        for index, nodes in choice.nodes.items():
            self.nodes[index] = nodes
            self.producer.update({value.name: index for node in nodes for value in node.results})

    def choices(self, index: int) -> Iterator[_Choice]:
        """The ways to sum what the loop at `index` sums in products before it."""
        (loop,) = self.nodes[index]
        products = [at for value in loop.inputs if (at := self._product(value, index)) is not None]
        products = [at for at in products if _elements(self.nodes[at][0]) >= MIN_ELEMENTS]
        if not products:
            return
        stored = [value for at in products if (value := self._instead(loop, self.nodes[at][0], index)) is not None]
        for block in BLOCKS:
            try:
                kernels = _split(loop, stored, block)
            except Unsupported:
                continue
            found = self._joined(index, kernels, dict.fromkeys(products))
            if found is not None:
                yield found

    def _product(self, value: Value, index: int) -> int | None:
        """The position of the product that computes `value`, and nothing else, before the loop at `index`."""
        at = self.producer.get(value.name)
        if at is None or len(self.nodes[at]) != 1 or any(at < barrier < index for barrier in self.barriers):
            return None
        (node,) = self.nodes[at]
        if node.kind != "kernel" or node.body is None or len(node.results) > 1:
            return None
        anchors = [step for step in node.body.nodes if step.op in ANCHORS]
        before = node.body.nodes[: node.body.nodes.index(anchors[0])] if anchors else ()
        return at if len(anchors) == 1 and all(step.body is None for step in before) else None

    def _instead(self, loop: Node, node: Node, index: int) -> Value | None:
        """What `loop` computes of the result of a product, element by element, through which alone it reads that. It is
        no wider, and nobody else reads the product."""
        (value,) = node.results
        if self.readers[value.name] != {index}:
            return None
        steps, results = flat([loop]), {one.name for one in loop.results}
        found = value
        while found.name not in results:
            users = [step for step in steps if found in step.inputs]
            if len(users) != 1 or len(users[0].results) != 1 or not is_elementwise(users[0]):
                break
            (made,) = users[0].results
            if not _is_alike(type_of(made), type_of(found)):
                break
            found = made
        return None if found in (value, *loop.results) else found

    def _joined(self, index: int, kernels: Sequence[Node], products: Mapping[int, None]) -> _Choice | None:
        """The products with the first of `kernels`, which sums blocks, and the others in the place of the loop."""
        parts, *rest = kernels
        taken: dict[int, list[Value]] = {}
        given = {value.name for value in parts.inputs}
        steps = {result: needed(flat([parts]), [result]) for result in parts.results}
        read = {result: {v.name for step in steps[result] for v in step.inputs} & given for result in parts.results}
        for result in parts.results:
            fitting = [at for at in products if self.nodes[at][0].results[0].name in read[result]]
            if fitting:
                taken.setdefault(max(fitting), []).append(result)
        if not taken or len(rest) > 2:
            return None
        left: list[Value] = []
        for result in (one for one in parts.results if not any(one in values for values in taken.values())):
            # what is made of the same as sums is in the same registers
            alike = [at for at, values in taken.items() if read[result] <= set[str]().union(*(read[v] for v in values))]
            (taken[alike[0]] if alike else left).append(result)
        own = [joined([parts], left)] if left else []
        after = [*own, *(joined([node], node.results) for node in rest)]
        found: dict[int, tuple[Node, ...]] = {}
        pairs, late = list[tuple[Node, Node]](), list[Node]()
        inside = {value.name for node in after for value in node.inputs}
        for at, results in sorted(taken.items()):
            (node,) = self.nodes[at]
            (value,) = node.results
            kept = [value] if value.name in inside or self.readers[value.name] != {index} else []
            wanted = [one for one in results if one.name in inside or one.name in self.readers]
            made = _with_epilogue(node, joined([parts], wanted), [*kept, *wanted])
            pairs.append((node, made))
            moved = {one.name for other in late for one in other.results}
            ready = all(self.producer.get(one.name, -1) < at and one.name not in moved for one in made.inputs)
            if len(made.inputs) + len(made.outputs) > MAX_POINTERS:
                return None
            if ready:
                found[at] = (made,)
            elif kept and any(reader < index for reader in self.readers[value.name]):
                return None
            else:
                found[at] = ()
                late.append(made)
        found[index] = (*late, *after)
        return _Choice(found, pairs, joined([parts], parts.results), own)


def _elements(node: Node) -> int:
    """Elements of the result of a product, at typical sizes."""
    (value,) = node.results
    return prod(map(typical, type_of(value).shape))


def _split(loop: Node, stored: Sequence[Value], block: int) -> list[Node]:
    """The kernels of `loop`, of which the first one sums blocks, and stores `stored`, too."""
    whole = kernel_of(flat([loop]), [*loop.results, *stored], loop.loc)
    assert whole.body is not None
    divided = split_by_blocks(whole.body, whole.op, block)
    return flat([replace(whole, body=divided)])


def _is_alike(made: TensorType, value: TensorType) -> bool:
    """A tensor has as many elements as another one, which are not wider."""
    sizes = (product(map(from_dim, one.shape)) for one in (made, value))
    return len(set(sizes)) == 1 and DTYPES[made.dtype].bits <= DTYPES[value.dtype].bits


def _with_epilogue(node: Node, loop: Node, results: Sequence[Value]) -> Node:
    """The kernel of a product, with a loop over its result behind it."""
    steps = flat([node])
    at = next(place for place, step in enumerate(steps) if step.op in ANCHORS)
    (product_,) = steps[at].results
    inner = [*steps[at + 1 :], *flat([loop])]
    outside = [value for value in results if value != product_]
    epilogue = kernel_of(needed(inner, outside), outside, None)
    return kernel_of([*steps[: at + 1], epilogue], results, node.loc)
