"""The suites `sweep` and `counts`: models from outside, what their engines consist of, and the summary."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cases, forked, models, plots, report, results, runner, sweep, sweep_models, worker
from benchmarks.cases import Job, Workload
from benchmarks.runner import Plan, Progress, Runner, Seat, Stopped
from benchmarks.suites import SUITES, common, counts
from benchmarks.sweep_table import ENTRIES, SWEEP
from benchmarks.turns import Turns
from torch_rtx.irparse import parse

NERF = Workload("own.nerf", size="small")


def performed(suite: str, workload: Workload, *names: str, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The metrics of a job that is done in this process, by peer."""
    events: list[dict[str, Any]] = []
    worker.perform(Job(suite, workload, names, device, rounds=2), events.append)
    torch._dynamo.reset()
    rows = [event for event in events if event["event"] == "row"]
    assert {row["status"] for row in rows} == {"ok"}, rows
    return {row["peer"]: row["metrics"] for row in rows}


# Models ---------------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    assert len(ENTRIES) == len(SWEEP) >= 80
    assert {entry.library for entry in SWEEP} == {"timm", "torchvision", "transformers", "diffusers", "own"}
    assert ENTRIES["transformers.albert"].shapes() == "input_ids i64[8, 128]"
    assert ENTRIES["own.unet"].shapes() == "0 f16[2, 1, 256, 256]"
    assert cases.half("transformers.olmo2") == "bfloat16"
    (found,) = cases.workloads(["own.unet"], "full", "cuda", SUITES["sweep"].workloads)
    assert (found.batch, found.dtype, found.name) == (2, "float16", "own.unet-b2")


@pytest.mark.parametrize("name", [entry.name for entry in SWEEP if entry.library == "own"])
def test_own_models(name: str) -> None:
    model = models.without_weights(name)
    args, kwargs = models.inputs(name, batch=2, device="meta")
    with torch.no_grad():
        found = model(*args, **kwargs)
    for tensor in found if isinstance(found, tuple) else (found,):
        assert tensor.shape[0] == 2


def test_a_model_of_few_layers_is_as_wide() -> None:
    few, all_ = (models.without_weights("transformers.albert", size) for size in ("small", "full"))
    assert few.config.num_hidden_layers == 2 < all_.config.num_hidden_layers
    assert few.config.hidden_size == all_.config.hidden_size


def test_no_parameter_is_zero() -> None:
    """A result of zeros would be right whatever is computed."""
    model = sweep_models.module(ENTRIES["transformers.albert"], few=True)
    assert all(bool(parameter.any()) for parameter in model.parameters())


def test_a_result_of_zeros_checks_nothing(tmp_path: Path) -> None:
    setup = common.Setup(Job("sweep", NERF, ("eager",), "cpu", rounds=2), tmp_path)
    with torch.no_grad():
        for parameter in setup.subject.model.parameters():
            parameter.zero_()
    with pytest.raises(common.WrongResult, match="eager's own result is zero, so that nothing would be checked"):
        setup.check(setup.subject.model)


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.find_spec", lambda name: None)
    assert SUITES["sweep"].reason("eager", Workload("timm.levit_256"), "cuda") == "not installed: timm"
    assert SUITES["sweep"].reason("eager", NERF, "cuda") is None


# Measurements ---------------------------------------------------------------------------------------------------------


def test_a_model_on_the_cpu() -> None:
    found = performed("sweep", NERF, "eager", "rtx-exported")
    assert found["eager"]["ratio"]["median"] == 1
    ours = found["rtx-exported"]
    assert ours["ratio"]["against"] == "eager"
    assert ours["settle_s"] > 0
    assert ours["weight_bytes"] > 1e6
    assert ours["fallbacks"] == {}
    assert ours["calls"]  # engines for the CPU consist of them
    assert "calls" not in found["eager"]


