"""The benchmark of several GPUs: what its runner does with ranks that fail or hang, and the models of its cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rank_models, ranks

# Ranks that measure one case, fail in the next one, and hang in the one after that.
RANKS = """
import json, sys, time
file = open(sys.argv[1], "a")
for case in sys.argv[2:]:
    print(json.dumps({"case": case, "begun": 0}), file=file, flush=True)
    if "eager" in case:
        time.sleep(60)
    if "inductor" in case:
        sys.exit(1)
    print(json.dumps({"case": case, "ms": 2.0 if ":1" in case else 1.0}), file=file, flush=True)
"""


def test_failures_cost_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(runner: ranks.Runner, cases: list[str], count: int, file: Path, caches: str) -> Any:
        return subprocess.Popen([sys.executable, "-c", RANKS, str(file), *cases], start_new_session=True)

    monkeypatch.setattr(ranks.Runner, "_start", start)
    monkeypatch.setattr(ranks, "POLL_S", 0.01)
    monkeypatch.setattr(ranks, "GONE_S", 0.0)
    monkeypatch.setitem(ranks.ITEMS, "decode", (0.3, ranks.ITEMS["decode"][1]))
    runner = ranks.Runner(2, 60, True, tmp_path)
    runner.run([f"decode:{peer}" for peer in ("engine:2", "inductor:2", "eager:2", "engine:1")], 2)
    failed = {row["case"]: "failed" in row for row in runner.rows}
    assert failed == {
        "decode:engine:2": False,
        "decode:inductor:2": True,
        "decode:eager:2": True,
        "decode:engine:1": False,
    }
    assert ranks.summary(runner.rows, 2) == ["decode engine, speed of 2 GPUs beside one: 2.00"]
    assert "decode:eager:2" in capsys.readouterr().out


def test_a_step_continues_a_text() -> None:
    """One token after others, with a cache, has the scores of the whole text."""
    torch.manual_seed(0)
    shape, device = rank_models.SMALL, torch.device("cpu")
    model = rank_models.Llama(shape, batch=1)
    tokens = rank_models.tokens_of(shape, (1, 9), 0, device)
    with torch.no_grad():
        whole = model(tokens, torch.arange(9))
        model(tokens[:, :8], torch.arange(8))
        last = model(tokens[:, 8:], torch.tensor([8]))
    torch.testing.assert_close(last[:, 0], whole[:, 8], rtol=1e-4, atol=1e-5)
