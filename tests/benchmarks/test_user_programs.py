"""The benchmark of what users bring along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import user_programs


def test_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = user_programs.main(["loop", "--size", "small", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    ((row,),) = rows.values()
    assert row["same tokens"]
    assert min(row["while_loop"], row["steps"]) > 0
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == rows
    assert "of its step" in capsys.readouterr().out


@pytest.mark.gpu
def test_attention_and_kernels() -> None:
    rows = user_programs.main(["flex", "launch", "--size", "small"])
    assert [row["case"] for row in rows["flex"]] == ["causal 64", "window 64", "alibi 64", "documents 64"]
    assert all(error < 1e-2 for row in rows["flex"] for error in row["errors"]["rtx"])
    assert torch.tensor([row[part]["rtx"] for row in rows["flex"] for part in ("forward", "backward")]).min() > 0
    assert len(rows["launch"][0]) == 3
