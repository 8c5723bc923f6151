"""A family: which tactics there are for regions around one kind of anchor, and their expected times.

Builds, tuning and the runtime take a family's tactics one by one and know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch_rtx.chips import FMA_REACHED, LIBRARY, MODEL_ERROR, SLOWER, TUNED
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, Value
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, flat, kernel, names_in, needed, type_of
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.op_work import PRODUCTS, flops
from torch_rtx.targets import HIGH, Arch

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
    kind: str,
    region: Region,
    arch: Arch,
    us: float,
    before_us: float,
    after_us: float,
    usual: bool,
    moved: int | None = None,
) -> float:
    """The expected time of a tactic that calls a library for the anchor, in microseconds.

    Args:
        us: of the generated kernel, if its operands were plain loads.
        before_us, after_us: of the kernels before and after the call.
        usual: libraries are tuned for such a call.
        moved: bytes that the call reads and writes; None: its operands and results, whole.
    """
    anchor, chip, call = region.anchor, arch.chip, LIBRARY[kind]
    assert anchor is not None
    types = [tensor_type(value) for value in (*anchor.inputs, *filter(None, anchor.outputs))]
    work, rate = flops(anchor, typical), _library_rate(types[0].dtype, kind, arch)
    if not usual or work / (max(rate, chip.tensor) * 1e6) <= call.least_us:
        return before_us + SLOWER * us
    memory_us = MODEL_ERROR * (sum(map(bytes_of, types)) if moved is None else moved) / (chip.memory * 1e3)
    products_us = work / (call.reached * chip.library * rate * 1e6)
    call_us = call.us + max(products_us, memory_us)
    if "wgmma" not in arch.features:
        call_us = max(call_us, us * (TUNED if products_us > memory_us else SLOWER))
    return before_us + call_us + after_us


def _library_rate(dtype: str, kind: str, arch: Arch) -> float:
    """TFLOP/s of a library's products of a dtype; of f32 in TF32 where that is allowed."""
    if dtype == "f32" and arch.float32.of(kind) == HIGH and "tf32" in arch.features:
        return arch.chip.rate("tf32")
    return arch.chip.rate(dtype) * (FMA_REACHED if dtype == "f32" else 1.0)


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


def bare(body: Graph, name: str, anchor: Node, bias: Attr, call: Callable[[BodyBuilder], Value | None]) -> Graph | None:
    """`body`, of the kernel `name`, as a library's product without the bias, which one kernel adds with all that
    follows: libraries have faster kernels without, or add it by a kernel of their own. None if there is no bias, or if
    `call` adds no such product, of the shape of the anchor's, to the calls that it gets.
    """
    before, _, after = around(body, frozenset((anchor.op,)))
    (result,) = anchor.outputs
    outputs = tuple(value for value in body.outputs if isinstance(value, Value))
    made = {value.name for node in (anchor, *after) for value in node.results}
    if not isinstance(bias, Value) or result is None or not {value.name for value in outputs} <= made:
        return None
    taken = names_in(body)
    calls = BodyBuilder(taken, needed(before, anchor.inputs))
    plain = call(calls)
    if plain is None:
        return None
    last = BodyBuilder(taken, needed(flat(before), (bias, *(value for node in after for value in node.inputs))))
    shape = type_of(result).shape
    other = bias if anchor.op in PRODUCTS else last.reshape(bias, (shape[1], *(1 for _ in shape[2:])))
    last.call("add.Tensor", type_of(result), self=plain, other=other)
    last.name_last(result)
    nodes = *calls.nodes, kernel(f"{name}_bias", (plain, *body.inputs), [*last.nodes, *after], outputs)
    return Graph("import", body.inputs, nodes=nodes, outputs=body.outputs)
