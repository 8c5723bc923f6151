"""The matrices among the tensors of an ONNX program, as `backend.products` finds those of a captured one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_rtx.onnx.plan import Step, every

_PRODUCTS = ("MatMul", "Gemm", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm")
_SAME = ("Identity", "Cast", "CastLike")


@dataclass(frozen=True)
class Product:
    """What is known of a matrix.

    Attributes:
        axis: the axis that products sum over; None: the model does something else with the matrix, or sums over both.
        bias: the slot of the tensor that is added to the product, or None.
        module: the path of the module that an exporter made the product from, or None.
    """

    axis: int | None
    bias: int | None = None
    module: str | None = None


def products_of(steps: Sequence[Step], tensors: Mapping[int, int]) -> dict[int, Product]:
    """What is known of the matrices among tensors, by slot; nothing of those whose rows alone are read.

    Args:
        tensors: the slots of the model's tensors, with their ranks.
    """
    steps = list(every(steps))
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for slot in step.inputs:
            if slot is not None:
                readers.setdefault(slot, []).append(step)
    sources = {slot: (slot, False) for slot, rank in tensors.items() if rank == 2}
    found: dict[int, list[Product]] = {}
    for step in steps:
        for place, slot in enumerate(step.inputs):
            if slot not in sources or (step.op == "CastLike" and place == 1):
                continue
            source, swapped = sources[slot]
            if step.op == "Gather" and step.attributes.get("axis", 0) == swapped:
                continue
            if step.op in (*_SAME, "Transpose") and step.outputs[0] is not None:
                turned = step.op == "Transpose" and list(step.attributes.get("perm", (1, 0))) == [1, 0]
                sources[step.outputs[0]] = source, swapped ^ turned
            else:
                found.setdefault(source, []).append(_product(step, place, swapped, readers, tensors))
    return {slot: _of_all(products) for slot, products in found.items()}


def _product(
    step: Step, place: int, swapped: bool, readers: Mapping[int, list[Step]], tensors: Mapping[int, int]
) -> Product:
    """What a node says of a matrix, an input of it."""
    if step.op not in _PRODUCTS or place > 1:
        return Product(None)
    axis = (1 - place) ^ int(step.attributes.get("transB" if place else "transA", 0)) ^ swapped
    if place == 0 or step.op not in ("MatMul", "Gemm") or step.attributes.get("alpha", 1) != 1:
        return Product(axis)  # not the product of a layer
    added = step.inputs[2:] + tuple(_added(step, readers))
    return Product(axis, next((slot for slot in added if slot in tensors), None), _module(step))


def _of_all(products: Sequence[Product]) -> Product:
    """What several nodes say of one matrix."""
    known = [product for product in products if product.axis is not None]
    return known[0] if len({product.axis for product in known}) == 1 else Product(None)


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
