"""Profiles: the times of nodes add up, carry the names of the user's modules, and are drawn without harm."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from benchmarks import models
from tests.helpers.ahead import IMAGE, Net, through_file
from tests.helpers.kernels import GRAPH
from tests.helpers.profiles import made
from tests.runtime.test_reference_kernels import add
from torch_rtx.cli.app import app
from torch_rtx.errors import InputError, RtxError, SettingsError
from torch_rtx.irparse import parse
from torch_rtx.runtime import profiling
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.clocks import SPANS_AT_ONCE, Clock, DeviceClock, overhead
from torch_rtx.runtime.node_cost import Cost, cost
from torch_rtx.runtime.profiling import Profile
from torch_rtx.runtime.session import Session, watched_calls
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import OWN, Tactic

CPU = torch.device("cpu")
SPLIT = """\
graph import {
  dim s = 1, 1048576, 1
  input in0: f32[s]
  input in1: f32[s]
  b: f32[s] = op aten.clone.default(self=in1)
  c: f32[s] = kernel half(in0=in0, in1=b) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    input in1: f32[s]
    a: f32[s] = op aten.add.Tensor(self=in0, other=in1)
    return [a]
  }
  return [c]
}
"""
BATCH = torch.export.Dim("batch", min=1, max=64)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bert() -> tuple[torch_rtx.CompiledModule, tuple[Any, ...], dict[str, Any], Profile]:
    model, args, kwargs = models.build("bert_base", "small")
    with torch.no_grad():
        module = torch_rtx.compile(model, args, kwargs)
        return module, args, kwargs, torch_rtx.profile(module, *args, **kwargs)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_rows_are_the_nodes(bert: Any) -> None:
    module, _, _, profile = bert
    nodes = module.session.graph.nodes
    assert [row.op for row in profile.rows] == [node.op for node in nodes]
    assert [row.kind for row in profile.rows] == [node.kind for node in nodes]
    assert [row.name for row in profile.rows] == [node.outputs[0].name for node in nodes]
    assert {(row.tier, row.tactic, row.runs_as) for row in profile.rows} == {("library call", "", "library call")}
    for row, node in zip(profile.rows, nodes, strict=True):
        assert row.locs == ((node.loc,) if node.loc else ())
        read = {profile.rows[source].name for source in row.inputs}
        assert read == {value.name for value in node.inputs} & {row.name for row in profile.rows}


def test_times_add_up(bert: Any) -> None:
    *_, profile = bert
    assert all(len(row.times) == 20 and min(row.times) >= 0 for row in profile.rows)
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    # Loosely: other processes share the cores.
    assert profile.us < 3 * profile.call_us < 30 * profile.us
    assert profile.us < 3 * profile.plain_us < 30 * profile.us
    assert not profile.cuda_graph
    assert any(row.us > 0 and row.p95 >= row.us for row in profile.rows)


def test_names_of_modules(bert: Any) -> None:
    *_, profile = bert
    named = {row.module for row in profile.rows}
    assert {"embeddings.LayerNorm", "encoder.layer.1.intermediate.dense", "pooler.activation"} <= named
    text = str(profile)
    assert "encoder.layer.0.output.dense @ transformers/models/bert/modeling_bert.py:" in text
    assert f"{len(profile.rows)} nodes, medians of 20 runs on the CPU" in text
    assert len(text.splitlines()) == 1 + profiling.SHOWN + 1 + 4
    assert re.search(r"whole call: [\d.]+ us, [\d.]+ us (more|less) than the nodes$", text)
    assert profile.about["model"] == "CompiledModule"
    assert f"torch {torch.__version__}" in profile.about["versions"]
    whole = profile.table(limit=None).splitlines()
    assert len(whole) == 1 + len(profile.rows) + 4
    spent = [float(line.split()[0]) for line in whole[1 : len(profile.rows) + 1]]
    assert spent == sorted(spent, reverse=True)


def test_by_module(bert: Any) -> None:
    *_, profile = bert
    for depth in (1, 2, 9):
        table = profile.by_module(depth)
        assert sum(row.nodes for row in table.rows) == len(profile.rows)
        assert sum(row.us for row in table.rows) == pytest.approx(profile.us)
        assert sum(row.share for row in table.rows) == pytest.approx(1)
        assert max(len(row.module.split(".")) for row in table.rows) <= depth
    assert {row.module for row in profile.by_module(1).rows} == {"", "embeddings", "encoder", "pooler"}
    assert "(the model itself)" in str(profile.by_module())


def test_the_result_stays_the_same(bert: Any) -> None:
    module, args, kwargs, _ = bert
    with watched_calls() as calls:
        expected = module(*args, **kwargs)
    ((session, inputs),) = calls
    assert session is module.session
    marks: list[int] = []
    probed = session.probed(session.current(inputs).code, lambda: marks.append(0))
    got = session.run(probed, inputs, session.store.values)
    torch.testing.assert_close(got, list(expected.values()), rtol=0, atol=0)
    assert len(marks) == len(session.graph.nodes) + 1
    assert "_probe()" in probed.source
    assert "_probe" not in session.source


def test_dynamic_shapes(tmp_path: Path) -> None:
    module = torch_rtx.compile(Net().eval(), (IMAGE,), dynamic_shapes=({0: BATCH},))
    module = through_file(module, tmp_path, weights=Net().eval())
    for size in (1, 5):
        profile = torch_rtx.profile(module, IMAGE[:1].expand(size, -1, -1, -1), repeats=2, warmup=0)
        linear = next(row for row in profile.rows if row.op == "aten.linear.default")
        assert linear.cost == Cost(4 * (size * 32 + 24 * 8 + 24), 4 * size * 96, 2 * size * 4 * 24 * 8)
        assert all(len(row.times) == 2 for row in profile.rows)


def test_errors_of_the_call() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    settings = torch_rtx.CompilationSettings(device="cpu")
    module = torch_rtx.compile(model, (torch.ones(2, 3, device="meta"),), settings=settings)
    with pytest.raises(RtxError, match="this engine is weight-stripped"):
        torch_rtx.profile(module, torch.ones(2, 3))
    module.refit({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    with pytest.raises(InputError, match="dimension 0 of input 'input' is 3"):
        torch_rtx.profile(module, torch.ones(3, 3))
    with pytest.raises(SettingsError, match="repeats must be at least 1"):
        torch_rtx.profile(module, torch.ones(2, 3), repeats=0)
    with pytest.raises(RtxError, match="no engine ran in this call of a Linear"):
        torch_rtx.profile(nn.Linear(3, 3), torch.ones(2, 3))
    assert len(torch_rtx.profile(module, torch.ones(2, 3), repeats=1).rows) == 1
    assert not torch_rtx.runtime.session._WATCHERS  # also after an error


def test_torch_compile(fresh_dynamo: None) -> None:
    """What torch.compile returned is profiled as it is, graph breaks and fallbacks included."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(torch.relu(y))

    compiled = torch.compile(Broken(), backend="rtx", options={"torch_executed_ops": ["aten.relu"]})
    profile = torch_rtx.profile(compiled, torch.ones(3, 4), repeats=3)
    assert [(row.module, row.what, row.tier) for row in profile.rows] == [
        ("first", "linear", "library call"),
        ("", "relu", "fallback"),
        ("second", "linear", "library call"),
    ]
    assert [row.inputs for row in profile.rows] == [(), (), (1,)]  # relu reads the result of another graph
    assert profile.rows[0].locs[0].file.endswith("test_profile.py")


