"""The suite `pipelines`: what a process says before it is stopped, what is wrong, and rows side by side."""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from benchmarks import pipelines, report, results, runner
from benchmarks.cases import Job, Workload, key
from benchmarks.suites import SUITES
from benchmarks.text_pipelines import TINY, same_text
from benchmarks.turns import Turns
from tests.benchmarks.test_benchmarks import perform

suite = import_module("benchmarks.suites.pipelines")
LLAMA = Workload("llama_1b", 1, size="small")
NEWS = [{"cold": {"import_s": 1.0}}, {"stage": "results"}, {"cold": {"first_s": 2.0}}, {"result_s": {"median": 3.0}}]


def test_a_text_in_this_process(tmp_path: Path) -> None:
    job = Job("pipelines", LLAMA, ("eager",), "cpu", rounds=2)
    with torch.no_grad():
        said = list(suite.in_new_process(job, tmp_path, "cold", time.time()))
    found = {name: value for news in said for name, value in news.items()}
    assert found.keys() == {"cold", "stage", "settle_s", "settled", "result_s"}
    seconds = {name: s for news in said for name, s in news.get("cold", {}).items()}
    assert 0 < seconds["import_s"] < seconds["ready_s"] < seconds["first_s"]
    assert 0 < seconds["next_s"] < seconds["first_s"]


def test_loras_change_places(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    job = Job("pipelines", Workload("sdxl_lora", 1, size="small"), ("eager",), "cpu", rounds=1)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        said = list(suite.in_new_process(job, tmp_path, "cold", time.time()))
    stages = [news["stage"] for news in said if "stage" in news]
    assert stages == ["model", "first result", "early", "background", "results", "more", "check"]
    (*_, lora) = [news["lora"] for news in said if "lora" in news]
    assert lora.keys() == {"swap_s", "graphs", "set_s", "later", "same_again"}
    assert (lora["graphs"], lora["same_again"]) == (0, True)


def test_a_stage_that_takes_too_long() -> None:
    def news() -> Iterator[dict[str, Any]]:
        yield {"one": 1}
        time.sleep(60)

    start = time.perf_counter()
    assert [*suite.within(0.05, "early", news())] == [{"one": 1}, {"early_stopped_s": 0.05}]
    assert [*suite.within(60.0, "early", iter([{"one": 1}]))] == [{"one": 1}]
    assert time.perf_counter() - start < 50
    row = {**key("pipelines", LLAMA, "a processor", "rtx"), "metrics": {"early_stopped_s": 25.0}}
    assert report._swapped(row, {}) == "more than 25.0"


def test_what_is_new() -> None:
    before = {"cold": {"import_s": 1.0}, "result_s": {"median": 2.0, "p5": 1.0}}
    now = {"cold": {"import_s": 1.0, "first_s": 3.14159}, "result_s": {"median": 2.5, "p5": 1.0}, "settled": True}
    assert runner._news(before, now) == "cold.first_s 3.142, result_s 2.5, settled True"
    assert runner._news(now, now) == ""


def test_what_a_stopped_process_had_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(job: Job, folder: Path, phase: str) -> Any:
        yield from NEWS
        raise RuntimeError("gone")

    monkeypatch.setattr(suite, "_process", process)
    row = perform("pipelines", "eager", workload=LLAMA)["eager"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: gone")
    assert row["metrics"] == {"cold": {"import_s": 1.0, "first_s": 2.0}, "result_s": {"median": 3.0}}
    monkeypatch.setattr(suite, "_process", lambda *_: iter([*NEWS, {"wrong": "other tokens"}]))
    row = perform("pipelines", "eager", workload=LLAMA)["eager"]
    assert (row["reason"], row["metrics"]) == ("WrongResult: other tokens", {})  # no time of what is wrong


def test_a_row_of_a_worker_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = runner.Plan(("pipelines",), tmp_path / "out.json", ("llama_1b",), ("eager",), "small", "cpu", limit_s=0.0)
    run = runner.Runner(plan, runner.Progress(io.StringIO()))
    run.device, run.device_name, run.environment = "cpu", "a processor", run.results.add_environment({})
    (job,) = run._jobs(SUITES["pipelines"], present=True)

    class Worker:
        process: Any = type("Process", (), {"poll": lambda self: None})()

        def events(self) -> Any:
            yield {"event": "begin", "peer": "eager", "stage": "cold: results", "time": time.time()}
            yield {"event": "partial", "peer": "eager", "metrics": {"settle_s": 1.0}, "time": time.time()}

    peers = ["eager"]
    run._follow(Worker(), job, peers, Turns(), runner.Watch(math.inf))
    (row,) = results.load(plan.out).rows.values()
    assert (row["reason"], row["metrics"], peers) == ("stopped after 0 s, during cold: results", {"settle_s": 1.0}, [])


def test_texts_that_rounding_explains() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).bfloat16().eval()
    text = torch.arange(6)[None]
    with torch.no_grad():
        first, *_, worst = copy.deepcopy(model).float()(text).logits[0, -1].argsort(descending=True).tolist()
        both = [torch.cat([text, torch.tensor([[token]])], 1) for token in (first, worst)]
        same_text(model, both[0], both[0], 6, lambda one, ids: one(ids))
        with pytest.raises(AssertionError, match="text 0 differs at token 0, by .* where .* is rounding"):
            same_text(model, both[1], both[0], 6, lambda one, ids: one(ids))


def test_rows_side_by_side() -> None:
    def row(peer: str, seconds: float, first: float) -> results.Row:
        metrics = {"result_s": {"median": seconds}, "cold": {"first_s": first}, "settle_s": 9.0, "settled": False}
        row = {**key("pipelines", LLAMA, "a processor", peer), "environment": "", "reason": None, "status": "ok"}
        return {**row, "metrics": metrics}

    rows = [row("eager", 2.0, 1.0), row("reduce-overhead", 3.0, 20.0), row("rtx", 1.0, 5.0)]
    found = {one["peer"]: one["metrics"] for one in pipelines.beside(rows)}
    assert (found["rtx"]["times_best"], found["rtx"]["cold_of_best"]) == (2.0, 0.25)
    assert "times_best" not in found["eager"]
    section = report.Section(SUITES["pipelines"], "a processor", "small", tuple(rows))
    assert "| rtx | 1.00 | 2.00 | 5.00 | 0.250 | more than 9.00 |" in report.pipelines_summary(section)


def test_what_a_workload_lacks() -> None:
    assert pipelines.why_not("rtx-engine", Workload("sdxl"), "cuda") == ""
    assert pipelines.why_not("rtx-engine", Workload("whisper_small"), "cuda") is None
    assert pipelines.why_not("inductor-blocks", LLAMA, "cuda") == ""
    assert pipelines.why_not("max-autotune", LLAMA, "cpu") == "is measured on GPUs alone"
