"""Figures of a GPU: measured, kept in the runtime cache, and what they decide."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.cache.test_runtime_cache import ADA
from tests.test_chips import FOUND
from torch_rtx.artefacts import Artefacts
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.chips import REQUIRED, Chip, chip_named, read_figures, typical_chip
from torch_rtx.cli.app import app
from torch_rtx.errors import KernelError
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import fastest
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime import gpu_figures, launch, tuning_context
from torch_rtx.runtime.gpu_figures import measure, measured_on, write_figures
from torch_rtx.runtime.tuning_db import Bodies, Choice, TuningDatabase
from torch_rtx.tactics import Candidate, Tactic
from torch_rtx.targets import EXACT, Float32, arch_of

BODY = parse(
    "graph import {\n  input in0: f16[4, 64]\n  a: f16[4, 64] = op aten.relu.default(self=in0)\n  return [a]\n}\n"
)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], float]]:
    """What `measure` measures in place of a GPU, by name."""
    found: dict[str, Callable[[], float]] = {name: lambda figure=figure: figure for name, figure in FOUND.items()}
    monkeypatch.setattr(gpu_figures, "_steps", lambda device: iter(found.items()))
    monkeypatch.setattr(torch.cuda, "device", lambda given: nullcontext())
    return found


def fails() -> float:
    raise RuntimeError("no such product\nin detail")


def test_a_dtype_that_a_gpu_lacks_has_no_figure(steps: dict[str, Callable[[], float]]) -> None:
    steps["i8"] = fails
    said: list[str] = []
    assert measure(torch.device("cuda", 0), said.append) == {n: f for n, f in FOUND.items() if n != "i8"}
    assert said == [f"measuring {name}" for name in FOUND]


@pytest.mark.parametrize(("figure", "match"), [(fails, "no such product$"), (lambda: math.nan, "nan GB/s")])
def test_what_every_gpu_has_must_be_measured(
    figure: Callable[[], float], match: str, steps: dict[str, Callable[[], float]]
) -> None:
    steps["l2"] = figure
    with pytest.raises(KernelError) as problem:
        measure(torch.device("cuda", 0))
    assert re.search(match, problem.value.message)


@pytest.mark.parametrize(
    "stored", [b"", b"[]", b"{}", b"\xff", json.dumps({**FOUND, "l2": 0}).encode(), b'{"l2": "x"}']
)
def test_unreadable_figures_count_as_none(stored: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert read_figures(stored) is None
    assert "unreadable figures" in caplog.text


def test_figures_of_a_later_release_are_left_out() -> None:
    assert read_figures(json.dumps({**FOUND, "later": 1}).encode()) == FOUND
    assert read_figures(None) is None


# ---- in the runtime cache --------------------------------------------------------------------------------------------


class Compiler:
    """Compiles one tactic, or nothing, and notes the chips that it is asked to compile for."""

    def __init__(self, broken: bool = False) -> None:
        self.chips: list[Chip | None] = []
        self.broken = broken

    def build(
        self, bodies: Bodies, sm: int, artefacts: Artefacts, chip: Chip | None = None, float32: Float32 = EXACT
    ) -> Mapping[str, Candidate]:
        if self.broken:
            raise KernelError("nothing is compiled here")
        self.chips.append(chip)
        return {name: Candidate(Tactic("library", 1.0), first) for name, (_, first) in bodies.items()}

    def some(self, bodies: Bodies, *given: Any) -> Mapping[str, Candidate | None]:
        return self.build(bodies, *given[:4])


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RuntimeCache]:
    with closing(RuntimeCache(tmp_path / "runtime.sqlite", ADA)) as found:
        yield found


def measured(cache: RuntimeCache) -> None:
    with closing(RuntimeCache(cache.path, measured_on(ADA))) as other:
        write_figures(other, FOUND)


def test_figures_decide_on_their_gpu(cache: RuntimeCache) -> None:
    """What was compiled and chosen by another order of tactics is not taken for theirs."""
    compiler, sheet = Compiler(), chip_named("RTX 4060")
    before = TuningDatabase(89, compiler, lambda: cache, chip=sheet)
    before.candidates({"r": (BODY, 0)})
    before.remember("r", Choice("library 0", 0, {"library 0": 1.0}))
    measured(cache)
    assert cache.flush()
    after = TuningDatabase(89, compiler, lambda: cache, chip=sheet)
    assert after.choice("r") is None
    for _ in range(2):
        assert after.candidates({"r": (BODY, 0)})["r"].rank == 0
    assert sheet is not None
    assert compiler.chips == [sheet, sheet.measured(FOUND)]
    assert TuningDatabase(89, compiler, lambda: cache).chip == typical_chip(89).measured(FOUND)


def test_shipped_kernels_serve_where_nothing_can_be_compiled(cache: RuntimeCache) -> None:
    TuningDatabase(89, Compiler(), lambda: cache).candidates({"r": (BODY, 0)})
    measured(cache)
    known = TuningDatabase(89, Compiler(broken=True), lambda: cache)
    assert known.figures == FOUND
    both = {"r": (BODY, 0), "other": (BODY, 1)}
    assert known.candidates(both).keys() == {"r"}
    found = known.compiled(both, [])
    assert found["r"] is not None
    assert (found["r"].rank, found["other"]) == (0, None)
    with pytest.raises(KernelError, match="nothing is compiled"):
        known.candidates({"other": (BODY, 1)})


def test_fewer_processors_need_no_splits() -> None:
    text = "graph import {\n  input in0: f16[16, 8192]\n  input in1: f16[512, 8192]\n"
    text += "  a: f16[16, 512] = op aten.linear.default(input=in0, weight=in1)\n  return [a]\n}\n"
    arch, kinds = arch_of(80), []
    for chip in (arch.chip, arch.chip.scaled(4, arch.chip.memory, arch.chip.clock)):
        tactic = fastest(parse(text), "k", replace(arch, chip=chip))
        assert tactic is not None
        kinds.append(tactic.kind)
    assert kinds[0] == "split" != kinds[1]


# ---- the command -----------------------------------------------------------------------------------------------------


def call(*given: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, given)])
    return done.exit_code, done.output


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("measure-gpu") == (
        1,
        "error: there is no GPU to measure\n  `torch-rtx doctor` says why PyTorch finds none\n",
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, steps: dict[str, Callable[[], float]]) -> None:
    """A machine with one RTX 4090."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(driver_api, "driver", lambda: object())
    monkeypatch.setattr(launch, "gpu_of", lambda driver, index: SimpleNamespace(sm=89))
    monkeypatch.setattr(tuning_context, "device_key", lambda gpu, device: ADA)


