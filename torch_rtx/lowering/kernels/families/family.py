"""A family: which tactics there are for regions around one kind of anchor, and their expected times.

Builds, tuning and the runtime take a family's tactics one by one and know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.op_work import flops
from torch_rtx.targets import Arch

MODEL_ERROR = 1.07  # measured over modelled time of kernels; a little less than it is, so that ties go to kernels
SLOWER = 1.1  # a library call relative to the kernel, without measurements or outside of what libraries are tuned for
SPLIT_PENALTY = 1.15  # a split form must promise this speedup to be ranked before the kernel
SPLIT_MARGIN = 0.75  # and this one to be offered for measuring: models are imprecise
Split = Callable[[Graph, str, int], Graph]  # from a body, its kernel's name and a number of splits to the split form


@dataclass(frozen=True)
class Offer:
    """A tactic before code generation: a body whose kernel nodes are launched, or None for the region's own calls."""

    kind: str
    expected_us: float
    body: Graph | None = None


@dataclass(frozen=True)
class Family:
    """Kernels around one kind of anchor. All callables raise `Unsupported` for regions that they do not cover.

    Attributes:
        name: for people.
        ops: the anchors; empty: loops, which have none.
        configs: of the region's kernel on an SM version, the fastest first.
        kernel: from a region, a name and a configuration.
        expected_us: time of the kernel in a configuration, in microseconds.
        others: the other tactics of a region, given its name and the expected time of its kernel in microseconds.
    """

    name: str
    ops: frozenset[str]
    configs: Callable[[Region, Arch], Sequence[Any]]
    kernel: Callable[[Region, str, Any], Kernel]
    expected_us: Callable[[Region, Arch, Any], float]
    others: Callable[[Region, str, Arch, float], Iterator[Offer]]


def splits(split: Split, body: Graph, name: str, num_splits: int, split_us: float, us: float) -> Iterator[Offer]:
    """The split form of a body, if it may be faster than the kernel, which takes `us` microseconds."""
    if num_splits > 1 and split_us * SPLIT_MARGIN <= us:
        try:
            yield Offer("split", split_us * SPLIT_PENALTY, split(body, name, num_splits))
        except Unsupported:
            return


def library_us(
    kind: str, region: Region, arch: Arch, us: float, before_us: float, after_us: float, usual: bool, rate: float = 1.0
) -> float:
    """The expected time of a tactic that calls a library for the anchor, in microseconds.

    Args:
        us: of the generated kernel, if its operands were plain loads.
        before_us, after_us: of the kernels before and after the call.
        usual: libraries are tuned for such a call.
        rate: of its dtype relative to f16.
    """
    assert region.anchor is not None
    (operand, *_), rates = map(tensor_type, region.anchor.inputs), arch.library
    work = flops(region.anchor, typical) / max(DTYPES[operand.dtype].tensor_rate or 1.0, 1.0)  # as if of halves
    if rates is None or work <= rates.large[kind] or not usual:
        return before_us + SLOWER * us
    overhead_us, flops_per_us = rates.call[kind]
    return before_us + overhead_us + work / (rate * flops_per_us) + after_us


def around(body: Graph, ops: frozenset[str]) -> tuple[list[Node], Node, list[Node]]:
    """The nodes before the anchor, which is one of `ops`; the anchor; and the operations after it, with kernels among
    them inlined."""
    at = next(index for index, node in enumerate(body.nodes) if node.op in ops)
    return list(body.nodes[:at]), body.nodes[at], flat(body.nodes[at + 1 :])


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
