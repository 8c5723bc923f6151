"""Profiles on a GPU: real events, kernels of an engine, CUDA graphs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.runtime.clocks import SPANS_AT_ONCE, clock_of, overhead
from torch_rtx.runtime.driver import driver

pytestmark = pytest.mark.gpu


def test_clock_sees_the_device_alone() -> None:
    """The host sleeps between two launches; the device, behind its delay, does not."""
    x = torch.randn(2048, 2048, device="cuda")
    x @ x
    torch.cuda.synchronize()  # the first product loads the library
    waited, queued = (clock_of(x.device, queued=flag) for flag in (False, True))
    seen = []
    for clock in (waited, queued):
        clock()
        for _ in range(3):
            time.sleep(0.001)  # all of them are shorter than the delay
            x @ x
            clock()
        seen.append(clock.read())
    assert min(seen[0]) > 1000
    assert min(seen[1]) < 1000  # what other processes on the device do may be seen between two events
    assert 0 <= overhead(queued) < 50


def test_more_nodes_than_are_queued_at_once() -> None:
    clock, x = clock_of(torch.device("cuda", 0), queued=True), torch.randn(64, device="cuda")
    clock()
    for _ in range(2 * SPANS_AT_ONCE + 7):
        x = x * 2
        clock()
    spans = clock.read()
    assert len(spans) == 2 * SPANS_AT_ONCE + 7
    assert sorted(spans)[len(spans) // 2] < 50


@pytest.mark.parametrize("targets", [None, "current"])
def test_profile(targets: str | None) -> None:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.LayerNorm(1024)).half().cuda()
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.float16)
    settings = torch_rtx.CompilationSettings(targets=targets)
    runtime = torch_rtx.RuntimeSettings(tactics="kernel", specialization_strategy="none")
    with torch.no_grad():
        module = torch_rtx.compile(model, (x,), settings=settings, runtime=runtime)
        expected = module(x)
        profile = torch_rtx.profile(module, x)
        torch.testing.assert_close(module(x), expected)
    assert profile.cuda_graph == (module.session.pool is not None)
    assert profile.device == torch.cuda.get_device_name(x.device)
    assert ("driver for CUDA" in profile.about["versions"]) == (driver() is not None)
    kernels = [row for row in profile.rows if row.kind == "kernel"]
    assert bool(kernels) == (targets is not None)
    assert all(row.tier.startswith("kernel for sm_") for row in kernels)
    # Nodes are measured apart, so that events and missing overlap count: some room in both directions.
    assert 0.3 * profile.us < profile.call_us < 3 * profile.us + 100
    assert sum(row.cost.flops for row in profile.rows if row.cost) == 2 * 2 * 2048 * 1024 * 4096
    slowest = max(profile.rows, key=lambda row: row.us)
    assert any(name in slowest.what for name in ("linear", "mm"))
    assert slowest.tflops is not None
    assert 1 < slowest.tflops < 3000


def test_torch_compile(fresh_dynamo: None) -> None:
    compiled = torch.compile(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()).cuda(), backend="rtx", options={"targets": None}
    )
    with torch.no_grad():
        profile = torch_rtx.profile(compiled, torch.randn(8, 64, device="cuda"))
    assert {row.module for row in profile.rows} == {"0", "1"}
    assert all(0 <= row.us < 1000 for row in profile.rows)
