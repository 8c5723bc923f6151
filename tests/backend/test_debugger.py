"""Debugger: everything that is compiled inside is logged and dumped, and nothing after it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx import CompilationSettings, Debugger, RuntimeSettings, SettingsError
from torch_rtx.lowering import pipeline

X = torch.ones(2, 4)
LOGGER = logging.getLogger("torch_rtx")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graphs(folder: Path) -> list[set[str]]:
    """The files of each graph that is dumped."""
    return [{file.name for file in path.iterdir()} for path in sorted(folder.glob("graph_*"))]


def test_what_is_compiled_inside(tmp_path: Path) -> None:
    model, before = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), CompilationSettings()
    level, handlers = LOGGER.level, list(LOGGER.handlers)
    torch_rtx.compile(model, (X,))  # which the engine cache has from now on
    with Debugger(logging_dir=tmp_path / "debug") as debugger:
        assert debugger.logging_dir == str(tmp_path / "debug")
        torch_rtx.compile(model, (X,))
        torch_rtx.compile(model, (X,), settings=before)
        torch.compile(model, backend="rtx")(X)
        torch_rtx.compile(model, (X,), settings=CompilationSettings(dump_dir=str(tmp_path / "own")))
        assert (CompilationSettings().dump_dir, RuntimeSettings().dump_dir) == (debugger.logging_dir,) * 2
    torch_rtx.compile(model, (X,))
    stages = {f"{index:02}_{step.name}.rtxir" for index, step in enumerate(pipeline.PIPELINE, 1) if not step.needs}
    found = graphs(tmp_path / "debug")
    assert len(found) == 3
    assert all(len(files & stages) > 8 and "00_fx.py" in files for files in found)
    assert len(graphs(tmp_path / "own")) == 1
    log = (tmp_path / "debug" / "torch_rtx.log").read_text()
    assert log.count("torch_rtx.lowering.pipeline: simplify: ") == 4
    assert CompilationSettings() == before
    assert (LOGGER.level, LOGGER.handlers) == (level, handlers)


def test_levels_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    debugger = Debugger("warning")
    with debugger:
        assert LOGGER.level == logging.WARNING
    assert Path(debugger.logging_dir or "").parent == tmp_path
    assert CompilationSettings().dump_dir is None
    with debugger, Debugger(logging_dir=tmp_path / "inner") as inner:
        assert CompilationSettings().dump_dir == inner.logging_dir
    with pytest.raises(SettingsError, match=r"unknown log_level 'loud'[\s\S]*levels are debug, info, warning, error"):
        Debugger("loud")
