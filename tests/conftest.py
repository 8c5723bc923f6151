"""Fixtures and options that all tests share."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: it reads the variable once. Workers share few cores, so one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor after each capture does the collector run, see `pytest_collection_finish`.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
# Engines of this run alone, for this process and those that it starts: never the user's own.
os.environ["TORCH_RTX_CACHE_DIR"] = CACHES = tempfile.mkdtemp(prefix="torch_rtx_tests_")

import pytest
import torch

import torch_rtx
from tests import unread, windows_rules

if sys.platform == "linux":
    windows_rules.install()
torch.set_num_threads(1)
# PyTorch writes down each step of a compilation if this logger has handlers. pytest gives some to loggers that hand
# their records to nobody.
logging.getLogger("torch.__trace").handlers.clear()
logging.getLogger("torch.__trace").propagate = True
gc.disable()  # until all tests are imported, see `pytest_collection_finish`
NUMBERS = itertools.count()
FILES = itertools.count()

try:
    from hypothesis import settings
except ImportError:  # an environment that has a GPU may have only pytest: tests that need more skip themselves
    pass
else:
    settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("thorough", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def unspecialized() -> Iterator[None]:
    """Calls of this thread run what is there, and are captured as CUDA graphs, before any kernel is compiled."""
    with torch_rtx.runtime_settings(specialization_strategy="none"):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-dtypes`: samples of operators in every dtype; without it in some, which differ from name to name."""
    parser.addoption("--all-dtypes", action="store_true", help="samples of operators in every dtype")


def pytest_collection(session: pytest.Session) -> None:
    """pytest rewrites the asserts of each test file the first time that one is imported, in ten seconds for all of them
    after a checkout. Every other worker of the whole suite begins with the last file: what one does no other has to."""
    whole = session.config.args == session.config.getini("testpaths")
    if not whole or int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2 == 0:
        return
    for path in sorted(Path(__file__).parent.rglob("test_*.py"), reverse=True):
        with contextlib.suppress(pytest.skip.Exception):  # of what the environment lacks
            importlib.import_module(".".join(path.relative_to(Path(__file__).parents[1]).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Half a million imported objects stay to the end, and need not be visited again. Dynamo makes millions of
    short-lived ones: by default the collector runs at each 700th, which takes a tenth of the time of a capture."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 20)
    gc.enable()
    unread.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What tests leave behind, millions of objects in the end, is not visited again either: without this, each
    `gc.collect()` of a late test takes seconds. After every tenth file: that takes a tenth of a second and more."""
    yield
    if nextitem is not None and nextitem.path != item.path and next(FILES) % 10 == 9:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_unconfigure() -> None:
    """Removes the engine caches of the run."""
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture
def as_on_posix() -> Iterator[None]:
    """Without the rules of Windows: the test is about files that are replaced while they are open."""
    with windows_rules.suspended():
        yield


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine cache of its own for each test, empty: what one test builds no other test finds."""
    folder = Path(CACHES) / str(next(NUMBERS))
    monkeypatch.setenv("TORCH_RTX_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def all_dtypes(request: pytest.FixtureRequest) -> bool:
    """Whether `--all-dtypes` is given."""
    return bool(request.config.getoption("--all-dtypes"))


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
    from tests.helpers.compiled import Recorder

    return Recorder(monkeypatch)
