"""What a family of kernels says of the regions that it is for: the ways to run one, and how long each takes.

A family is all that knows how many ways there are: builds, tuning and the runtime take its tactics one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.lowering.kernels.cost import typical
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.op_work import flops
from torch_rtx.targets import Arch

# Kernels take longer than their models say, by about a tenth; what is as fast both ways is left to the kernel.
MODEL_ERROR = 1.07
SLOWER = 1.1  # times the kernel's: a library call where none was measured, or of a kind that libraries are not made for
CLEAR = 1.15  # the gain that two kernels in place of one must promise to be expected to be faster,
MAYBE = 0.75  # and to be worth measuring: expectations may be wrong


@dataclass(frozen=True)
class Offer:
    """A tactic before code is generated for it: a body in place of the region's own, or (None) the region's own body.
    The kernel nodes in `body` are launched."""

    kind: str
    expected_us: float
    body: Graph | None = None


@dataclass(frozen=True)
class Family:
    """Kernels around one kind of anchor.

    Attributes:
        name: of the kind, for people.
        ops: the operators that are anchors of it; none: loops.
        configs: the configurations of the region's own kernel, best first.
        kernel: the kernel of a region, under a name, in a configuration.
        expected_us: microseconds that it should take.
        split: the body, of the kernel of a name, in so many parts; see `split`.
        others: the further tactics of a region, whose kernel is expected to take the given microseconds.

    All raise `Unsupported` for what they do not have.
    """

    name: str
    ops: frozenset[str]
    configs: Callable[[Region, Arch], Sequence[Any]]
    kernel: Callable[[Region, str, Any], Kernel]
    expected_us: Callable[[Region, Arch, Any], float]
    split: Callable[[Graph, str, int], Graph]
    others: Callable[[Region, str, Arch, float], Iterator[Offer]]


def splits(
    family_split: Callable[[Graph, str, int], Graph], body: Graph, name: str, parts: int, split_us: float, us: float
) -> Iterator[Offer]:
    """The split form of a body, where that may be faster than one kernel, which takes `us` microseconds."""
    if parts > 1 and split_us * MAYBE <= us:
        try:
            yield Offer("split", split_us * CLEAR, family_split(body, name, parts))
        except Unsupported:
            return


def library_us(
    kind: str, region: Region, arch: Arch, us: float, before_us: float, after_us: float, usual: bool
) -> float:
    """What the library call at the heart of a region should take, in microseconds.

    Args:
        us: the time of the region's own kernel with operands plainly in memory.
        before_us, after_us: the times of what is left to do before and after the call.
        usual: whether the call is one that libraries are made for.
    """
    assert region.anchor is not None
    rates, work = arch.library, flops(region.anchor, typical)
    if rates is None or work <= rates.large[kind] or not usual:
        return before_us + SLOWER * us
    overhead_us, flops_per_us = rates.call[kind]
    return before_us + overhead_us + work / flops_per_us + after_us


def around(body: Graph, ops: frozenset[str]) -> tuple[list[Node], Node, list[Node]]:
    """The nodes of a body before its anchor, which is one of `ops`; the anchor; and the operations after it, also those
    inside of kernels, under names of the body."""
    at = next(index for index, node in enumerate(body.nodes) if node.op in ops)
    return list(body.nodes[:at]), body.nodes[at], _flat(body.nodes[at + 1 :])


def added_to(anchor: Node, node: Node) -> Value | None:
    """The tensor that `node` adds to the anchor's result, on either side of the sum, if both have the same type."""
    (value,) = anchor.outputs
    given = [node.arg("self"), node.arg("other")]
    if node.op != "aten.add.Tensor" or node.arg("alpha", 1) != 1 or value not in given:
        return None
    other = given[1 - given.index(value)]
    if not isinstance(other, Value) or value is None or other == value:
        return None
    return other if other.type == value.type else None


def _flat(nodes: Sequence[Node]) -> list[Node]:
    found: list[Node] = []
    for node in nodes:
        if node.body is None:
            found.append(node)
            continue
        inner, outer = (*node.body.inputs, *node.body.outputs), (*node.inputs, *(v for v in node.outputs if v))
        names = {one.name: other for one, other in zip(inner, outer, strict=True) if isinstance(one, Value)}

        def renamed(value: Value, names: Mapping[str, Value] = names, node: Node = node) -> Value:
            return names.get(value.name, Value(f"{node.op}.{value.name}", value.type))

        for step in node.body.nodes:
            outputs = tuple(None if value is None else renamed(value) for value in step.outputs)
            found.append(replace(step, args=step.map_inputs(renamed), outputs=outputs))
    return found
