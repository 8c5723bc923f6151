"""What `torch.compile` compiles of a part of a pipeline: a graph for the first size of images, and one for all others.

By itself Dynamo lets those axes vary that have had two sizes. So it would compile once for another height and again for
another width, which a pipeline changes as well, sooner or later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Any]
INNER = 2  # the first axis of an image or a video that is neither the batch nor the channels


def compiled(function: Run, *, dynamic: bool | None = None, **options: Any) -> Run:
    """`torch.compile(function, backend="rtx")`, whose second graph is for images of any size.

    Args:
        dynamic: None: as said; else as that of `torch.compile`.
        options: the others of `torch.compile`.
    """
    run = torch.compile(function, backend="rtx", dynamic=dynamic, **options)
    return _Varying(run) if dynamic is None else run


class _Varying:
    """Gives `run` hints which axes vary."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: dict[int | str, torch.Size] = {}  # the first shape of each argument
        update_wrapper(self, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        positional = [self._hinted(place, value) for place, value in enumerate(args)]
        return self._run(*positional, **{name: self._hinted(name, value) for name, value in kwargs.items()})

    def _hinted(self, place: int | str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() <= INNER + 1 or self._first.setdefault(place, value.shape)[INNER:] == value.shape[INNER:]:
            return _alone(value) if value._base is not None else value
        image = _alone(value)  # a hint stays on a tensor, which the graph for the first size would refuse then
        # An axis of one element has a graph of its own.
        torch._dynamo.maybe_mark_dynamic(image, [a for a in range(INNER, image.dim()) if image.shape[a] > 1])
        return image


def _alone(value: Tensor) -> Tensor:
    """The same, without the tensor that it may be a view of. Dynamo looks at that one as well: so the noise that a
    pipeline begins with, if that is a view, would have another graph than the images of later steps."""
    return value.view_as(value) if value.requires_grad else value.detach()
