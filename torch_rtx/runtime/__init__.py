"""Runtime: makes an engine with weights callable on a device.

It imports nothing of lowering or the backend, so that an application which only loads engines needs neither. Two names
are public, `enable_cudagraphs` and `weight_streaming`, each loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_rtx.runtime.contexts import WeightBudget, enable_cudagraphs, weight_streaming

__all__ = ["WeightBudget", "enable_cudagraphs", "weight_streaming"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_rtx.runtime import contexts

    return getattr(contexts, name)