def test_counts_need_no_gpu() -> None:
    (found,) = performed("counts", NERF, "rtx-exported", device="cuda").values()
    assert found["kernels"] > 5
    assert (found["calls"], found["fallbacks"], found["layout_copies"]) == ({}, {}, 0)


def test_what_is_a_layout_copy() -> None:
    graph = parse(
        """graph fused {
  input x: f16[2, 3, 4]
  v0: f16[2, 3, 4](12, 1, 3) = extern aten.clone.default(self=x, memory_format="preserve")
  v1: f16[2, 4, 3] = kernel turned(in0=x) graph import {
    input in0: f16[2, 3, 4]
    p0: f16[2, 4, 3](12, 1, 4) = op aten.permute.default(self=in0, dims=[0, 2, 1])
    p1: f16[2, 4, 3] = op aten.clone.default(self=p0)
    return [p1]
  }
  v2: f32[2, 3, 4] = extern aten._to_copy.default(self=x, dtype="f32")
  v3: f16[2, 4, 3] = kernel scaled(in0=x) graph import {
    input in0: f16[2, 3, 4]
    p0: f16[2, 3, 4] = op aten.relu.default(self=in0)
    p1: f16[2, 4, 3](12, 1, 4) = op aten.permute.default(self=p0, dims=[0, 2, 1])
    p2: f16[2, 4, 3] = op aten.clone.default(self=p1)
    return [p2]
  }
  return [v0, v1, v2, v3]
}"""
    )
    assert [counts.is_layout_copy(node) for node in graph.nodes] == [True, True, False, False]
    found = counts.counted(graph)
    assert (found["kernels"], found["layout_copies"], found["calls"]) == (2, 2, {"aten._to_copy.default": 1})


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Runner:
    """A runner for two GPUs."""
    return Runner(Plan(("sweep",), tmp_path / "out.json", gpus=("0", "3")), Progress(SimpleNamespace(isatty=bool)))  # type: ignore[arg-type]


JOBS = [Job("sweep", Workload(entry.name), ("eager",), "cuda", 2) for entry in SWEEP]


def test_a_model_per_gpu(made: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    both, done = threading.Barrier(2), []

    def do(job: Job, seat: Seat) -> None:
        if seat not in {seat for _, seat in done}:
            both.wait(60)  # each GPU has a case at the same time
        done.append((job.workload.model, seat))

    monkeypatch.setattr(made, "_do", do)
    made._do_all(JOBS, made._seats())
    assert sorted(model for model, _ in done) == sorted(ENTRIES)
    assert {seat.gpu for _, seat in done} == {"0", "3"}


def test_seats(made: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers on a GPU take turns, and none has the core of another one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2, 11)))
    made.plan = replace(made.plan, per_gpu=2)
    seats = made._seats()
    assert [(seat.gpu, seat.cores) for seat in seats] == [("0", (2, 3)), ("3", (4, 5)), ("0", (6, 7)), ("3", (8, 9))]
    assert seats[0].turns is seats[2].turns is not seats[1].turns is seats[3].turns is not None


