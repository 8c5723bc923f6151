"""The weights of an ONNX model under the names that an engine has for them.

They are found by their places, if the engine was built from the same program; else by their names; and matrices that an
exporter transposed and renamed by what their products have in common with the engine's. What is left is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import RefitError
from torch_rtx.onnx.framed import aligned
from torch_rtx.onnx.module import OnnxModule, Source, read_module
from torch_rtx.onnx.outline import digest_of
from torch_rtx.onnx.products import Product

log = logging.getLogger(__name__)
Facts = Mapping[str, Any]
Wanted = Mapping[str, tuple[torch.dtype, Sequence[int]]]
Place = tuple[str, Tensor, bool]  # see `OnnxModule.places`
# Names that exporters make by counting: in another program they mean another tensor.
_COUNTED = re.compile(r"(onnx::\w+|val|const_fold_opt_)?_?\d+|/.*", re.DOTALL)
_OTHER = "is part of the program, which a refit does not change, and has another type or value: build an engine of it"
_SIDES = "is square, and nothing in the model says whether it is transposed: give a state dict"


def program_of(module: OnnxModule) -> Facts:
    """What an engine keeps of the ONNX program that it is built from, to find weights by: plain data, without values.

    `structure` is the digest of an outline; `weights` has the name of each tensor in the order of the outline, or None
    for one that is part of the program; `numbers` has digests of the latter. `frame` is the digest of the file's frame,
    see `framed`, or None, and `initializers` has the index of each tensor among those of the file, or None.
    """
    outline, places, (frame, indexes) = module.outline(), module.places(), module.frame()
    tensors = [places[slot] for slot in outline.slots]
    initializers = [indexes.get(slot) for slot in outline.slots]
    stored = all(fixed or i is not None for i, (_, _, fixed) in zip(initializers, tensors, strict=True))
    return {
        "frame": frame if stored else None,
        "initializers": initializers,
        "structure": outline.structure,
        "weights": [None if fixed else name for name, _, fixed in tensors],
        "numbers": [digest_of(tensor) for _, tensor, fixed in tensors if fixed],
    }


def modules_of(module: OnnxModule) -> dict[str, str | None]:
    """By the names of matrices: the modules that an exporter made their products from, or None."""
    places = module.places()
    return {places[slot][0]: product.module for slot, product in module.products().items()}


def weights_of(
    source: Source | OnnxModule, wanted: Wanted, program: Facts | None, products: Facts
) -> dict[str, Tensor]:
    """The tensors of a model, by the names that an engine has for them. Those that the engine lacks keep their names;
    but what only a program has is left out: integers of 64 bits, truth values, and lone numbers that exporters named.

    The tensors of a file are mapped; nobody may compute with them before they are copied, see `framed.tensor_at`.

    Args:
        wanted: the dtype and the shape of each tensor that the engine needs, by all of its names.
        program: what the engine has of the ONNX program that it was built from, see `program_of`; None: of none.
        products: what it has of its products, see `backend.products.products_of`.

    Raises:
        RefitError: a tensor that is part of the same program has another value than in the engine.
        OnnxError, FileNotFoundError, IntegrationError: see `from_onnx`.
    """
    module = source if isinstance(source, OnnxModule) else read_module(source, mapped=True)
    places = module.places()
    if program is not None:
        outline = module.outline()
        if outline.structure == program["structure"] and len(outline.slots) == len(program["weights"]):
            return _by_place([places[slot] for slot in outline.slots], program)
        log.warning("%s holds another program than the engine: only its weights are taken", module.file or "the model")
    return _by_name(module, wanted, products)


def _by_place(given: Sequence[Place], program: Facts) -> dict[str, Tensor]:
    numbers, found, other = iter(program["numbers"]), {}, {}
    for wanted, (name, tensor, _) in zip(program["weights"], given, strict=True):
        if wanted is not None:
            found[wanted] = tensor
        elif digest_of(tensor) != next(numbers, None):
            other[name] = _OTHER
    if other:
        raise RefitError((), (), other)
    return found


def _by_name(module: OnnxModule, wanted: Wanted, products: Facts) -> dict[str, Tensor]:
    places, every, onnx_names = module.places(), module.products(), module.onnx_names
    own = {slot: product for slot, product in every.items() if product.axis is not None}
    named = {slot: (name if name in wanted else onnx_names.get(name, name)) for slot, (name, *_) in places.items()}
    kept = {
        slot: (named[slot], tensor) for slot, (_, tensor, fixed) in places.items() if not fixed or named[slot] in wanted
    }
    lost = {slot for slot, (name, _) in kept.items() if name not in wanted or _COUNTED.fullmatch(name)}
    given = {name: slot for name, slot in module.copies.items() if name in wanted and not _COUNTED.fullmatch(name)}
    given |= {name: slot for slot, (name, _) in kept.items() if slot not in lost}
    unclear = every.keys() - own.keys()
    sides = {name for name, slot in given.items() if slot in unclear and _is_square(places[slot][1])}
    if sides & products.keys():
        raise RefitError((), (), dict.fromkeys(sides & products.keys(), _SIDES))
    found = {name: _turned(places[slot][1], own.get(slot), products.get(name)) for name, slot in given.items()}
    left = {slot: kept[slot] for slot in lost if not _is_of_program(*kept[slot])}
    fitting = {slot: _fitting(own[slot], kept[slot][1], wanted, products) for slot in left.keys() & own.keys()}

    def turned(slot: int, key: str) -> Tensor:
        return _turned(aligned(kept[slot][1]), own[slot], products[key])

    copies: dict[str, list[int]] = {}
    for slot, keys in fitting.items():
        bias = own[slot].bias
        added = kept[bias][0] if bias in kept and bias not in lost else None
        near = [key for key in keys if key not in found and _is_near(products[key], own[slot].module, added)]
        if len(near) == 1:
            copies.setdefault(near[0], []).append(slot)
    for key, slots in copies.items():
        first, *others = (turned(slot, key) for slot in slots)
        if all(torch.equal(first, other) for other in others):
            found[key] = first
            for slot in slots:
                del left[slot]
    for slot in left.keys() & own.keys():  # copies of what the engine gets by another name, such as a tied matrix
        if any(key in found and torch.equal(turned(slot, key), aligned(found[key])) for key in fitting[slot]):
            del left[slot]
    for slot in left.keys() & {*given.values()}:
        del left[slot]
    return found | {f"{name} (elsewhere)" if name in wanted else name: tensor for name, tensor in left.values()}


def _turned(tensor: Tensor, product: Product | None, fact: Facts | None) -> Tensor:
    """A matrix, transposed if the engine's product sums over its other axis."""
    same = product is None or fact is None or product.axis == fact["axis"]
    return tensor if same else aligned(tensor).t().contiguous()


def _is_square(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] > 1


def _fitting(product: Product, tensor: Tensor, wanted: Wanted, products: Facts) -> list[str]:
    """The names of all of the engine's matrices whose shape a matrix has, transposed if need be."""
    shapes = {key: tuple(tensor.shape)[:: 1 if fact["axis"] == product.axis else -1] for key, fact in products.items()}
    return [key for key, shape in shapes.items() if key in wanted and tuple(wanted[key][1]) == shape]


def _is_near(fact: Facts, module: str | None, added: str | None) -> bool:
    """Whether a matrix of the engine has the same bias, or is of the same module."""
    return (added is not None and added == fact["bias"]) or (module is not None and module == fact["module"])


def _is_of_program(name: str, tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.bool) or (tensor.numel() == 1 and bool(_COUNTED.fullmatch(name)))