@pytest.mark.usefixtures("gpu")
def test_figures_are_kept_and_shown(cache: RuntimeCache) -> None:
    status, told = call("measure-gpu", "--file", cache.path, "--json")
    assert (status, json.loads(told[told.index("{") :])["figures"]) == (0, FOUND)
    assert read_figures(cache.get("gpu", "figures")) == FOUND
    cache.put("kernel", "a", b"")
    cache.flush()
    status, told = call("cache", "runtime", "info", "--file", cache.path)
    assert (status, "  memory          250 GB/s\n" in told, "torch-rtx measure-gpu" in told) == (0, True, True)
    rows = json.loads(call("cache", "runtime", "info", "--json", "--file", cache.path)[1])
    assert sorted((row["figures"] for row in rows), key=bool) == [None, FOUND]
    assert call("cache", "runtime", "prune", "--outdated", "--file", cache.path)[1].endswith(
        "removed 0 entries; 2 are left\n"
    )


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_not_there(cache: RuntimeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no GPU 1" in call("measure-gpu", "--device", 1, "--file", cache.path)[1]
    monkeypatch.setattr(driver_api, "driver", lambda: None)
    assert "pip install cuda-bindings" in call("measure-gpu", "--file", cache.path)[1]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_is_about_as_its_data_sheet_says() -> None:
    found = measure(torch.device("cuda", 0))
    facts = torch.cuda.get_device_properties(0)
    assert found.keys() >= set(REQUIRED)
    assert 0.2 < found["node"] <= found["launch"] < 10
    assert found["l2"] > 1.2 * found["memory"]
    assert 0.5 < found["clock"] < 4
    sheet = chip_named(facts.name, 10 * facts.major + facts.minor)
    if sheet is not None and sheet.processors == facts.multi_processor_count:
        assert 0.8 < found["memory"] / sheet.memory < 1.2
        assert 0.7 < found["f16"] / (sheet.library * sheet.tensor) < 1.3
        assert 0.8 < sheet.measured(found).launch / sheet.launch < 2
