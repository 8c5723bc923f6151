"""An engine computes no gradients: where a caller wants some, the backward says so, instead of leaving them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_MESSAGE = (
    'an engine computes no gradients: train through torch.compile(model, backend="rtx"), or detach its inputs if no '
    "gradient is meant to go through it"
)


def refuse_gradients(inputs: Sequence[Any], results: list[Any]) -> list[Any]:
    """The results; if gradients are enabled and an input requires one, in the same memory with a backward that raises a
    RuntimeError. Without, gradients that go through the engine would be missing without a word."""
    wanting = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    own = {id(x) for x in inputs}  # a result may be an input itself, to which gradients do go
    taking = [
        index
        for index, y in enumerate(results)
        if isinstance(y, torch.Tensor) and (y.is_floating_point() or y.is_complex()) and id(y) not in own
    ]
    if not wanting or not taking:
        return results
    given = wanting[0], *(results[i] for i in taking)
    _, *refusing = torch._C._functions.DelayedError(_MESSAGE, len(given))(*given)
    refused = dict(zip(taking, refusing, strict=True))
    return [refused.get(index, result) for index, result in enumerate(results)]
