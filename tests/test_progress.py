"""Stages of long work: messages, and bars on terminals."""

from __future__ import annotations

import logging
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from torch_rtx import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_bar(terminal: bool) -> None:
    file = StringIO()
    with progress.progress("building kernels", Console(file=file, force_terminal=terminal)) as update:
        for done in range(4):
            update(done, 3)
    assert ("building kernels" in file.getvalue()) is terminal
    assert ("100%" in file.getvalue()) is terminal


def test_messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One as the stage begins, and one each ten seconds."""
    now = iter([0.0, 4.0, 9.0, 10.5, 10.5, 12.0, 30.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO, progress.STAGES), progress.progress("building kernels") as update:
        for done in range(1, 6):
            update(done, 9)
    stages = ["building kernels", "building kernels: 3 of 9", "building kernels: 5 of 9"]
    assert [record.message for record in caplog.records] == stages


def test_without_rich(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    with caplog.at_level(logging.INFO, progress.STAGES), progress.progress("work") as update:
        update(1, 1)
    assert [record.message for record in caplog.records] == ["work"]
