"""Stages of kernels on every way that leads to one: ahead of time, just in time, on a cache hit, with an override."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from tests.doubles.fake_tuning import install_gpu
from torch_rtx.artefacts import Artefacts
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.runtime import tuning_context
from torch_rtx.runtime.compile_client import CompileClient
from torch_rtx.runtime.tuning_db import Choice, TuningDatabase
from torch_rtx.settings import CompilationSettings, RuntimeSettings
from torch_rtx.tactics import Candidate, KernelTable
from torch_rtx.targets import Target

STAGES = ("ptx", "py", "ranking", "sass", "ttir")
SM89 = Target(89)


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).relu()


def built(folder: Path, **options: Any) -> KernelTable:
    """The kernels of a model that is built ahead of time for sm_89, on any machine."""
    options = {"engine_cache_dir": str(folder / "caches"), **options}
    settings = CompilationSettings(device="cuda", targets=["sm_89"], **options)
    return torch_rtx.compile(Model(), (torch.ones(64),), settings=settings).engine.kernels


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ptx(folder: Path) -> str:
    (path,) = folder.glob("*.ptx")
    return path.read_text()


# ---- ahead of time ---------------------------------------------------------------------------------------------------


def test_a_build_ahead_of_time_leaves_every_stage(tmp_path: Path) -> None:
    table = built(tmp_path, dump_dir=str(tmp_path / "dump"))
    (op,) = table.tactics
    kernels = tmp_path / "dump" / "graph_000" / "kernels"
    assert files_of(kernels) == [f"000_{op}.kir", f"000_{op}.region", *(f"000_{op}.sm_89.{stage}" for stage in STAGES)]
    assert "aten.sin.default" in (kernels / f"000_{op}.region").read_text()
    assert "sin(%0)" in (kernels / f"000_{op}.kir").read_text()
    assert f"def {op}(" in (kernels / f"000_{op}.sm_89.py").read_text()
    lines = (kernels / f"000_{op}.sm_89.ranking").read_text().splitlines()
    assert lines[1].split()[0] == "0"
    assert f"kernel   {op} (" in lines[1]
    assert lines[-1].startswith(f"built kernel 0: fits; {op}: ")


def test_a_cache_hit_leaves_every_stage(tmp_path: Path) -> None:
    """The cache is neither asked nor filled, whatever it holds."""
    assert built(tmp_path) == built(tmp_path)
    entries = files_of(tmp_path / "caches" / "engines")
    for name in ("first", "second"):
        built(tmp_path, dump_dir=str(tmp_path / name))
    first, second = (files_of(tmp_path / name / "graph_000" / "kernels") for name in ("first", "second"))
    assert first == second
    assert len(first) == 2 + len(STAGES)
    assert files_of(tmp_path / "caches" / "engines") == entries


@pytest.mark.parametrize("variable", [False, True])
def test_an_override_is_built_and_never_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: bool
) -> None:
    plain = built(tmp_path, dump_dir=str(tmp_path / "dump"))
    (op,) = plain.tactics
    kernels, edited = tmp_path / "dump" / "graph_000" / "kernels", tmp_path / "edited"
    edited.mkdir()
    source = (kernels / f"000_{op}.sm_89.py").read_text()
    assert "tl.sin(" in source
    (edited / f"123_{op}.sm_89.py").write_text(source.replace("tl.sin(", "tl.cos("))
    if variable:
        monkeypatch.setenv("TORCH_RTX_OVERRIDE", str(edited))
    options = {} if variable else {"override_dir": str(edited)}
    changed = built(tmp_path, dump_dir=str(tmp_path / "again"), **options)
    assert changed.binaries.keys().isdisjoint(plain.binaries)
    again = ptx(tmp_path / "again" / "graph_000" / "kernels")
    assert again != ptx(kernels)
    warning = f"the stage py of the kernel {op}.sm_89 is taken from {edited / f'123_{op}.sm_89.py'}"
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING and "stage" in r.message] == [warning]
    assert built(tmp_path, **options) == changed  # no dump: it is not kept either
    monkeypatch.delenv("TORCH_RTX_OVERRIDE", raising=False)
    assert built(tmp_path) == plain


# ---- just in time ----------------------------------------------------------------------------------------------------

BODY = parse("""\
graph import {
  input x: f32[64]
  y: f32[64] = op aten.sin.default(self=x)
  return [y]
}
""")
PRODUCT = parse("""\
graph import {
  input x: f16[1, 8192]
  input w: f16[64, 8192]
  y: f16[1, 64] = op aten.linear.default(input=x, weight=w)
  return [y]
}
""")


@pytest.fixture(scope="module")
def client() -> Iterator[CompileClient]:
    client = CompileClient()
    yield client
    client.close()


def binary(candidate: Candidate) -> bytes:
    ((_, launch),) = candidate.tactic.kernels.items()
    return candidate.binaries[launch.aligned.binary]


def test_the_compile_worker_leaves_every_stage(tmp_path: Path, client: CompileClient) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):  # the worker knows the code the second time
        client.build({"region_k": (BODY, 0)}, 89, Artefacts.at(folder, None))
        names = ["000_region_k.kir", "000_region_k.region", *(f"000_region_k.sm_89.{stage}" for stage in STAGES)]
        assert files_of(folder / "kernels") == names
        assert (folder / "kernels" / names[1]).read_text() == str(BODY)


def test_each_rank_has_stages_of_its_own(tmp_path: Path, client: CompileClient) -> None:
    artefacts = Artefacts.at(tmp_path, None)
    ranks = [client.build({"region_k": (BODY, rank)}, 89, artefacts)["region_k"].rank for rank in (0, 1)]
    assert ranks == [0, 1]
    assert {"000_region_k.sm_89.py", "000_region_k.sm_89.rank1.py"} <= set(files_of(tmp_path / "kernels"))
    ranking = (tmp_path / "kernels" / "000_region_k.sm_89.ranking").read_text()
    assert [line.split(":")[0] for line in ranking.splitlines() if "built" in line] == [
        *("built kernel 0", "built kernel 1"),
    ]


def test_kernels_inside_of_a_tactic_have_stages(tmp_path: Path, client: CompileClient) -> None:
    client.build({"region_k": (PRODUCT, 0)}, 90, Artefacts.at(tmp_path, None))
    ranking = (tmp_path / "kernels" / "000_region_k.sm_90.ranking").read_text()
    regions = {path.name.split("_", 1)[1].removesuffix(".region") for path in (tmp_path / "kernels").glob("*.region")}
    assert len(regions) > 1
    assert all(f" {region} (" in ranking for region in regions)


def test_the_compile_worker_takes_overrides(tmp_path: Path, client: CompileClient) -> None:
    before = client.build({"region_k": (BODY, 0)}, 89, Artefacts.at(tmp_path / "dump", None))["region_k"]
    text = ptx(tmp_path / "dump" / "kernels")
    (tmp_path / "region_k.sm_89.ptx").write_text(text.replace("ret;", "bar.sync 0;\n\tret;"))
    after = client.build({"region_k": (BODY, 0)}, 89, Artefacts.at(tmp_path / "after", str(tmp_path)))["region_k"]
    assert binary(after) != binary(before)
    assert "bar.sync" in ptx(tmp_path / "after" / "kernels")
    assert binary(client.build({"region_k": (BODY, 0)}, 89)["region_k"]) == binary(before)


class Compiler:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.given: list[Artefacts] = []

    def build(
        self, bodies: Mapping[str, tuple[Graph, int]], sm: int, artefacts: Artefacts, *_: object
    ) -> Mapping[str, Candidate]:
        self.given.append(artefacts)
        return {}


def test_what_was_measured_is_added_to_the_ranking(tmp_path: Path) -> None:
    compiler, artefacts = Compiler(), Artefacts.at(tmp_path, None)
    database = TuningDatabase(89, compiler, artefacts=artefacts)
    database.candidates({"ab": (BODY, 0)})
    assert compiler.given == [artefacts]
    artefacts.of("region_ab", SM89).write("ranking", "built\n")
    database.remember("ab", Choice("kernel 1", 1, {"kernel 0": 2.5, "kernel 1": 2.25}))
    written = (tmp_path / "kernels" / "000_region_ab.sm_89.ranking").read_text()
    assert written == "built\nmeasured 2.50 us: kernel 0\nmeasured 2.25 us: kernel 1\n"


@pytest.mark.parametrize("option", ["dump_dir", "override_dir"])
def test_the_runtime_cache_is_off_while_stages_are_open(option: str, tmp_path: Path) -> None:
    settings = RuntimeSettings(runtime_cache=str(tmp_path / "cache"), **{option: str(tmp_path)})
    assert tuning_context._runtime_cache(None, torch.device("cpu"), settings) is None  # type: ignore[arg-type]


def test_the_folders_reach_the_compile_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the options of a build, over the settings of its module, to what tunes it on a GPU."""
    options = {"dump_dir": str(tmp_path), "override_dir": str(tmp_path)}
    module = torch_rtx.compile(Model(), (torch.ones(64),), settings=CompilationSettings(**options))
    compiler = Compiler()
    install_gpu(monkeypatch, compiler.build)
    device, settings = torch.device("cuda", 0), module.session.settings
    _, context = tuning_context.tactics_and_context(KernelTable(), BODY, device, settings)
    assert context is not None
    context.database.candidates({"ab": (BODY, 0)})
    assert compiler.given == [Artefacts.at(tmp_path, str(tmp_path))]