def test_another_threads_calls_are_not_watched() -> None:
    import threading

    session = Session(GRAPH, WeightStore(GRAPH, CPU, {}), RuntimeSettings())
    x, y = torch.randn(2, 7)
    with watched_calls() as calls:
        thread = threading.Thread(target=session, args=([x, y],))
        thread.start()
        thread.join()
        session([y, x])
    session([x, y])
    ((seen, inputs),) = calls
    assert seen is session
    assert inputs[0] is y


def test_kernels() -> None:
    """Kernels that are launched are one row, with what is inside; the bodies of others are rows of their own."""
    launcher = add()
    launcher.target = "sm_90"  # type: ignore[attr-defined]
    tactic: Any = Tactic("kernel", 0.0, {OWN: launcher})
    session = Session(GRAPH, WeightStore(GRAPH, CPU, {}), RuntimeSettings(), tactics={"add": tactic})
    profile = torch_rtx.profile(session, list(torch.randn(2, 16)), repeats=2)
    assert [(row.kind, row.runs_as, row.what) for row in profile.rows] == [
        ("kernel", "kernel for sm_90", "add"),
        ("extern", "library call", "neg"),
        ("kernel", "kernel for sm_90", "add"),
        ("extern", "calls: library call", "exp"),
        ("extern", "calls: library call", "mul"),
        ("extern", "calls: library call", "add"),
    ]
    assert [row.tactic for row in profile.rows] == ["kernel", "", "kernel", "calls", "calls", "calls"]
    assert [row.inputs for row in profile.rows] == [(), (0,), (1,), (2,), (3,), (4, 2)]
    assert profile.rows[2].where == "model.add @ model.py:3"
    assert profile.rows[0].cost == Cost(2 * 64, 64, 0)


