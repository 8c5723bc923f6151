"""A rank that ends ends the others, with an error that says so. These tests are the last ones of the ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from tests.distributed.ranks import Ranks


def leave() -> None:
    """The second rank ends in the middle of a call, the first one waits for it."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    compiled = torch.compile(function, backend="rtx", fullgraph=True)
    with torch.no_grad():
        compiled(torch.ones(4))
        if dist.get_rank() == 1:
            os._exit(1)
        with pytest.raises(RuntimeError, match=r"(?i)connection|peer|closed"):
            compiled(torch.ones(4))
    raise EOFError("the other rank has ended")


def test_a_rank_that_ends(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="a rank ended|the other rank has ended"):
        ranks.run(leave, seconds=30)
    assert ranks.processes[1].exitcode == 1
    ranks.close()
