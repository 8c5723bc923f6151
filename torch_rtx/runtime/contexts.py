"""Contexts that change how a compiled module runs, under the names that users of Torch-TensorRT know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch_rtx.errors import RtxError
from torch_rtx.runtime.module import CompiledModule
from torch_rtx.runtime.session import Session, runtime_settings
from torch_rtx.runtime.streaming import weight_uses
from torch_rtx.runtime.streamplan import budget_bytes
from torch_rtx.settings import read_budget

log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=Callable[..., Any])


@contextmanager
def enable_cudagraphs(module: Module) -> Iterator[Module]:
    """Use CUDA graphs in this context, in this thread, also where `cuda_graph_strategy` is "disabled":

        with torch_rtx.runtime.enable_cudagraphs(module) as captured:
            y = captured(x)

    They are on by default. `captured` is `module` itself. Graphs that were captured are kept for the next time.

    Args:
        module: a CompiledModule, or what `torch.compile` returned; a warning says why the former can have no graph.

    Raises:
        RtxError: `module` is not compiled.
    """
    if isinstance(module, CompiledModule):
        if module.session.no_graphs is not None:
            log.warning("no CUDA graphs for this module: %s", module.session.no_graphs)
    elif not (hasattr(module, "_torchdynamo_orig_callable") or getattr(module, "_compiled_call_impl", None)):
        hint = "pass a CompiledModule or torch.compile(model)"
        raise RtxError(f"a {type(module).__name__} is not compiled", hint=hint)
    with runtime_settings(cuda_graph_strategy="whole_graph_capture"):
        yield module


class WeightBudget:
    """The device memory that the weights of one session may take, in bytes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._uses = weight_uses(session.graph, session._trusted_ops)

    @property
    def total_device_budget(self) -> int:
        """All weights: with this budget, or a larger one, none is streamed."""
        return budget_bytes(self._uses, 1.0)

    @property
    def device_budget(self) -> int:
        """The present budget; `session.streamer.summary` says what of it is used.

        Set it to bytes, to a text such as "6GiB" or "50%", or to None for no limit. Calls compute the same before and
        after, bit for bit.

        Raises:
            SettingsError: the budget is invalid or too small; nothing was changed.
        """
        budget, total = self._session.settings.weight_streaming_budget, self.total_device_budget
        return total if budget is None else min(total, budget_bytes(self._uses, read_budget(budget)))

    @device_budget.setter
    def device_budget(self, budget: int | str | None) -> None:
        """See the property."""
        self._session.stream_weights(budget)


@contextmanager
def weight_streaming(module: CompiledModule) -> Iterator[WeightBudget]:
    """Change the budget for the weights of a live module; at the end it is what it was before:

        with torch_rtx.runtime.weight_streaming(module) as weights:
            weights.device_budget = weights.total_device_budget // 2
            y = module(x)

    Each change generates the code of the module again and copies the weights that move.

    Raises:
        RtxError: `module` is no CompiledModule: torch.compile runs on the model's own parameters.
    """
    if not isinstance(module, CompiledModule):
        hint = "build an engine: torch_rtx.compile(model, args)"
        raise RtxError(f"weights of a {type(module).__name__} can't be streamed", hint=hint)
    before = module.session.settings.weight_streaming_budget
    try:
        yield WeightBudget(module.session)
    finally:
        if module.session.settings.weight_streaming_budget != before:
            module.session.stream_weights(before)
