"""A filter for Dynamo's guards that shortens the host time of each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Of tensors; a DTensor or another wrapper has a second one, on its placement or whatever else it holds.
OF_TENSORS = frozenset(("TENSOR_MATCH", "DTENSOR_SPEC_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH"))


def skip_layer_guards(guards: Sequence[Any]) -> list[bool]:
    """Drop Dynamo's guards on PyTorch's own layers, except those on their `training` flag: True for each guard to keep.

        torch.compile(model, backend="rtx", options={"guard_filter_fn": torch_rtx.skip_layer_guards})

    Most of a small model's host time goes into guards on each layer's attributes and tensors. The remaining guards
    still detect a switch between training and evaluation, other inputs, and changes of the model's own modules. The
    session detects new values, new memory and new parameters, and refuses parameters of another type (`RefitError`).
    Undetected remain: a layer replaced by one of another class, changed options of a layer (`eps`, `stride`, `p`),
    added hooks, a changed `requires_grad` of a parameter, another shape or stride in the same memory. Call
    `torch._dynamo.reset()` after such a change.

    Guards on tensors stay if gradients are enabled or a layer trains: parameters and statistics are inputs of such a
    graph, and a session does not check inputs.
    """
    trains = torch.is_grad_enabled() or any(guard.value is True for guard in guards if _is_mode(guard))
    return [
        not guard.orig_guard.source.is_unspecialized_builtin_nn_module()
        or _is_mode(guard)
        or (trains and guard.guard_type in OF_TENSORS)
        for guard in guards
    ]


def _is_mode(guard: Any) -> bool:
    """The guard is on a module's `training` flag."""
    return bool(guard.name.endswith(".training"))
