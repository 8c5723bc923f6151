"""The scripts of examples/training train to the same losses with `rtx` as without, and their models are compiled; those
of examples/pipelines print what they found."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import ROOT

EXAMPLES = sorted((ROOT / "examples" / "training").glob("*.py"))
LIBRARIES = {"accelerate", "diffusers", "lightning", "peft", "timm", "transformers"}


def needed(path: Path) -> set[str]:
    """The libraries that a script needs: those that it imports, and those that its docstring names."""
    text = path.read_text()
    imports = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    return LIBRARIES & (imports | set(re.findall(r"\w+", (re.search(r"needs (.*)\.\n", text) or ("", ""))[1])))


def trained(train: Callable[[str | None], list[float]], backend: str | None) -> list[float]:
    """The losses of a script as in a process of its own: Accelerate keeps the first backend that it is given."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    return train(backend)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_losses_are_those_of_eager(path: Path, recorder: Any) -> None:
    for library in sorted(needed(path)):
        pytest.importorskip(library)
    train = runpy.run_path(str(path))["train"]
    expected = trained(train, None)
    assert len(recorder) == 0
    losses = trained(train, "rtx")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    assert losses[-1] < losses[0]
    assert len(recorder) >= 2  # a forward and a backward
    assert recorder.fallbacks == [] or path.stem == "checkpointing"


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
def test_loras_change_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("diffusers", "peft"):
        pytest.importorskip(library)
    script = runpy.run_path(str(ROOT / "examples" / "pipelines" / "sdxl_lora.py"))
    with torch.no_grad():
        script["main"](["--size", "tiny", "--steps", "1", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "0 graphs were compiled for LoRAs; the first one drew the same image again" in text
    names = "none", "first", "second", "both", "again"
    rows = [line.split() for line in text.splitlines() if line.startswith(names)]
    assert [row[0] for row in rows] == [*names]
    assert all(float(row[-1]) < 1e-3 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
