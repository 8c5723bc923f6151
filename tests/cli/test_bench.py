"""`torch-rtx bench`: what it prints, its statistics, and threads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.cli.bench import Times, measure
from torch_rtx.runtime.signature import Signature

SHORT = ("--duration", "0.02", "--warmup", "0", "--iterations", "5")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.rtx"
    dims = ({0: torch.export.Dim("batch", min=1, max=9)},)
    torch_rtx.save(torch_rtx.compile(nn.Linear(4, 3), (torch.ones(2, 4),), dynamic_shapes=dims), path)
    return path


def call(*given: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, given)])


def test_bench(path: Path) -> None:
    done = call(path, "--size", "batch=2", "--percentile", 50, "--percentile", 99.9, *SHORT)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["device", "throughput", "latency", "host"]
    assert "p50 " in lines[2]
    assert "p99.9 " in lines[2]


def test_the_call_signature_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it may warn, and takes time."""
    read, seen = Signature.from_json, []
    monkeypatch.setattr(Signature, "from_json", staticmethod(lambda tree: (seen.append(tree), read(tree))[1]))
    assert call(path, "--size", "batch=2", *SHORT).exit_code == 0
    assert len(seen) == 1


def test_json(path: Path) -> None:
    options = ("-O", "tactics=calls", "-O", "tuning_seconds=5")
    found = json.loads(call(path, "--shapes", "input:2x4", "--json", "--threads", 2, *options, *SHORT).stdout)
    assert found["threads"] == 2
    assert found["device"] is None
    assert found["latency"]["count"] >= 5
    assert found["latency"]["min"] <= found["latency"]["median"] <= found["latency"]["percentiles"]["90"]
    assert found["host"]["mean"] <= found["latency"]["mean"]


def linear() -> nn.Module:
    """What `--model` names."""
    return nn.Linear(4, 3)


def test_peers(path: Path) -> None:
    given = (path, "--size", "batch=2", "--model", "tests.cli.test_bench:linear", "--peers", "eager,aot_eager", *SHORT)
    found = json.loads(call(*given, "--json").stdout)
    assert list(found["peers"]) == ["eager", "aot_eager"]
    assert all(one["latency"]["count"] >= 5 for one in found["peers"].values())
    text = call(*given).stdout
    assert "aot_eager: " in text
    assert text.count("times the throughput") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["--graphs", "--no-graphs"])
def test_on_a_gpu(graphs: str, tmp_path: Path) -> None:
    settings = torch_rtx.CompilationSettings(strip_weights=False)
    module = torch_rtx.compile(nn.Linear(64, 64).cuda(), (torch.ones(8, 64, device="cuda"),), settings=settings)
    torch_rtx.save(module, tmp_path / "a.rtx")
    found = json.loads(call(tmp_path / "a.rtx", "--transfers", "--streams", 2, graphs, "--json", *SHORT).stdout)
    assert found["device_name"] == torch.cuda.get_device_name()
    assert found["graphs"] is (graphs == "--graphs")
    assert found["device"]["count"] >= 5


def test_statistics() -> None:
    found = Times.of([0.001, 0.002, 0.003, 0.010], [50, 75])
    assert (found.count, found.min, found.max) == (4, 1.0, 10.0)
    assert (found.mean, found.median) == (4.0, 2.5)
    assert found.percentiles == {"50": 2.5, "75": pytest.approx(4.75)}


def test_threads_call_at_once() -> None:
    """Four threads that wait do so together, and each call counts once."""
    seen: set[int] = set()

    def wait() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    found = measure(torch.device("cpu"), [wait] * 4, 5, 0.1, 0.0, [90])
    assert len(seen) == 5  # the first phase is in this thread
    assert 200 < found.throughput <= 400
    assert 10 <= found.latency.min < 20


def test_errors_of_threads_are_raised() -> None:
    def fail() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure(torch.device("cpu"), [fail, lambda: None], 2, 0.0, 0.0, [90])


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ((), 1, "the dynamic sizes are"),
        (("--size", "batch=100"), 1, "batch=100 is out of range"),
        (("--size", "batch=2", "--threads", "0"), 2, "--threads"),
        (("--size", "batch=2", "--peers", "eager"), 1, "give --model"),
        (("--size", "batch=2", "--model", f"{__name__}:linear", "--peers", "x"), 1, "'x' runs no models here"),
        (("--size", "batch=2", "--percentile", "101"), 2, "--percentile"),
        (("--size", "batch=2", "--percentile", "9,x"), 2, "--percentile"),
        (("--size", "batch=x"), 1, "--size batch=x: 'x' is no number"),
        (("--size", "bach=2"), 1, "--size bach=2: there is no size 'bach'"),
        (("--size", "batch=2", "--size", "batch=3"), 1, "--size batch=3: batch is 2, too"),
        (("--shapes", "input:2x5"), 1, "the shape input:2x5 has 5 in place of 4; the input is input:batchx4"),
        (("--shapes", "input:2"), 1, "has 1 axes"),
        (("--shapes", "other:2x4"), 1, "the engine has no input 'other'"),
        (("--shapes", "input:2x4", "--size", "batch=3"), 1, "has 2 in place of 3 (batch)"),
        (("--shapes", "input"), 1, "'input' is no list of shapes"),
        (("--shapes", "input:2x4", "-O", "tactic=x"), 1, "unknown option tactic"),
        (("--shapes", "input:2x4", "-O", "tactics"), 1, "is no NAME=VALUE"),
        (("--size", "batch=2", "--weights", "none.safetensors"), 1, "there is no file of weights"),
    ],
)
def test_mistakes(path: Path, given: tuple[str, ...], code: int, message: str) -> None:
    done = call(path, *given, *SHORT)
    assert (done.exit_code, message in done.output) == (code, True), done.output
