"""An engine computes no gradients: where a caller wants some, the backward says so, instead of leaving them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    'an engine computes no gradients: train through torch.compile(model, backend="rtx"), or detach its inputs if no '
    "gradient is meant to go through it"
)


def require_gradients(inputs: Sequence[Any]) -> bool:
    """Whether an input of a call requires a gradient."""
    for x in inputs:  # noqa: SIM110  `any` takes twice as long, in each call
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def refuse_gradients(inputs: Sequence[Any], results: list[Any]) -> list[Any]:
    """The results of a call, in the same memory, with a backward that raises a RuntimeError: gradients that go through
    the engine would be missing without a word. A result that is an input itself stays as it is."""
    own = {id(x) for x in inputs}
    taking = [
        index
        for index, y in enumerate(results)
        if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) and id(y) not in own
    ]
    required = next(x for x in inputs if isinstance(x, Tensor) and x.requires_grad)
    if not taking:
        return results
    given = required, *(results[index] for index in taking)
    _, *refusing = torch._C._functions.DelayedError(_MESSAGE, len(given))(*given)
    refused = dict(zip(taking, refusing, strict=True))
    return [refused.get(index, result) for index, result in enumerate(results)]