def test_kinds_of_tactics(tmp_path: Path) -> None:
    """A node that takes the place of a kernel node has the kind of its tactic, in every form of the profile."""
    launcher = add()
    launcher.target = "sm_90"  # type: ignore[attr-defined]
    tactic: Any = Tactic("split", 0.0, {"half": launcher}, parse(SPLIT))
    session = Session(GRAPH, WeightStore(GRAPH, CPU, {}), RuntimeSettings(), tactics={"add": tactic})
    profile = torch_rtx.profile(session, list(torch.randn(2, 16)), repeats=2)
    kinds = ["split", "split", "", "split", "split", "calls", "calls", "calls"]
    assert [row.tactic for row in profile.rows] == kinds
    half = [row for row in profile.rows if row.op == "half"]
    assert [row.runs_as for row in half] == ["split: kernel for sm_90"] * 2
    assert profile.table().count("split: library call") == profile.table().count("split: kernel for sm_90") == 2
    assert [event["args"]["tactic"] for event in events(profile, tmp_path) if event["cat"] != "module"] == kinds
    profile.html(tmp_path / "page.html")
    assert '["runs as", "split: kernel for sm_90"]' in (tmp_path / "page.html").read_text()


def test_versions_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a profile names the version of CUDA that the driver has."""
    monkeypatch.setattr(profiling, "driver", lambda: SimpleNamespace(cuDriverGetVersion=lambda: (0, 13020)))
    assert dict(profiling._versions(torch.device("cuda")))["driver for CUDA"] == "13.2"
    assert "driver for CUDA" not in dict(profiling._versions(CPU))


# ---- costs -----------------------------------------------------------------------------------------------------------


COSTS = """\
graph fused {
  dim s = 1, 64, 1
  dim u = 0, None, 1
  input ids: i64[s]
  input table: f16[1000, 8]
  input image: f32[s, 4, 6, 6]
  input kernel: f32[10, 2, 3, 3]
  input up: f32[10, 4, 2, 2]
  a: f16[s, 8] = extern aten.embedding.default(weight=table, indices=ids)
  t: f16[8, s](1, 8) = view aten.t.default(self=a)
  p: f16[s, s] = extern aten.mm.default(self=a, mat2=t)
  r: f16[s, 8] = kernel gather_scale(in0=table, in1=ids, in2=p) graph import {
    dim s = 1, 64, 1
    input in0: f16[1000, 8]
    input in1: i64[s]
    input in2: f16[s, s]
    e: f16[s, 8] = op aten.embedding.default(weight=in0, indices=in1)
    m: f16[s, 8] = op aten.mm.default(self=in2, mat2=e)
    return [m]
  }
  c: f32[s, 10, 4, 4] = extern aten.conv2d.default(input=image, weight=kernel, bias=None, groups=2)
  d: f32[s, 4, 5, 5] = extern aten.conv_transpose2d.input(input=c, weight=up, bias=None)
  q: f16[1, 2, s, 4](0, 0, 4, 1) = view aten.expand.default(self=r, size=[1, 2, s, 4])
  h: f16[1, 2, s, 4] = extern aten.scaled_dot_product_attention.default(query=q, key=q, value=q)
  _ = extern aten.copy_.default(self=image, src=image)
  v: f16[1000, 8] = extern aten.index_copy_.default(self=table, dim=0, index=ids, source=r)
  n: i64[u, 1] = fallback aten.nonzero.default(self=ids)
  return [p, d, h, n]
}
"""


def test_costs() -> None:
    """By hand: each tensor once, of tables the rows that are read, of expanded tensors what is in memory."""
    graph, s = parse(COSTS), 5
    shapes = ((s,), (1000, 8), (s, 4, 6, 6), (10, 2, 3, 3), (10, 4, 2, 2))
    inputs = [torch.empty(shape) for shape in shapes]
    sizes = bind_sizes(graph, inputs)
    assert sizes == {"s": s}
    costs = [cost(node, sizes) for node in graph.nodes]
    rows, square = 2 * s * 8, 2 * s * s
    image, out = 4 * s * 4 * 36, 4 * s * 10 * 16
    assert costs == [
        Cost(8 * s + rows, rows, 0),
        Cost(0, 0, 0),
        Cost(2 * rows, square, 2 * s * s * 8),
        Cost(rows + 8 * s + square, rows, 2 * s * s * 8),
        Cost(image + 4 * 180, out, 2 * (s * 10 * 16) * 2 * 9),
        Cost(out + 4 * 160, 4 * s * 100, 2 * (s * 10 * 16) * 4 * 4),
        Cost(0, 0, 0),
        Cost(2 * s * 4, 2 * 2 * s * 4, 2 * 2 * (2 * s * s * 4)),
        Cost(image, image, 0),
        Cost(8 * s + rows, rows, 0),
        None,
    ]


def test_rates() -> None:
    row = made([(2.0, 4.0, 3.0)], [""]).rows[0]
    assert (row.us, row.p95) == (3.0, 3.9)
    assert row.gbps == pytest.approx(4000 / 3 / 1e3)
    assert row.tflops is None
    assert replace(row, cost=Cost(0, 0, 6_000_000)).tflops == pytest.approx(2)
    assert replace(row, cost=None).gbps is None
    assert replace(row, times=(0.0,)).gbps is None


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Device:
    """Stands for a GPU with a queue: it starts what is next when that is queued and all before is done (us)."""

    def __init__(self) -> None:
        self.host = self.busy = 0.0
        self.delays = 0

    def work(self, us: float) -> None:
        self.host += 10.0  # what the host takes to queue something
        self.busy = max(self.busy, self.host) + us

    def delay(self) -> None:
        self.work(5000.0)
        self.delays += 1

    def record(self) -> Event:
        self.work(0.0)
        return Event(self, self.busy)


class Event:
    def __init__(self, device: Device, at: float) -> None:
        self.device, self.at, self.waited = device, at, False

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.device.host >= other.at, "the event has not been waited for"
        return (other.at - self.at) / 1000


def test_device_clock() -> None:
    """Behind a delay the device's own times are seen, on any number of spans; without one, the host's."""
    spans = [float(1 + i % 7) for i in range(2 * SPANS_AT_ONCE + 50)]
    for delayed in (True, False):
        device = Device()
        clock = DeviceClock(device.record, device.delay if delayed else None)
        for _ in range(2):
            clock()
            for us in spans:
                device.work(us)
                clock()
            seen = clock.read()
            if delayed:
                assert seen == pytest.approx(spans)
            else:
                assert min(seen) >= 10
        assert device.delays == (6 if delayed else 0)
        assert clock.read() == []


def test_profile_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it with the events of a made-up device: each node's time is the device's, less the marks' own."""
    device = Device()
    chosen: list[bool] = []

    def clock_of(_: torch.device, queued: bool) -> Clock:
        chosen.append(queued)
        return DeviceClock(device.record, device.delay if queued else None)

    monkeypatch.setattr(profiling, "clock_of", clock_of)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module = torch_rtx.compile(model, (torch.ones(2, 4),))
    spent = itertools.cycle((7.0, 2.0, 9.0))
    code = module.session.source
    calls = [line for line in code.splitlines() if " = _aten" in line]
    assert len(calls) == 3
    original = Session.run

    def run(self: Session, code: Any, *args: Any) -> Any:  # the nodes of this device take the times above
        given = code.run.__globals__
        for name, function in list(given.items()):
            if name.startswith("_aten") and not hasattr(function, "timed"):
                given[name] = timed(function)
        return original(self, code, *args)

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            device.work(next(spent))
            return function(*args)

        call.timed = True  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(Session, "run", run)
    profile = torch_rtx.profile(module, torch.ones(2, 4), repeats=4, warmup=1)
    assert chosen == [False, True]
    for row, us in zip(profile.rows, (7.0, 2.0, 9.0), strict=True):
        assert row.times == pytest.approx((us,) * 4)
    assert profile.us == pytest.approx(18)
    assert profile.call_us == profile.plain_us
    assert profile.plain_us >= 3 * 10  # the host queues more slowly than the device computes


