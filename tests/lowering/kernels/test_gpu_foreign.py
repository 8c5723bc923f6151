"""Kernels that others wrote on the GPU: under torch.compile and in files, launched as binaries and as PTX of older
generations, replayed in CUDA graphs, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

pytest.importorskip("triton")

import torch_rtx
from tests.helpers.foreign_kernels import CASES, Launches
from torch_rtx import foreign
from torch_rtx.errors import InvalidIR
from torch_rtx.foreign import launch_in
from torch_rtx.ir import kernel_nodes
from torch_rtx.lowering.foreign_calls import OPERATORS
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.session import watched_calls
from torch_rtx.settings import CompilationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu
FORMS = ("current", "compute_80", "compute_86", "compute_89")


def operands(count: int, rows: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(rows, 40, device="cuda", generator=generator) for _ in range(count)]


def expected(name: str, given: list[torch.Tensor]) -> torch.Tensor:
    return CASES[name][2](*(2 * x for x in given)).relu()


def launches(module: torch_rtx.CompiledModule) -> set[str]:
    """The kernel nodes that launch a kernel of the model."""
    return {node.op for node in kernel_nodes(module.engine.graph) if launch_in(node.body) is not None}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_from_a_file_without_the_source(
    name: str, form: str, dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, count, _ = CASES[name]
    shapes = (({0: Dim("rows", min=2, max=512)},) * count,) if dynamic else None
    settings = CompilationSettings(targets=(form,))
    module = torch_rtx.compile(Launches(function), tuple(operands(count)), None, shapes, settings)
    torch_rtx.save(module, tmp_path / "model.rtx")
    monkeypatch.setattr(foreign, "_registry", {})
    runtime = RuntimeSettings(specialization_strategy="none")
    loaded = torch_rtx.load(tmp_path / "model.rtx", settings=runtime, trust_binaries=True)
    assert launches(loaded) <= launched(loaded.session.tactics).keys()
    for seed, rows in enumerate((6, 11, 16, 6, 11, 16) if dynamic else (6, 6, 6)):  # called, captured and replayed
        given = operands(count, rows, seed)
        torch.testing.assert_close(loaded(*given), expected(name, given))
    assert loaded.session.pool is not None
    assert loaded.session.pool.disabled is None
    with pytest.raises(InvalidIR, match="trust_binaries"):
        torch_rtx.load(tmp_path / "model.rtx", settings=runtime)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_under_torch_compile(name: str, dynamic: bool, tmp_path: Path) -> None:
    """At once through Triton, later as a kernel of the graph."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"specialization_strategy": "eager", "runtime_cache": str(tmp_path / "cache.sqlite")}
    function, count, _ = CASES[name]
    model = torch.compile(Launches(function), backend="rtx", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad(), watched_calls() as calls:
        for seed, rows in enumerate((6, 11, 11, 11) if dynamic else (6, 6, 6)):
            given = operands(count, rows, seed)
            torch.testing.assert_close(model(*given), expected(name, given))
    session, _ = calls[-1]
    assert not [node.op for node in session.graph.nodes if node.kind == "fallback"]
    names = {node.op for node in kernel_nodes(session.graph) if launch_in(node.body) is not None}
    assert names
    variants = session.specializer.base, *session.specializer.variants.values()
    assert any(names <= launched(variant.code.tactics).keys() for variant in variants)


@pytest.mark.parametrize("known", [True, False], ids=["source", "file"])
def test_configurations_are_measured(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, count, _ = CASES["autotune"]
    settings = CompilationSettings(targets=("current",) if not known else "later")
    given = operands(count, 4096)
    torch_rtx.save(torch_rtx.compile(Launches(function), tuple(given), settings=settings), tmp_path / "tuned.rtx")
    if not known:
        monkeypatch.setattr(foreign, "_registry", {})
    runtime = RuntimeSettings(specialization_strategy="eager", runtime_cache=str(tmp_path / "cache.sqlite"))
    module = torch_rtx.load(tmp_path / "tuned.rtx", settings=runtime, trust_binaries=True)
    for _ in range(3):
        torch.testing.assert_close(module(*given), expected("autotune", given))
    (op,) = launches(module)
    assert module.session.specializer.base.code.tactics[op].kind in ("foreign", "foreign 1")
    assert not [problem for region in module.session.specializer.base.regions for problem in region.problems]


@pytest.mark.parametrize("form", ["current", "compute_80"])
def test_a_registered_kernel(form: str, tmp_path: Path) -> None:
    """In PTX: called at once, and from a file that has no source."""
    from tests.backend.test_registered_kernels import PTX, REGISTRATION, axpy

    torch_rtx.register_kernel("rtxtests::axpy", ptx=PTX, **REGISTRATION)
    try:
        model = Launches(lambda x, y: axpy(x, y, 0.25))
        rows = ({0: Dim("rows", min=2, max=512)},) * 2
        module = torch_rtx.compile(model, tuple(operands(2)), None, (rows,), CompilationSettings(targets=(form,)))
        called = torch_rtx.compile(model, tuple(operands(2)), None, (rows,), CompilationSettings(targets=None))
    finally:
        OPERATORS.clear()
    torch_rtx.save(module, tmp_path / "axpy.rtx")
    runtime = RuntimeSettings(specialization_strategy="none")
    loaded = torch_rtx.load(tmp_path / "axpy.rtx", settings=runtime, trust_binaries=True)
    assert launches(loaded) <= launched(loaded.session.tactics).keys()
    for seed, count in enumerate((6, 11, 11, 11)):
        x, y = operands(2, count, seed)
        for one in (called, loaded):
            torch.testing.assert_close(one(x, y), (2 * x + 0.5 * y).relu())


def test_an_input_that_a_kernel_writes_to(tmp_path: Path) -> None:
    from tests.helpers.foreign_kernels import in_place

    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return in_place(x).sum()

    torch._dynamo.reset()
    model = torch.compile(Counting(), backend="rtx", fullgraph=True, options={"specialization_strategy": "eager"})
    x = torch.zeros(6, 40, device="cuda")
    with torch.no_grad():
        for step in range(1, 6):
            torch.testing.assert_close(model(x), torch.tensor(240.0 * step, device="cuda"))
    torch.testing.assert_close(x, torch.full_like(x, 5))
