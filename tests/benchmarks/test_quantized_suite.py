"""The suite `quantized`: quantized models by torch_rtx and torchao, what is right for them, and rows side by side."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cases, results, runner
from benchmarks.cases import Workload, key
from benchmarks.quantized import DEFAULT_PEERS, FORMATS, PEER_NAMES, QUANTIZED, beside, parts, why_not
from benchmarks.suites import SUITES
from benchmarks.suites.common import WrongResult
from benchmarks.suites.quantized import compared
from tests.benchmarks.test_benchmarks import BERT, measured, perform, quick  # noqa: F401

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
def test_quantized() -> None:
    """Each peer has a row of its own; both tools' int8 has about the same error, and a byte per weight."""
    found = measured(perform("quantized", "half", "int8", "int8-eager"))
    assert found["half"]["wall_ms"]["median"] > 0
    assert "error" not in found["half"]
    ours, theirs = found["int8"], found["int8-eager"]
    assert ours["error"] == pytest.approx(theirs["error"], rel=0.3)
    assert ours["distance"] < ours["quantization_error"]
    assert theirs["distance"] == 0
    assert theirs["packed_bytes"] is None
    weights = 4 * 64 * 64 + 2 * 64 * 256 + 64 * 64  # a layer and the pooler
    scales = 4 * 64 + 256 + 64 + 64
    assert ours["packed_bytes"] == weights + 4 * scales


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize("model", ["bert_base", "llama_decode"])
def test_formats_that_torchao_makes_on_a_gpu(model: str) -> None:
    (workload,) = cases.workloads([model], "small", "cuda", QUANTIZED)
    names = [peer for peer in DEFAULT_PEERS if why_not(peer, workload, "cuda") is None and parts(peer)[1] != "inductor"]
    found = measured(perform("quantized", *names, workload=workload, device="cuda"))
    assert all(metrics["device_ms"]["median"] > 0 for metrics in found.values())


def test_peers_of_a_workload() -> None:
    assert {parts(name)[0] for name in PEER_NAMES} == {"half"} | {name for forms in FORMATS.values() for name in forms}
    assert {workload.model for workload in QUANTIZED} == set(FORMATS)
    resnet, bert = Workload("resnet50"), Workload("bert_base")
    assert why_not("int8", resnet, "cuda") is None
    assert why_not("int8-inductor", resnet, "cuda") == "torchao has no quantized convolutions"
    assert why_not("int4", bert, "cuda") == ""
    assert why_not("half-eager", bert, "cpu") is None
    if find_spec("torchao"):
        assert why_not("fp8-eager", bert, "cpu") == "torchao makes this format on GPUs alone"


def test_what_is_right() -> None:
    """Neither of the float model nor of the quantized one's own result may a peer be too far away."""
    torch.manual_seed(0)
    truth = torch.randn(1000, dtype=torch.float64)
    off = 0.01 * torch.randn(1000, dtype=torch.float64)
    eager = (truth + off).float()
    found = compared([eager], [eager], [truth])
    assert found["error"] == found["quantization_error"] == pytest.approx(0.01, rel=0.1)
    assert compared([truth.float()], [eager], [truth])["distance"] == pytest.approx(0.01, rel=0.1)
    for factor, what in ((-1.0, "distance"), (1.6, "error")):
        with pytest.raises(WrongResult, match=f"output 0: {what} .*e-02, at most 1"):
            compared([(truth + factor * off).float()], [eager], [truth])
    with pytest.raises(WrongResult, match="wrong result: output 0 is torch.float16"):
        compared([eager.half()], [eager], [truth])
    with pytest.raises(WrongResult, match="0 tensors, eager returns 1"):
        compared([], [eager], [truth])
    with pytest.raises(WrongResult, match="error nan|error inf"):
        compared([eager / 0], [eager], [truth])


def test_rows_side_by_side() -> None:
    times = {"half": 6.0, "half-eager": 9.0, "fp8": 4.0, "fp8-torchao": 5.0, "fp8-inductor": 6.0, "int8": 3.0}
    rows = [{"peer": peer, "metrics": {"device_ms": {"median": ms}}} for peer, ms in times.items()]
    found = {row["peer"]: {n: v for n, v in row["metrics"].items() if n != "device_ms"} for row in beside(rows)}
    assert found == {
        "half": {"times_eager": 1.5},
        "half-eager": {},
        "fp8": {"times_half": 1.5, "times_inductor": 1.5},
        "fp8-torchao": {"times_half": 1.2, "times_inductor": 1.2},
        "fp8-inductor": {},
        "int8": {"times_half": 2.0},
    }


def test_a_run_goes_on_with_what_is_left(tmp_path: Path) -> None:
    """A row that is there stays, also where another peer of the workload is measured later."""
    plan = runner.Plan(("quantized",), tmp_path / "out.json", ("bert_base",), ("half", "int8", "int4"), "small", "cpu")
    run = runner.Runner(plan, runner.Progress(io.StringIO()))
    run.device, run.device_name = "cpu", "a processor"
    run.environment = run.results.add_environment({})
    row: dict[str, Any] = {**key("quantized", BERT, "a processor", "half"), "environment": run.environment}
    kept: results.Row = {**row, "time": results.now(), "seconds": 1.0, "status": "ok", "reason": None, "metrics": {}}
    run.results.add(kept)
    (job,) = run._jobs(SUITES["quantized"], present=True)
    assert job.peers == ("int8",)  # int4 is no format of this workload: it has no row that says so
    assert list(run.results.rows.values()) == [kept]
