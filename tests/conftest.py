"""Fixtures and options that all tests share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

# Before torch is imported: it reads the variable once. Workers share few cores, so one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:  # an environment that has a GPU may have only pytest: tests that need more skip themselves
    pass
else:
    settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("thorough", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def seed() -> int:
    """Seeds Python's and torch's generators, on every device, for a test that draws numbers; returns the seed."""
    value = 0
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before the test, and nothing left of it after; its random numbers are always the same."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the test compiles, see `Recorder`."""
    from tests.compiled import Recorder

    return Recorder(monkeypatch)
