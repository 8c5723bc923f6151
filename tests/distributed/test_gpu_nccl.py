"""Two GPUs and NCCL: the checks of two ranks, CUDA graphs, and calls that keep in step for long."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from tests.distributed import collective_checks, parallel_checks, training_checks
from tests.distributed.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    """Two ranks on NCCL, each with a GPU."""
    made = Ranks("nccl")
    yield made
    made.close()


def test_every_form(gpus: Ranks) -> None:
    for kinds in gpus.run(collective_checks.forms, seconds=120):
        assert set(kinds) == {"extern"}


def test_different_programs(gpus: Ranks) -> None:
    gpus.run(collective_checks.different_programs, seconds=60)


def test_collectives_are_part_of_cuda_graphs(gpus: Ranks) -> None:
    for why_not, replays in gpus.run(collective_checks.replayed, 12, seconds=180):
        assert why_not is None
        assert replays >= 4


def test_small_sums(gpus: Ranks) -> None:
    (limit, replays), other = gpus.run(collective_checks.small_sums, 10, seconds=120)
    assert (limit, replays) == other
    assert limit >= 32 << 10
    assert replays >= 4


def test_measuring_is_shared(gpus: Ranks) -> None:
    (choices, first), (other, second) = gpus.run(collective_checks.measured, seconds=180)
    assert choices == other
    assert min(first, second) > 0
    assert first + second >= len(choices) > 2


def test_a_rank_that_is_killed() -> None:
    """The other one's GPU waits in a CUDA graph. It ends soon after the timeout, and does not hang."""
    with closing(Ranks("nccl", seconds=20)) as ranks:
        ranks.start(collective_checks.killed)
        ranks.processes[1].join(120)
        assert ranks.processes[1].exitcode == -signal.SIGKILL
        ranks.processes[0].join(20 + 20 + 20)
        assert ranks.processes[0].exitcode not in (None, 0)


def test_ranks_stay_in_step(gpus: Ranks) -> None:
    gpus.run(collective_checks.random_shapes, 400, seconds=180)


@pytest.mark.parametrize("sequence", [False, True])
def test_divided_models(gpus: Ranks, sequence: bool) -> None:
    gpus.run(parallel_checks.inference, True, sequence, seconds=180)


def test_dtensors_are_returned(gpus: Ranks) -> None:
    gpus.run(parallel_checks.returned, seconds=120)


def test_divided_training(gpus: Ranks) -> None:
    assert gpus.run(parallel_checks.training, False, seconds=180) == [[], []]


def test_data_parallel(gpus: Ranks) -> None:
    gpus.run(training_checks.data_parallel, seconds=180)


def test_fully_sharded(gpus: Ranks) -> None:
    gpus.run(training_checks.fully_sharded, seconds=180)
