"""Loss curves: a short one of a tiny model, and what counts as the same curve."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import loss_curve


def test_compiled_learns_as_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss_curve, "TIMED", 1)
    out = tmp_path / "curves.json"
    arguments = ["--size", "small", "--steps", "12", "--device", "cpu", "--peers", "rtx", "--out", str(out)]
    assert loss_curve.main(arguments) == 0
    result = json.loads(out.read_text())
    curves = {name: found["loss"] for name, found in result["curves"].items()}
    assert curves.keys() == {"eager", "eager-2", "rtx"}
    assert all(losses[-1] < losses[0] for losses in curves.values())
    assert result["spread"] > 0  # there is dropout, of which each seed has its own
    assert result["agree"] == {"rtx": True}
    assert "| rtx |" in capsys.readouterr().out


@pytest.mark.parametrize(("offset", "agrees"), [(0.0, True), (0.1, False), (float("nan"), False)])
def test_agreement(offset: float, agrees: bool) -> None:
    """Noise as between the runs of eager is no difference, and an offset of its size in all steps is one."""
    noise = random.Random(0)
    curves = {
        name: [10 - 0.02 * step + noise.gauss(0, 0.05) for step in range(200)] for name in ("eager", "eager-2", "peer")
    }
    curves["peer"] = [loss + offset for loss in curves["peer"]]
    assert loss_curve.compare(curves)["agree"] == {"peer": agrees}


def test_a_peer_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and the others have their curves."""

    def fail(peer: str, *rest: object) -> dict[str, object]:
        if peer == "rtx":
            raise ValueError("no")
        return {"loss": [1.0] * 10, "step_ms": 1.0}

    monkeypatch.setattr(loss_curve, "curve", fail)
    assert loss_curve.main(["--size", "small", "--steps", "10", "--device", "cpu", "--peers", "rtx"]) == 1
    assert "- rtx: ValueError: no" in capsys.readouterr().out


def test_data() -> None:
    """Each step has pieces of the text, every piece once before any comes again, always in the same order."""
    ids = torch.arange(100 * 32 + 5)
    found = list(loss_curve.batches(ids, "small", 30))
    assert {tuple(batch.shape) for batch in found} == {(4, 32)}
    first = torch.cat(found)[:100]
    assert sorted(first[:, 0].tolist()) == list(range(0, 3200, 32))
    assert (first[:, 1:] - first[:, :-1] == 1).all()
    assert all(map(torch.equal, found, loss_curve.batches(ids, "small", 30)))


def test_text() -> None:
    documents = loss_curve.text("full")
    assert sum(map(len, documents)) > 3e6
    assert "assert" in documents[0]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (["--peers", "aoti"], "can't train: aoti"), (["--steps", "3"], "fewer than 10 steps"):
        with pytest.raises(SystemExit) as ended:
            loss_curve.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