def test_host_clock() -> None:
    clock = Clock()
    assert 0 <= overhead(clock) < 1000
    clock()
    assert clock.read() == []  # one mark, no span


# ---- trace -----------------------------------------------------------------------------------------------------------


def events(profile: Profile, folder: Path) -> list[dict[str, Any]]:
    profile.trace(folder / "trace.json")
    found = json.loads((folder / "trace.json").read_text())
    assert [e["args"]["name"] for e in found["traceEvents"] if e["ph"] == "M"] == ["torch_rtx", profile.device]
    return [event for event in found["traceEvents"] if event["ph"] == "X"]


def test_trace(bert: Any, tmp_path: Path) -> None:
    *_, profile = bert
    found = events(profile, tmp_path)
    nodes = [event for event in found if event["cat"] != "module"]
    assert [event["args"]["node"] for event in nodes] == [row.name for row in profile.rows]
    for event in found:
        assert {"name", "ph", "ts", "dur", "pid", "tid"} <= event.keys()
    for before, after in itertools.pairwise(nodes):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1e-6)
    spans = [event for event in found if event["cat"] == "module"]
    for one, other in itertools.combinations(found, 2):  # nested or apart
        start, end = one["ts"], one["ts"] + one["dur"]
        low, high = other["ts"], other["ts"] + other["dur"]
        inside = (start - 1e-6 <= low and high <= end + 1e-6) or (low - 1e-6 <= start and end <= high + 1e-6)
        assert inside or end <= low + 1e-6 or high <= start + 1e-6
    layers = [
        event["args"]["module"] for event in spans if re.fullmatch(r"encoder\.layer\.\d", event["args"]["module"])
    ]
    assert layers == ["encoder.layer.0", "encoder.layer.1"]
    for event in nodes:
        row = next(row for row in profile.rows if row.name == event["args"]["node"])
        around = [s["args"]["module"] for s in spans if s["ts"] <= event["ts"] and s["ts"] + s["dur"] > event["ts"]]
        assert not row.module or row.module in around or event["dur"] == 0


