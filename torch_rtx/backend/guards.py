"""Guards that a model need not pay for in each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def skip_layer_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to keep: all but those on PyTorch's own layers, and of these whether they train.

        torch.compile(model, backend="rtx", options={"guard_filter_fn": torch_rtx.skip_layer_guards})

    Most of a small model's host time goes into guards on each layer's attributes and tensors. Without them a call still
    sees switches between training and evaluation, other inputs, and whatever a model's own modules use. Other contents,
    other memory and other parameters are seen by the session, which refuses those of another type (`RefitError`). What
    nobody sees any more: a layer that is replaced by one of another kind, other options of a layer (`eps`, `stride`,
    `p`), hooks that are added to it, another `requires_grad` of its parameters, another shape or stride in the same
    memory. Call `torch._dynamo.reset()` after such a change.

    Where gradients are on, or a layer trains, guards on tensors stay: parameters and statistics are inputs of such a
    graph, which a session does not check.
    """
    trains = torch.is_grad_enabled() or any(guard.value is True for guard in guards if _is_mode(guard))
    return [
        not guard.orig_guard.source.is_unspecialized_builtin_nn_module()
        or _is_mode(guard)
        or (trains and guard.guard_type == "TENSOR_MATCH")
        for guard in guards
    ]


def _is_mode(guard: Any) -> bool:
    """Whether a guard is on what says that a module trains."""
    return bool(guard.name.endswith(".training"))
