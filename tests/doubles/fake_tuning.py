"""A GPU for a session's tuning, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from torch_rtx.runtime import tuning_context


def install_gpu(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any], sm: int = 89) -> None:
    """Let `tuning_context` find a GPU of this SM, whose kernels `build` builds, and which measures nothing."""
    monkeypatch.setattr(tuning_context, "COMPILE_CLIENT", SimpleNamespace(build=build, stop=None))
    monkeypatch.setattr(tuning_context, "BACKGROUND", SimpleNamespace(on_stop=lambda stop: None))
    monkeypatch.setattr(tuning_context.driver_api, "driver", object)
    monkeypatch.setattr(tuning_context, "gpu_of", lambda driver, index: SimpleNamespace(sm=sm))
    monkeypatch.setattr(tuning_context, "timer", lambda device: None)
    monkeypatch.setattr(tuning_context, "known_chip", lambda sm, device: None)
