"""Models divided among two ranks: by torch.compile, in training, and as engines that were built without ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

import torch_rtx
from tests.distributed import parallel_checks as checks
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize(("vocabulary", "sequence", "collectives"), [(True, False, 4), (True, True, 10)])
def test_inference(ranks: Ranks, vocabulary: bool, sequence: bool, collectives: int) -> None:
    assert ranks.run(checks.inference, vocabulary, sequence) == [collectives] * 2


def test_training(ranks: Ranks) -> None:
    assert ranks.run(checks.training, False) == [[], []]


def make(mesh: DeviceMesh) -> torch.nn.Module:
    with torch.device("meta"):
        return checks.divided(checks.Model(), mesh)


def make_by_vocabulary(mesh: DeviceMesh) -> torch.nn.Module:
    with torch.device("meta"):
        return checks.divided(checks.Model(), mesh, vocabulary=True)


def test_an_engine_for_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (2, 6))
    (engine,) = torch_rtx.compile_ranks(make, (tokens,), mesh={"tp": 2}, device="cpu")
    torch_rtx.save(engine, tmp_path / "model.rtx")
    right = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = checks.Model()
        save_file(model.state_dict(), tmp_path / f"{seed}.safetensors")
        right.append(model(tokens).detach())
    first, second = (str(tmp_path / f"{seed}.safetensors") for seed in range(2))
    for found in ranks.run(checks.loaded, str(tmp_path / "model.rtx"), first, tokens, second):
        torch.testing.assert_close(found, torch.stack(right))
    engines = torch_rtx.compile_ranks(make_by_vocabulary, (tokens,), mesh={"tp": 2}, device="cpu")
    assert len(engines) == 2  # each looks up other rows of the table
    torch_rtx.save(engines[1], tmp_path / "1.rtx")
    save_file(checks.Model(vocabulary=40).state_dict(), tmp_path / "40.safetensors")
    given = (str(tmp_path / name) for name in ("model.rtx", "1.rtx", "40.safetensors"))
    ranks.run(checks.refused, *given)
