"""The benchmarks' command line: every suite on a tiny model, peers that go wrong, limits, resuming."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import benchmarks
from benchmarks import environment, models, peers, results, runner, timing, worker
from benchmarks.__main__ import main
from benchmarks.cases import Job, Workload
from benchmarks.suites import SUITES, cold
from benchmarks.suites.cold import full_speed
from benchmarks.suites.shapes import visits
from tests.doubles.forking import ForkedModule, forked_run
from tests.paths import ROOT
from torch_rtx import targets

BERT = Workload("bert_base", trace=((1, 8), (1, 12)), size="small")


def perform(suite: str, *names: str, workload: Workload = BERT, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """The rows of a job that is done in this process, by peer."""
    events: list[dict[str, Any]] = []
    worker.perform(Job(suite, workload, names, device, **{"rounds": 2, **options}), events.append)
    torch._dynamo.reset()
    return {event["peer"]: event for event in events if event["event"] == "row"}


def measured(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics by peer; every row is ok."""
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    return {name: row["metrics"] for name, row in rows.items()}


def arguments(out: Path) -> list[str]:
    """`run` on the small BERT, on the CPU."""
    return ["run", "--models", "bert_base", "--size", "small", "--device", "cpu", "--rounds", "2", "--out", str(out)]


def run(out: Path, *more: str) -> int:
    """Do it in this process; the workers are others."""
    return main([*arguments(out), *more])


