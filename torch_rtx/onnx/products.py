"""The matrices among the tensors of an ONNX program, as `backend.products` finds those of a captured one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_rtx.onnx.plan import Step, every


@dataclass(frozen=True)
class Product:
    """What is known of a matrix.

    Attributes:
        axis: the axis that a product sums over.
        bias: the slot of the tensor that is added to the product, or None.
        module: the path of the module that an exporter made the product from, or None.
    """

    axis: int
    bias: int | None
    module: str | None


def products_of(steps: Sequence[Step], tensors: Mapping[int, int]) -> dict[int, Product]:
    """The products of the matrices among tensors, by slot. A matrix of which products sum over both axes is left out.

    Args:
        tensors: the slots of the model's tensors, with their ranks.
    """
    steps = list(every(steps))
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for slot in step.inputs:
            if slot is not None:
                readers.setdefault(slot, []).append(step)
    sources = {slot: (slot, False) for slot in tensors}
    found: dict[int, list[Product]] = {}
    for step in steps:
        if step.op == "Transpose" and step.inputs[0] in sources and step.outputs[0] is not None:
            source, swapped = sources[step.inputs[0]]
            sources[step.outputs[0]] = source, swapped ^ (list(step.attributes.get("perm", (1, 0))) == [1, 0])
        scaled = step.attributes.get("alpha", 1) != 1
        if step.op not in ("MatMul", "Gemm") or scaled or step.inputs[1] not in sources:
            continue
        source, swapped = sources[step.inputs[1]]
        if tensors[source] == 2:
            axis = int(step.attributes.get("transB", 0)) ^ swapped
            added = step.inputs[2:] + tuple(_added(step, readers))
            bias = next((slot for slot in added if slot in tensors), None)
            found.setdefault(source, []).append(Product(axis, bias, _module(step)))
    return {slot: all_[0] for slot, all_ in found.items() if len({product.axis for product in all_}) == 1}


def _added(step: Step, readers: Mapping[int, list[Step]]) -> Sequence[int | None]:
    """What is added to a product that nothing else reads."""
    users = readers.get(step.outputs[0], ()) if step.outputs[0] is not None else ()
    return users[0].inputs if len(users) == 1 and users[0].op == "Add" else ()


def _module(step: Step) -> str | None:
    """The module that PyTorch's exporters name: in metadata, or as in `/encoder/layer.0/query/MatMul`."""
    scopes = re.findall("'([^']*)'", step.scopes)
    if len(scopes) > 1:
        return scopes[-2]
    return step.name.rpartition("/")[0].strip("/").replace("/", ".") if step.name.startswith("/") else None