class Listed:
    """A worker that lists the signals it gets."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def signal(self, number: int) -> None:
        self.signals.append(number)


def test_one_of_a_gpu_measures_alone() -> None:
    turns, first, second, third = Turns(), Listed(), Listed(), Listed()
    turns.join(first)
    turns.join(second)
    assert turns.ask(first)
    assert not turns.ask(second)
    assert [turns.is_stopped(one) for one in (first, second)] == [False, True]
    turns.join(third)  # starts meanwhile
    turns.release(second)  # says nothing: it had nothing
    turns.leave(first)  # dies within its turn
    assert (first.signals, second.signals, third.signals) == ([], [SIGSTOP, SIGCONT], [SIGSTOP, SIGCONT])
    assert turns.ask(second)
    assert third.signals == [SIGSTOP, SIGCONT, SIGSTOP]
    turns.leave(third)
    turns.release(second)
    assert third.signals == [SIGSTOP, SIGCONT, SIGSTOP]


def test_a_worker_that_shares_its_gpu_waits_for_its_turn(tmp_path: Path) -> None:
    granted, said = tmp_path / "alone", []

    def write(event: dict[str, Any]) -> None:
        said.append(event["event"])
        if event["event"] == "alone":
            granted.touch()

    with worker.Reporter(write, ("eager",), "cpu", granted).alone():
        assert said == ["alone"]
    assert said == ["alone", "together"]
    assert not granted.exists()


def test_time_that_a_worker_waits_does_not_count() -> None:
    watch = runner.Watch(5.0)
    start = watch._since
    watch.see({"event": "begin", "peer": "eager", "stage": "prepare", "time": start + 2})
    watch.wait(idle=True)
    watch._since = start + 100
    watch.see({"event": "row", "peer": "eager", "time": start + 102})
    assert watch.spent == {None: 2, "eager": 2}
    assert watch.over(1.5) == "stopped after 1.5 s, during prepare"
    assert watch.over(3) is None
    watch.begin()
    watch._since = start + 103
    watch.see({"event": "begin", "peer": "eager", "stage": "prepare", "time": start + 105})
    assert watch.over(10) == "stopped after 5 s of all peers together, during prepare"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker(tmp_path: Path) -> None:
    """It reads its job, and prints to its own log."""
    made = runner.Worker({"no": "job"}, tmp_path, server=forked.Server("json"))
    try:
        assert made.process.wait(60) == made.process.poll() == 1
        assert made.last_words() == "KeyError: 'workload'"
    finally:
        made.kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_imports_that_spoil_a_process_are_known_before() -> None:
    def loaded() -> bool:
        return "this" in sys.modules

    assert forked.is_spoilt_by("this", loaded)
    assert not forked.is_spoilt_by("json", loaded)
    assert not forked.is_spoilt_by("no_such_module", loaded)
    assert not loaded()


def test_a_model_has_a_limit(made: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a model when its time is up has failed."""
    runs = SimpleNamespace(poll=lambda: None, returncode=None)
    slow: Any = SimpleNamespace(process=runs, events=list, last_words=str)
    kept: list[tuple[str, str]] = []
    monkeypatch.setattr(made, "_keep", lambda job, peer, status, reason, *_: kept.append((peer, reason)))
    peers, watch = ["eager", "rtx"], runner.Watch(0.0)
    made._follow(slow, Job("sweep", NERF, ("eager", "rtx"), "cuda", 2), peers, Turns(), watch)
    why = "stopped after 0 s of all peers together, during start"
    assert (peers, kept) == ([], [("eager", why), ("rtx", why)])


def test_the_budget_ends_all(made: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def do(job: Job, seat: Seat) -> None:
        if seat.gpu == "0":
            raise Stopped("the budget is spent")
        while made.deadline > 0:
            assert not ended.wait(0.01)

    monkeypatch.setattr(made, "_do", do)
    with pytest.raises(Stopped):
        made._do_all(JOBS[:2], made._seats())


def test_a_worker_sees_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: seen.append(env))
    runner.Worker({}, tmp_path, gpu="3")
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "3"


