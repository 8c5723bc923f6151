"""The option `float32_precision`: what decides it, and what knows of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.doubles.fake_tuning import install_gpu
from torch_rtx.artefacts import Artefacts
from torch_rtx.backend.compiler import float32_of
from torch_rtx.chips import Chip
from torch_rtx.errors import EngineFormatError, SettingsError
from torch_rtx.irparse import parse
from torch_rtx.manifest import Manifest, read_manifest
from torch_rtx.runtime import module as module_file
from torch_rtx.runtime import tuning_context
from torch_rtx.runtime.candidate_check import LESS_EXACT, CandidateCheck
from torch_rtx.runtime.region_keys import region_key
from torch_rtx.runtime.tuning_db import Bodies, TuningDatabase
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import Candidate, Tactic
from torch_rtx.targets import EXACT, HIGH, HIGHEST, Float32

PRODUCT = parse("""graph fused {
  input x: f32[4, 64]
  input w: f32[64, 64]
  y: f32[4, 64] = kernel k(x=x, w=w) graph import {
    input x: f32[4, 64]
    input w: f32[64, 64]
    y: f32[4, 64] = op aten.mm.default(self=x, mat2=w)
    return [y]
  }
  return [y]
}
""")
HALVES = parse(str(PRODUCT.nodes[0].body).replace("f32", "f16"))
NONE = Artefacts.at(None, None)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """PyTorch's settings as they were."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


def test_pytorch_decides_unless_the_option_does() -> None:
    settings = CompilationSettings()
    assert float32_of(settings) == Float32(HIGHEST, HIGH)  # PyTorch's defaults
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # as of `torch.set_float32_matmul_precision("high")`
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert float32_of(settings) == Float32(HIGH, HIGHEST)
    for level in (HIGHEST, HIGH):
        assert float32_of(replace(settings, float32_precision=level)) == Float32(level, level)
    with pytest.raises(SettingsError, match="float32_precision must be None, 'highest' or 'high', not 'tf32'"):
        CompilationSettings(float32_precision="tf32")


def test_an_engine_records_it(tmp_path: Path) -> None:
    settings = CompilationSettings(device="cuda", targets="sm_89", float32_precision=HIGH)
    made = []
    for level in (HIGH, HIGHEST, HIGH):  # the last one comes from the engine cache
        settings = replace(settings, float32_precision=level)
        module = torch_rtx.compile(nn.Linear(128, 128), (torch.ones(64, 128),), settings=settings)
        torch_rtx.save(module, tmp_path / "model.rtx")
        found = torch_rtx.inspect(tmp_path / "model.rtx")
        assert found.manifest.float32 == Float32(level, level)
        assert f"float32 products {level}, convolutions {level}" in str(found)
        made.append({*module.engine.kernels.binaries})
    assert made[0] == made[2]
    assert not made[0] & made[1]


def test_of_files_without_it() -> None:
    written = json.loads(json.dumps(asdict(replace(Manifest("cpu"), float32=Float32(HIGH, HIGHEST)))))
    assert read_manifest(written).float32 == Float32(HIGH, HIGHEST)
    del written["float32"]
    assert read_manifest(written).float32 == EXACT == Manifest("cpu").float32
    for wrong in ({"products": HIGH}, {"products": "low", "convolutions": HIGH}, []):
        with pytest.raises(EngineFormatError, match="float32"):
            read_manifest({**written, "float32": wrong})


class Compiler:
    """Notes how exact the kernels have to be that it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Float32] = []

    def build(
        self, bodies: Bodies, sm: int, artefacts: Artefacts, chip: Chip | None = None, float32: Float32 = EXACT
    ) -> Mapping[str, Candidate]:
        self.asked.append(float32)
        return {name: Candidate(Tactic("library", 1.0), first) for name, (_, first) in bodies.items()}


def test_kernels_of_another_precision_are_not_found() -> None:
    compiler, stored = Compiler(), dict[tuple[str, str], bytes]()

    class Store:
        get = staticmethod(lambda kind, key: stored.get((kind, key)))
        put = staticmethod(lambda kind, key, value: stored.update({(kind, key): value}))

    body = PRODUCT.nodes[0].body
    assert body is not None
    for level in (EXACT, Float32(HIGHEST, HIGH), Float32(HIGH, HIGHEST), Float32(HIGH, HIGH), EXACT):
        database = TuningDatabase(89, compiler, lambda: Store(), NONE, None, level)  # type: ignore[arg-type,return-value]
        database.candidates({region_key(body, level): (body, 0)})
    assert compiler.asked == [EXACT, Float32(HIGH, HIGHEST)]  # of convolutions it makes no difference
    assert len({region_key(HALVES, Float32(level)) for level in (HIGHEST, HIGH)}) == 1


def test_tf32_is_right_where_calls_use_it() -> None:
    """On this device they are exact; elsewhere libraries are for some sizes."""
    problems = {}
    for level in (HIGHEST, HIGH):
        check = CandidateCheck(PRODUCT.nodes[0], torch.device("cpu"), float32=Float32(level))
        for error in (1e-7, 3e-4, 2e-3):
            x, w = (one.double() for one in check._inputs)
            found = [(x @ w * (1 + error)).float()]
            problems[level, error] = check.problem(lambda *_, found=found: found)  # type: ignore[misc]
    assert problems[HIGHEST, 1e-7] is problems[HIGH, 1e-7] is None
    assert problems[HIGH, 3e-4] == LESS_EXACT
    for problem in (problems[HIGHEST, 3e-4], problems[HIGHEST, 2e-3], problems[HIGH, 2e-3]):
        assert problem is not None
        assert "relative error" in problem


def test_the_compile_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a module to what tunes it on a GPU."""
    compiler, given = Compiler(), list[tuple[Any, ...]]()
    monkeypatch.setattr(module_file, "tactics_and_context", lambda *args: given.append(args) or ({}, None))
    torch_rtx.compile(nn.ReLU(), (torch.ones(2),), float32_precision=HIGH)
    table, graph, _, settings, float32 = given[0]
    install_gpu(monkeypatch, compiler.build)
    settings = replace(settings, runtime_cache="off")
    _, context = tuning_context.tactics_and_context(table, graph, torch.device("cuda", 0), settings, float32)
    assert context is not None
    context.database.candidates({"r": (graph, 0)})
    assert compiler.asked == [Float32(HIGH, HIGH)]