def test_trace_of_modules_that_come_again(tmp_path: Path) -> None:
    profile = made([(1.0, 10.0, 2.0)] * 5, ["a.b", "a.b", "a", "", "a.b"])
    assert profile.run == 2  # neither the fastest nor the slowest run
    found = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in events(profile, tmp_path)]
    assert [span for span in found if span[1] == "module"] == [
        ("a", "module", 0, 6),
        ("b", "module", 0, 4),
        ("a", "module", 8, 2),
        ("b", "module", 8, 2),
    ]
    assert [span for span in found if span[1] != "module"] == [("exp", "extern", 2.0 * i, 2) for i in range(5)]


# ---- command line ----------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Net().eval()
    torch_rtx.save(torch_rtx.compile(model, (IMAGE,), dynamic_shapes=({0: BATCH},)), tmp_path / "m.rtx")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    symbol, name = next(iter(torch_rtx.inspect(tmp_path / "m.rtx").sizes.items()))
    assert name == BATCH.__name__

    def call(*args: object) -> Any:
        return CliRunner().invoke(app, ["profile", str(tmp_path / "m.rtx"), *map(str, args)])

    out = ("--html", tmp_path / "p.html", "--trace", tmp_path / "t.json")
    done = call("--size", f"{symbol}=3", "--weights", tmp_path / "w.safetensors", *out)
    assert done.exit_code == 0, done.output
    assert "conv @ " in done.stdout
    assert "<dt>model</dt><dd>m.rtx</dd>" in (tmp_path / "p.html").read_text()
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    done = call("--size", f"{name}=3", "--modules", 1, "--repeats", 1)
    assert done.exit_code == 0, done.output
    assert "(the model itself)" in done.stdout
    for arguments, message in (
        ((), f"the dynamic sizes are: --size {name}=1..64"),
        (("--size", f"{symbol}=three"), f"--size {symbol}=three: 'three' is no number; the dynamic sizes are"),
        (("--size", f"{symbol}=100"), "=100 is out of range"),
        (("--size", "rows=3"), "--size rows=3: there is no size 'rows'"),
        (("--size", f"{symbol}=3", "--device", "gpu"), "an engine can't run on 'gpu'"),
        (("--size", f"{symbol}=3", "--html", tmp_path / "none" / "a.html"), "a.html can't be written: there is no"),
        (("--size", f"{symbol}=3", "--weights", tmp_path / "none"), "error"),
    ):
        done = call(*arguments)
        assert done.exit_code == 1
        assert message in done.stderr