def test_gpus() -> None:
    assert sweep.visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ("2", "5")
    assert sweep.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_a_crash_at_one_model_says_nothing_of_the_next(made: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In suites of many models; the others do not try a peer again that has ended its process."""
    begun = [{"event": "begin", "peer": "eager", "stage": "prepare", "time": 0.0}]
    ended = SimpleNamespace(poll=lambda: 1, returncode=-11)
    dead: Any = SimpleNamespace(process=ended, events=lambda: begun, last_words=lambda: "Segmentation fault")
    monkeypatch.setattr(made, "_keep", lambda *_: None)
    for suite, kept in (("sweep", {}), ("latency", {"eager": "own.nerf-b2"})):
        made._follow(dead, Job(suite, NERF, ("eager",), "cuda", 2), ["eager"], Turns(), runner.Watch(60))
        assert made.ended == kept


# Reports --------------------------------------------------------------------------------------------------------------


def rows(*found: tuple[str, str, float | None, dict[str, int]]) -> results.Results:
    """Results of the suite on a GPU: model, peer, times faster (None: failed), calls."""
    made = results.Results()
    environment = made.add_environment({"cpu": "a CPU"})
    for model, peer, times, calls in found:
        metrics = {} if times is None else {"device_ms": {"median": 1 / times}, "calls": calls, "fallbacks": {}}
        ratio = {} if times is None else {"ratio": {"median": 1 / times, "against": "inductor"}, "settle_s": 4.0}
        fields = {"size": "full", "batch": 1, "length": None, "dtype": "float16", "device": "a GPU"}
        status = {"status": "failed", "reason": "WrongResult"} if times is None else {"status": "ok", "reason": None}
        row = {"suite": "sweep", "model": model, "peer": peer, "environment": environment, "time": results.now()}
        made.add({**row, **fields, **status, "seconds": 1.0, "metrics": {**metrics, **ratio}})
    return made


FOUND = (
    ("own.nerf", "rtx-exported-lazy", 2.0, {}),
    ("own.unet", "rtx-exported-lazy", 0.5, {"aten.instance_norm.default": 18}),
    ("own.yolo", "rtx-exported-lazy", None, {}),
)


def test_the_summary() -> None:
    (section,) = report.sections(rows(*FOUND))
    text = report.section_text(section, rows(*FOUND).environments)
    for line in (
        "- rtx-exported-lazy: 1.00x the best other compiler in the geometric mean of 2 models",
        "- rtx-exported-lazy: below 1.0x: own.unet 0.50x",
        "- rtx-exported-lazy: at full speed after 4.00 s in the median, 4.00 s at most",
        "- rtx-exported-lazy: 1 of 2 models have library calls left",
        "  - own.unet: 18 instance_norm",
        "- rtx-exported-lazy: 0 of 2 models have fallbacks left",
        "- rtx-exported-lazy (own.yolo-b1 float16): failed: WrongResult",
    ):
        assert line + "\n" in text


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in plots.write(rows(*FOUND), tmp_path)] == [
        "sweep-a-gpu-full.svg",
        "sweep-a-gpu-full.png",
    ]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    plans: list[Plan] = []

    def run(plan: Plan, stream: Any) -> int:
        plans.append(plan)
        rows(*FOUND).save(plan.out)
        return 0

    monkeypatch.setattr(runner, "main", run)
    monkeypatch.setattr(sweep, "visible_gpus", lambda: ("0", "1"))
    out = tmp_path / "sweep.json"
    command = ["sweep", "--models", "own.unet", "--budget", "60", "--per-gpu", "2", "--settle", "40"]
    assert main([*command, "--out", str(out)]) == 0
    assert "below 1.0x: own.unet 0.50x" in capsys.readouterr().out
    assert main(["sweep", "--counts", "--out", str(out)]) == 0
    assert main(["run", "--per-gpu", "2", "--out", str(out)]) == 0
    assert main(["run", "--out", str(out)]) == 0
    measured, counted, spread, alone = plans
    assert (spread.suites, spread.gpus, spread.per_gpu) == (("latency",), ("0", "1"), 2)
    assert (alone.gpus, alone.per_gpu, alone.preload) == ((), 1, ())
    assert (measured.suites, measured.names, measured.budget_s) == (("sweep",), ("own.unet",), 60)
    assert (measured.device, measured.gpus, measured.per_gpu) == ("cuda", ("0", "1"), 2)
    assert (measured.settle_s, measured.model_limit_s) == (40, math.inf)
    assert (counted.suites, counted.size, counted.gpus) == (("counts",), "small", ())
    assert json.loads(out.read_text())["schema"] == results.SCHEMA
