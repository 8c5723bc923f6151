"""Two ranks on gloo: collectives in compiled graphs, divided models, training, and the end of a rank.

All is one test: the ranks take longer to start than the checks take, and workers of pytest would each start their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.export import Dim

import torch_rtx
from tests.distributed import collective_checks, parallel_checks, training_checks
from tests.distributed.parallel_checks import Model, divided
from tests.distributed.ranks import Ranks


def test_two_ranks(tmp_path: Path) -> None:
    checks: list[Callable[[Ranks, Path], None]] = [
        collectives_are_in_the_engine,
        divided_models,
        an_engine_for_all_ranks,
        training,
        a_checkpoint_of_two_ranks_in_one_process,
        a_rank_that_ends,  # the last one: no ranks are left
    ]
    with closing(Ranks()) as ranks:
        for check in checks:
            (folder := tmp_path / check.__name__).mkdir()
            check(ranks, folder)


def collectives_are_in_the_engine(ranks: Ranks, folder: Path) -> None:
    for kinds in ranks.run(collective_checks.forms):
        assert len(kinds) >= 2 * len(collective_checks.FORMS)
        assert set(kinds) == {"extern"}
    ranks.run(collective_checks.different_programs)


def divided_models(ranks: Ranks, folder: Path) -> None:
    """With a divided vocabulary, and with sequences divided between the layers."""
    assert ranks.run(parallel_checks.inference, True, True) == [(10, 1)] * 2
    assert ranks.run(parallel_checks.training, False) == [[], []]
    ranks.run(parallel_checks.returned)


def make(mesh: DeviceMesh) -> torch.nn.Module:
    with torch.device("meta"):
        return divided(Model(), mesh)


def make_by_vocabulary(mesh: DeviceMesh) -> torch.nn.Module:
    with torch.device("meta"):
        return divided(Model(), mesh, vocabulary=True)


def make_on_two_dimensions(mesh: DeviceMesh) -> torch.nn.Module:
    with torch.device("meta"):
        layer = torch.nn.Linear(8, 8)
    return parallelize_module(layer, mesh["tp"], ColwiseParallel(output_layouts=Replicate()))


def test_engines_for_a_mesh_of_two_dimensions() -> None:
    """Its rows are equal to DTensor, and have process groups of their own."""
    options: dict[str, Any] = {"mesh": {"dp": 2, "tp": 2}, "device": "cpu"}
    (engine,) = torch_rtx.compile_ranks(make_on_two_dimensions, (torch.zeros(2, 8),), **options)
    assert engine.manifest.groups == {"tp": {"size": 2, "rank": None}}


def an_engine_for_all_ranks(ranks: Ranks, folder: Path) -> None:
    """It is built in this process, for inputs of many sizes, and each rank reads its part of the weights of the whole
    model."""
    tokens = [torch.randint(0, 20, size) for size in ((2, 6), (3, 8), (1, 5))]
    sizes = {0: Dim("batch", max=8), 1: Dim("length", max=16)}
    (engine,) = torch_rtx.compile_ranks(make, (tokens[0],), dynamic_shapes=(sizes,), mesh={"tp": 2}, device="cpu")
    torch_rtx.save(engine, folder / "model.rtx")
    right = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Model()
        save_file(model.state_dict(), folder / f"{seed}.safetensors")
        right.append([model(one).detach() for one in tokens])
    first, second = (str(folder / f"{seed}.safetensors") for seed in range(2))
    for found in ranks.run(parallel_checks.loaded, str(folder / "model.rtx"), first, tokens, second):
        torch.testing.assert_close(found, right)
    engines = torch_rtx.compile_ranks(make_by_vocabulary, (tokens[0],), mesh={"tp": 2}, device="cpu")
    assert len(engines) == 2  # each looks up other rows of the table
    torch_rtx.save(engines[1], folder / "1.rtx")
    save_file(Model(vocabulary=40).state_dict(), folder / "40.safetensors")
    given = (str(folder / name) for name in ("model.rtx", "1.rtx", "40.safetensors"))
    ranks.run(parallel_checks.refused, *given)


def training(ranks: Ranks, folder: Path) -> None:
    ranks.run(training_checks.data_parallel)
    ranks.run(training_checks.fully_sharded)


def a_checkpoint_of_two_ranks_in_one_process(ranks: Ranks, folder: Path) -> None:
    """The loss goes on where two ranks were, whose model was divided and sharded."""
    (first, second), _ = ranks.run(training_checks.sharded_and_divided, str(folder))
    whole = training_checks.Model()
    x = torch.randn(4, training_checks.WIDTH, generator=torch.Generator().manual_seed(0))
    assert training_checks.loss_of(whole, x).item() == pytest.approx(first)
    dcp.load(state := {"model": whole.state_dict()}, checkpoint_id=folder)
    whole.load_state_dict(state["model"])
    assert training_checks.loss_of(torch.compile(whole, backend="rtx"), x).item() == pytest.approx(second)
    assert second < first


def a_rank_that_ends(ranks: Ranks, folder: Path) -> None:
    with pytest.raises(AssertionError, match="a rank ended|the other rank has ended"):
        ranks.run(collective_checks.leave)
    assert ranks.processes[1].exitcode == 1
