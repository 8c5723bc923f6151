"""What the tests of the engine cache share: who hit and who missed, and the keys of what is captured."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import torch_rtx
from tests.helpers.ahead import Function
from tests.helpers.compiled import compile_rtx
from torch_rtx import CompilationSettings
from torch_rtx.backend import program_cache
from torch_rtx.cache.key import Key


class Traffic:
    """The messages of the engine cache since `clear`."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        caplog.set_level(logging.INFO, logger="torch_rtx.cache")

    def clear(self) -> None:
        self.caplog.clear()

    def __call__(self, start: str) -> list[str]:
        """The messages that begin with `start`."""
        return [r.message for r in self.caplog.records if r.name == "torch_rtx.cache" and r.message.startswith(start)]

    @property
    def counts(self) -> tuple[int, int]:
        """How many hits and misses there were."""
        return len(self("hit")), len(self("miss"))


class Keys:
    """Gives the keys of what is captured in place of compiling it twice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Key] = []
        compute = program_cache.graph_key

        def record(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            self.found.append(result.key)
            return result

        monkeypatch.setattr(program_cache, "graph_key", record)

    def __call__(self, function: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Key:
        """The key of the only graph of `function` for these arguments; `options` are those of the compilation."""
        torch._dynamo.reset()
        self.found.clear()
        # Without a look at known captures, which would come before the key that is wanted.
        compile_rtx(function, options={"reuse_cached_engines": False, **(options or {})}, **kwargs)(*args)
        (key,) = self.found
        return key

    def exported(self, function: Any, *args: Any) -> Key:
        """The same for an engine ahead of time, whose inputs stand in the order of the arguments."""
        self.found.clear()
        torch_rtx.compile(Function(function), args, settings=CompilationSettings(reuse_cached_engines=False))
        (key,) = self.found
        return key