def rows_of(path: Path) -> dict[str, results.Row]:
    """The rows of a file by peer."""
    return {row["peer"]: row for row in results.load(path).rows.values()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suites do with a model does not depend on its depth, nor on how settled the speed of this machine is."""
    config = models._bert_config

    def one_layer(size: models.Size) -> Any:
        made = config(size)
        made.num_hidden_layers = 1
        return made

    def warm_up(call: timing.Call, device: str) -> float:
        call()
        return 1.0

    monkeypatch.setattr(models, "_bert_config", one_layer)
    monkeypatch.setattr(timing, "warm_up", warm_up)
    monkeypatch.setattr("benchmarks.suites.train.REPLAYED", 1)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with peers that go wrong, which a test may load and no other test will see."""
    known = dict(peers.PEERS)
    monkeypatch.delitem(sys.modules, "tests.doubles.odd_peers", raising=False)
    yield "tests.doubles.odd_peers"
    peers.PEERS.clear()
    peers.PEERS.update(known)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not look around again: this is where it is."""

    def look_around(self: runner.Runner) -> bool:
        record = environment.record("cpu")
        self.device, self.device_name = record["kind"], record["device"]
        self.environment = self.results.add_environment(record)
        return True

    monkeypatch.setattr(runner.Runner, "_look_around", look_around)


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start with everything loaded."""
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": ForkedModule}))


class Event:
    """What torch.cuda.Event is, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """The host's clock is never behind."""

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a GPU: all that the suites do there, but for the device itself."""
    for name in ("build", "inputs"):
        made = getattr(models, name)
        monkeypatch.setattr(models, name, lambda *a, made=made, **k: made(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name, value in (
        ("memory_allocated", 5),
        ("max_memory_allocated", 7),
        ("memory_reserved", 8),
        ("max_memory_reserved", 9),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70, 100))
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, fused: adamw(parameters, lr))


# On the way of a GPU --------------------------------------------------------------------------------------------------


def test_latency_by_events(stand_in: None) -> None:
    found = measured(perform("latency", "eager", "rtx", device="cuda"))
    for metrics in found.values():
        assert 0 < metrics["device_ms"]["p5"] <= metrics["device_ms"]["p95"]
        assert metrics["wall_ms"]["median"] > 0
    assert found["rtx"]["ratio"]["against"] == "eager"


def test_memory_of_a_device(stand_in: None) -> None:
    (metrics,) = measured(perform("memory", "eager", device="cuda")).values()
    assert metrics.pop("weight_bytes") > 0
    assert metrics == {"prepare_peak_bytes": 7, "run_peak_bytes": 7, "outside_bytes": 0}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_training_on_a_device(stand_in: None) -> None:
    (metrics,) = measured(perform("train", "eager", device="cuda")).values()
    assert metrics["device_ms"]["median"] > 0
    assert (metrics["host_ratio"], metrics["peak_ratio"]) == (1, 1)
    assert 0 < metrics["host_ms"]["median"] < metrics["wall_ms"]["median"]
    assert (metrics["allocated_peak_bytes"], metrics["peak_bytes"]) == (7 - 5, 9 - 8)


def test_bare_replay(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an engine has captured a CUDA graph, that graph's own replay is measured beside it."""
    made = peers.PEERS["eager"]

    def prepare(subject: peers.Subject) -> peers.Prepared:
        graph = SimpleNamespace(graph=SimpleNamespace(replay=lambda: None))
        subject.model.session = SimpleNamespace(pool=SimpleNamespace(captured={"key": graph}))
        return subject.model

    monkeypatch.setitem(peers.PEERS, "eager", replace(made, prepare=prepare))
    (metrics,) = measured(perform("host", "eager", device="cuda")).values()
    assert metrics["bare_replay_us"]["median"] < metrics["host_us"]["median"]
    assert metrics["over_replay_us"]["median"] > 0


def test_a_damaged_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after which the device does not answer ends the process: the other peers get a new one."""
    events: list[dict[str, Any]] = []
    reporter = worker.Reporter(events.append, ["eager"], "cuda")

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(SystemExit) as ended, reporter.attempt("eager", "prepare"):
        raise ValueError("first\n\nsecond")
    assert ended.value.code == worker.DAMAGED
    assert (events[-1]["status"], events[-1]["reason"]) == ("failed", "ValueError: first second")


# Suites, in this process ----------------------------------------------------------------------------------------------


def test_latency() -> None:
    found = measured(perform("latency", "eager", "rtx", "rtx-exported"))
    assert list(found) == ["eager", "rtx", "rtx-exported"]
    for metrics in found.values():
        assert 0 < metrics["wall_ms"]["p5"] <= metrics["wall_ms"]["median"] <= metrics["wall_ms"]["p95"]
        assert metrics["ratio"]["against"] == "eager"
        assert metrics["work"]["flops"] > metrics["work"]["bytes"] > 0
        assert "device_ms" not in metrics
    assert found["eager"]["ratio"]["median"] == 1


def test_host() -> None:
    found = measured(perform("host", "eager", "rtx-exported"))
    assert found["eager"]["host_us"]["median"] > 0
    assert "bare_replay_us" not in found["rtx-exported"]  # there is no CUDA graph


def test_tiers() -> None:
    found = measured(perform("tiers", "generic", "specialized", "static"))
    assert found["generic"]["ratio"]["against"] == "specialized"
    assert found["specialized"]["ratio"]["median"] == 1
    assert "CUDA device" in str(SUITES["tiers"].reason("static", BERT, "cpu"))


@pytest.mark.parametrize("model", ["bert_base", "swin_t", "sd15_unet"])
def test_train(model: str) -> None:
    """A compiled BERT has the right gradients, and what tests/lowering/test_training_graphs.py does not train has
    some."""
    names = ("eager", "rtx") if model == "bert_base" else ("eager",)
    found = measured(perform("train", *names, workload=replace(BERT, model=model, trace=()), rounds=1))
    for metrics in found.values():
        assert metrics["ratio"]["against"] == "eager"
        assert metrics["first_s"] > 0


def test_what_can_be_trained() -> None:
    assert SUITES["train"].reason("rtx-exported", BERT, "cpu") == "an exported program has no gradients"
    assert SUITES["train"].reason("rtx", replace(BERT, model="gpt2_decode"), "cpu") == "a decode step is not trained"


def test_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the suite runs in a process of its own, as `cold` does."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps(Job("first_step", BERT, ("rtx",), "cpu", 1).to_json()))
    cold.main(str(job), str(tmp_path), str(time.time() - 1))
    torch._dynamo.reset()
    metrics = json.loads(capsys.readouterr().out)
    assert 1 <= metrics["import_s"] < 1 + metrics["first_s"]
    assert SUITES["first_step"].measured_peers() == SUITES["train"].measured_peers()


def test_memory() -> None:
    (metrics,) = measured(perform("memory", "rtx-exported")).values()
    assert metrics["process_peak_bytes"] > metrics["weight_bytes"] > 0


@pytest.mark.parametrize("peer", ["eager", "rtx", "rtx-exported"])
def test_refit(peer: str) -> None:
    (metrics,) = measured(perform("refit", peer)).values()
    assert metrics["refit_ms"]["median"] > 0


@pytest.mark.parametrize("peer", ["eager", "rtx-exported"])
def test_shapes(peer: str) -> None:
    (metrics,) = measured(perform("shapes", peer)).values()
    shapes = [tuple(call[:2]) for call in metrics["calls_ms"]]
    assert shapes == [BERT.trace[index] for index in visits(2)]
    assert metrics["total_s"] > max(metrics["first_s"], metrics["worst_ms"] / 1e3) > 0


def test_build_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.build.BUILDS", 2)
    monkeypatch.setitem(targets.NAMED, "portable", (targets.Target(80), targets.Target(120)))
    monkeypatch.setattr("benchmarks.suites.build.toolchain.forget", lambda: None)  # the second need not be a cold one
    found = measured(perform("build", "rtx-exported", device="cuda", workload=replace(BERT, dtype="float16")))
    metrics = found["rtx-exported"]
    assert 0 < metrics["file_bytes"] < metrics["weight_bytes"]
    assert metrics["kernel_nodes"] > 0
    assert metrics["kernels_sm_120"] >= metrics["kernels_sm_80"] > 0


def test_backend() -> None:
    found = measured(perform("backend", "aot_eager", "rtx", rounds=1))
    assert found["rtx"]["ratio"] == found["rtx"]["ratio"] | {"against": "aot_eager"}
    assert found["rtx"]["backend_s"]["median"] > 0


def test_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "subprocess", SimpleNamespace(run=forked_run))
    (metrics,) = measured(perform("cold", "rtx-exported")).values()
    for phase in ("cold", "warm"):
        assert 0 < metrics[phase]["first_s"] <= metrics[phase]["full_speed_s"]
        assert metrics[phase]["import_s"] > 0
    assert metrics["warm"]["first_s"] < metrics["cold"]["first_s"]  # the engine is there already


def test_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key's own module measures; the suite makes rows of it."""
    found = {"nodes": 5, "rtx_ms": 2.0, "inductor_ms": 30.0, "ratio": 16.0}
    measure = SimpleNamespace(measure=lambda name, repeats: found if (name, repeats) == ("bert_base", 2) else None)
    monkeypatch.setitem(sys.modules, "benchmarks.cache_key", measure)
    monkeypatch.setattr(benchmarks, "cache_key", measure, raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.suites.hash", raising=False)
    monkeypatch.setitem(SUITES, "hash", replace(SUITES["host"], name="hash"))
    rows = measured(perform("hash", "inductor", "rtx"))
    assert rows["rtx"] == {
        "hash_ms": {"median": 2.0},
        "ratio": {"against": "inductor", "median": 1 / 16},
        "nodes": 5,
    }
    assert rows["inductor"]["hash_ms"] == {"median": 30.0}


def test_full_speed() -> None:
    ends = [2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3]
    reached, final = full_speed(ends)
    assert reached == 2.6
    assert final == pytest.approx(0.1)


def test_wrong_results(plugin: str) -> None:
    """A peer that is a little off, or does not work, is a failed row; the others are compared without it."""
    found = perform("latency", "eager", "wrong", "failing", plugins=(plugin,))
    assert {name: row["status"] for name, row in found.items()} == {
        "eager": "ok",
        "wrong": "failed",
        "failing": "failed",
    }
    assert found["wrong"]["reason"].startswith("WrongResult: wrong result: output 0: error 1.00e-03 against float64")
    assert found["failing"]["reason"] == "ValueError: this peer never works"


def test_late_errors(plugin: str) -> None:
    """One who fails in its turn is told from the others, who have no rows yet and get another process."""
    (row,) = perform("latency", "eager", "raising", plugins=(plugin,)).values()
    assert (row["peer"], row["status"], row["reason"]) == ("raising", "failed", "RuntimeError: too late")


def test_wrong_after_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ignores a refit is not fast, but wrong."""
    from torch_rtx import CompiledModule

    attached: list[CompiledModule] = []

    def refit(module: CompiledModule, weights: Any) -> None:
        if not attached:
            attached.append(module)
            module.attach(weights)

    monkeypatch.setattr(CompiledModule, "refit", refit)
    (row,) = perform("refit", "rtx-exported").values()
    assert row["status"] == "ok"  # attached weights are the model's own, and follow it
    original = peers.PEERS["rtx-exported"]

    def stale(subject: peers.Subject) -> peers.Prepared:
        prepared = original.prepare(subject)
        prepared.attach({name: tensor.clone() for name, tensor in subject.model.state_dict().items()})
        return prepared

    monkeypatch.setitem(peers.PEERS, "rtx-exported", replace(original, prepare=stale))
    (row,) = perform("refit", "rtx-exported").values()
    assert row["status"] == "failed"
    assert "wrong result" in row["reason"]


# The whole command ----------------------------------------------------------------------------------------------------


def test_peers_that_go_wrong(tmp_path: Path, plugin: str, here: None, warm: None) -> None:
    """A hang and a crash cost their own rows and nobody else's; the run ends well and is then done."""
    out = tmp_path / "results.json"
    more = ["--plugin", plugin, "--peers", "eager,hanging,dying", "--limit", "3"]
    assert run(out, *more) == 0
    rows = rows_of(out)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"eager": "ok", "hanging": "failed", "dying": "failed"}
    assert rows["hanging"]["reason"] == "stopped after 3 s, during prepare"
    assert rows["dying"]["reason"].startswith("the process ended with status 9 during measure")
    assert rows["hanging"]["seconds"] >= 3
    assert run(out, *more, "--budget", "0") == 0  # there is nothing left to do
    assert rows_of(out) == rows


def test_a_peer_that_ended_its_process_is_not_tried_again(tmp_path: Path, plugin: str, here: None, warm: None) -> None:
    """Compiling it for every model, only to die again, would take the time of all others; the next run may try."""
    out = tmp_path / "results.json"
    more = ["--models", "bert_base,gpt2", "--plugin", plugin, "--peers", "eager,dying"]
    assert run(out, *more) == 0
    found = {(row["model"], row["peer"]): row for row in results.load(out).rows.values()}
    assert found["gpt2", "eager"]["status"] == "ok"
    assert found["gpt2", "dying"]["status"] == "failed"
    assert found["gpt2", "dying"]["reason"].startswith("not tried: it ended its process at bert_base-b2 of this run")
    assert run(out, *more, "--models", "gpt2", "--again", "failed") == 0
    again = {(row["model"], row["peer"]): row for row in results.load(out).rows.values()}
    assert again["gpt2", "dying"]["reason"].startswith("the process ended with status 9 during measure")


def test_killed_and_resumed(tmp_path: Path, plugin: str, here: None, warm: None) -> None:
    """What a killed run has measured stays, and the next one measures the rest."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", *arguments(out), "--suite", "memory", "--peers", "eager,hanging"]
    process = subprocess.Popen(
        [*command, "--plugin", plugin], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert b"the same command resumes" in said
    (kept,) = results.load(out).rows.values()
    (described,) = results.load(out).environments.values()
    assert described["packages"]["torch"] == torch.__version__
    assert described["rates"]["bytes_per_s"] > 0
    assert run(out, "--suite", "memory", "--plugin", plugin, "--peers", "eager,failing") == 0
    found = rows_of(out)
    assert found["eager"] == kept
    assert found["failing"]["status"] == "failed"


def test_budget(tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    assert run(out, "--peers", "eager,max-autotune,tensorrt-rtx", "--budget", "0") == 0
    assert "the budget is spent" in capsys.readouterr().err
    assert {name: row["status"] for name, row in rows_of(out).items()} == {"tensorrt-rtx": "unavailable"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tmp_path: Path) -> None:
    """Asked for a GPU that is not there, a suite that needs it says so and the run succeeds."""
    out = tmp_path / "results.json"
    assert (
        main(["run", "--models", "bert_base-b1-l128", "--device", "cuda", "--peers", "eager,rtx", "--out", str(out)])
        == 0
    )
    rows = results.load(out).rows.values()
    assert {(row["peer"], row["status"], row["reason"]) for row in rows} == {
        (peer, "unavailable", "needs a CUDA device") for peer in ("eager", "rtx")
    }
    assert {row["dtype"] for row in rows} == {"float16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "unknown suite 'speed'; known suites: latency, cold"),
        (["--models", "resnet51"], "unknown model 'resnet51'; known models: resnet50"),
        (["--peers", "eeger"], "unknown peer 'eeger'; known peers: eager"),
    ],
)
def test_unknown_names(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--out", str(tmp_path / "results.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where not even the device answers in time, the run fails, and leaves no file."""
    out = tmp_path / "results.json"
    assert run(out, "--limit", str(-runner.START_S)) == 2
    assert "the environment can't be described: it takes too long" in capsys.readouterr().err
    assert not out.exists()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*SUITES, *peers.PEERS, "bert_base-b8-l384", "flux_dit"):
        assert name in printed


def test_progress() -> None:
    """On a terminal a bar, which the lines that stay replace; elsewhere only those lines."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, bar in ((Terminal(), "[##########----------] 1/2 preparing"), (io.StringIO(), "")):
        progress = runner.Progress(stream)
        progress.done, progress.total = 1, 2
        progress.stage("preparing")
        assert bar in stream.getvalue()
        progress.line("done")
        assert stream.getvalue().endswith("done\n")
        assert bool(bar) == ("preparing" in stream.getvalue())
