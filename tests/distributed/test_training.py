"""Training on two ranks: gradients are those of one process, and graphs reach the backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed import training_checks as checks
from tests.distributed.ranks import Ranks


def test_data_parallel(ranks: Ranks) -> None:
    ranks.run(checks.data_parallel)


def test_fully_sharded(ranks: Ranks) -> None:
    ranks.run(checks.fully_sharded)


def test_a_checkpoint_of_two_ranks_in_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """The loss goes on where two ranks were, whose model was divided and sharded."""
    (first, second), _ = ranks.run(checks.sharded_and_divided, str(tmp_path))
    whole = checks.Model()
    x = torch.randn(4, checks.WIDTH, generator=torch.Generator().manual_seed(0))
    assert checks.loss_of(whole, x).item() == pytest.approx(first)
    dcp.load(state := {"model": whole.state_dict()}, checkpoint_id=tmp_path)
    whole.load_state_dict(state["model"])
    assert checks.loss_of(torch.compile(whole, backend="rtx"), x).item() == pytest.approx(second)
    assert second < first
