"""What the benchmarks are made of, without running any: models, floors, ratios, result files, the report."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import chart, floors, models, report, results, timing
from benchmarks.__main__ import CHECKED_IN, main
from benchmarks.cases import WORKLOADS, Job, Workload, key, workloads
from benchmarks.diffusion import FluxTransformer
from benchmarks.results import ConflictError, Results, SchemaError
from benchmarks.suites import SUITES
from benchmarks.suites.common import compare
from tests.paths import ROOT
from tests.test_structure import MAX_FILE, MAX_FUNCTION

# Models and floors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),
        ("mobilenet_v3", 5_483_032),
        ("vit_b_16", 86_567_656),
        ("bert_base", 109_482_240),
        ("gpt2", 124_439_808),
        ("sd15_unet", 859_520_964),
    ],
)
def test_published_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in models.without_weights(name, "full").parameters()) == parameters


def test_flux_parameters() -> None:
    """All blocks of FLUX.1-dev make its published size; the zoo has a few of them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in FluxTransformer().parameters()) == 11_901_408_320
    assert 1e9 < sum(p.numel() for p in models.without_weights("flux_dit", "full").parameters()) < 2e9


def test_every_workload_has_a_model() -> None:
    assert {w.model for w in WORKLOADS} <= set(models.names())
    assert len({w.name for w in WORKLOADS}) == len(WORKLOADS)
    for w in WORKLOADS:
        assert not w.trace or len(set(w.trace)) > 2


@pytest.mark.parametrize(("name", "gflop"), [("resnet50", 8.18), ("mobilenet_v3", 0.433), ("vit_b_16", 35.1)])
def test_flops(name: str, gflop: float) -> None:
    """Twice the published multiply-accumulates: 4.09, 0.22 and 17.6 billion."""
    model = models.without_weights(name, "full")
    args, kwargs = models.inputs(name, "full", batch=1, device="meta")
    work = floors.work(model, args, kwargs)
    assert work["flops"] / 1e9 == pytest.approx(gflop, rel=0.01)
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert work["bytes"] == sum(t.nbytes for t in state) + 4 * (3 * 224 * 224 + 1000)


def test_bytes_of_tables() -> None:
    """Of an embedding only the rows that are looked up count; where it is the last layer's weight as well, all do."""

    class Net(torch.nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 1000, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    ids, table, passed = torch.arange(4).view(1, 4), 4 * 8 * 1000, 4 * 8 + 4 * 4 * 1000
    assert floors.work(Net(tied=False), (ids,), {}) == {"flops": 2 * 4 * 8 * 1000, "bytes": table + 4 * 8 * 4 + passed}
    assert floors.work(Net(tied=True), (ids,), {}) == {"flops": 2 * 4 * 8 * 1000, "bytes": table + passed}


def test_flops_of_attention() -> None:
    """Scores and values, 2 * 2 * heads * tokens * tokens * size, on the CPU as on any other device."""
    q = torch.randn(1, 2, 16, 8)

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert floors.work(Attention(), (q,), {})["flops"] == 4 * 2 * 16 * 16 * 8


def test_device_rates() -> None:
    rates = floors.device_rates("cpu")
    assert rates["bytes_per_s"] > 1e8
    assert rates["flops_per_s"]["float32"] > 1e8


def test_floor() -> None:
    environment = {"rates": {"bytes_per_s": 4e12, "flops_per_s": {"float16": 8e14}}}
    row = {"dtype": "float16", "metrics": {"work": {"flops": 8e11, "bytes": 2e9}}}
    assert report.floor_ms(row, environment) == pytest.approx(1.0)  # of FLOPs
    row["metrics"]["work"]["bytes"] = 8e9
    assert report.floor_ms(row, environment) == pytest.approx(2.0)  # of bytes
    assert report.floor_ms({**row, "dtype": "float64"}, environment) is None


# Timing ---------------------------------------------------------------------------------------------------------------


def test_summary_and_ratio() -> None:
    assert timing.summary(list(range(101))) == {"median": 50, "p5": 5, "p95": 95}
    assert timing.summary([7.0]) == {"median": 7.0, "p5": 7.0, "p95": 7.0}
    assert timing.ratio([[1, 2, 3], [4]], [[4], [4]]) == pytest.approx({"median": 0.75, "p5": 0.525, "p95": 0.975})


def test_turns() -> None:
    """Every peer once a round, and each begins one round in turn."""
    order = list(timing.turns(["a", "b", "c"], 3))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]


def test_interleaved() -> None:
    calls: list[str] = []
    begun: list[str] = []
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in ("a", "b")}, "cpu", 4, begun.append
    )
    assert begun[:2] == ["a", "b"]
    assert len(begun) == 2 + 8
    assert {name: len(found["wall_ms"]) for name, found in times.items()} == {"a": 4, "b": 4}


def test_compare() -> None:
    """Against the fastest that is not torch_rtx, round by round."""
    rounds = {"eager": [[4.0], [8.0]], "inductor": [[2.0], [4.0]], "rtx": [[1.0], [3.0]]}
    found = compare(rounds)
    assert {name: ratio["against"] for name, ratio in found.items()} == dict.fromkeys(rounds, "inductor")
    assert {name: ratio["median"] for name, ratio in found.items()} == {"eager": 2.0, "inductor": 1.0, "rtx": 0.625}
    assert compare({"rtx": [[1.0]]}) == {}


# Result files ---------------------------------------------------------------------------------------------------------


def row(peer: str = "eager", model: str = "resnet50", at: str = "2026-01-01T00:00:00", **fields: Any) -> results.Row:
    """A row of the latency suite."""
    return {
        **key("latency", Workload(model, 1, dtype="float16"), "NVIDIA H200", peer),
        "environment": "e",
        "time": at,
        "seconds": 1.0,
        "status": "ok",
        "reason": None,
        "metrics": {"device_ms": {"median": 2.0, "p5": 1.0, "p95": 3.0}},
        **fields,
    }


def written(path: Path, *rows: results.Row) -> Path:
    """A result file of these rows."""
    found = Results(environments={"e": {"device": "NVIDIA H200", "kind": "cuda"}})
    for each in rows:
        found.add(each)
    found.save(path)
    return path


def test_merge(tmp_path: Path) -> None:
    """Different rows add up; of two for the same case the later stays, whatever the order of the files."""
    old = row(metrics={"device_ms": {"median": 9.0}})
    new = row(at="2026-01-02T00:00:00")
    files = [written(tmp_path / "a.json", old, row("rtx")), written(tmp_path / "b.json", new, row("inductor"))]
    for order in (files, files[::-1]):
        found = {each["peer"]: each for each in results.merged(order).rows.values()}
        assert sorted(found) == ["eager", "inductor", "rtx"]
        assert found["eager"] == new


def test_merge_conflict(tmp_path: Path) -> None:
    files = [written(tmp_path / "a.json", row()), written(tmp_path / "b.json", row(seconds=2.0))]
    with pytest.raises(ConflictError, match=r"two different rows of .* model=resnet50"):
        results.merged(files)
    assert len(results.merged([files[0], files[0]]).rows) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {**data, "schema": 2}, "has the schema 2, this version reads 1"),
        (lambda data: [], "has the schema None"),
        (lambda data: {**data, "environments": {}}, "dangling fields"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "status": "good"}]}, "a row with"),
        (lambda data: {**data, "rows": [{"suite": "latency"}]}, "a row with"),
    ],
)
def test_schema(change: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", row())
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SchemaError, match=message):
        results.load(path)


def test_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text("{")
    assert main(["report", str(path)]) == 2
    assert "can't be read as JSON" in capsys.readouterr().err


def test_save_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old file, and nothing else."""
    path = written(tmp_path / "a.json", row())
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        written(path, row(), row("rtx"))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_jobs_are_json() -> None:
    for workload in workloads([], "full", "cuda"):
        job = Job("latency", workload, ("eager", "rtx"), "cuda", 3, ("tests.doubles.odd_peers",))
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_workloads() -> None:
    assert [w.name for w in workloads(["resnet50"], "full", "cuda")] == ["resnet50-b1", "resnet50-b32"]
    (one,) = workloads(["bert_base-b8-l384"], "full", "cuda")
    assert (one.batch, one.length, one.dtype, one.channels_last) == (8, 384, "float16", False)
    assert {w.dtype for w in workloads(["llama", "flux_dit"], "full", "cuda")} == {"bfloat16"}
    assert {w.dtype for w in workloads(["llama"], "full", "cpu")} == {"float32"}
    assert [w.name for w in workloads(["resnet50"], "small", "cpu")] == ["resnet50-b2"]


def test_workloads_of_a_suite() -> None:
    """A model's name means the suite's own shapes where it has some, and the name of a shape any that there is."""
    own = SUITES["train"].workloads
    assert [w.name for w in workloads([], "full", "cuda", own)] == [w.name for w in own]
    names = [w.name for w in workloads(["resnet50", "gpt2-b1-l512", "clip"], "full", "cuda", own)]
    assert names == ["resnet50-b32", "resnet50-b128", "gpt2-b1-l512", "clip-b2"]
    assert len(workloads([], "small", "cpu", own)) == len({w.model for w in own})


# The report -----------------------------------------------------------------------------------------------------------


def test_pages_are_what_the_results_say(tmp_path: Path) -> None:
    """No figure in docs/ and README.md is written by hand, nor is the plot."""
    assert main(["report", "--docs", str(tmp_path)]) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    plots = {"performance.svg", "performance-outside.svg"}
    assert written.keys() == {"performance.md", "performance-details.md", *plots}
    again = "docs/: python -m benchmarks report --docs docs"
    assert written == {name: (ROOT / "docs" / name).read_text() for name in written}, again
    shown = (ROOT / "README.md").read_text().partition("## Performance")[2].splitlines()
    shown = [line for line in shown if line.startswith("|")]  # some of its workloads
    assert len(shown) > 4
    assert set(shown) <= set(written["performance.md"].splitlines())


def test_the_plot_shows_the_table() -> None:
    """A mark for each figure, farther to the right where more is gained; none where nothing was measured."""
    found = [
        report.Speedup("a-b1", "GPU", "inductor", 1.0, {"`torch.compile`": 0.9, "engine file": 2.0}),
        report.Speedup("a<b", "GPU", "inductor", 2.0, {"engine file": 1.5}),
    ]
    svg = ElementTree.fromstring(chart.speedup_chart(found))
    places = {tag: [mark for mark in svg.iter() if mark.tag.endswith(tag)] for tag in ("circle", "path", "text")}
    dots, squares = places["circle"][1:], places["path"][1:]  # after those of the legend
    (below,), (twice, more) = [float(dot.attrib["cx"]) for dot in dots], [_x(square) for square in squares]
    texts = [text.text for text in places["text"]]
    assert texts[-2:] == ["a-b1", "a<b"]
    one = next(float(text.attrib["x"]) for text in places["text"] if text.text == "1x")
    assert below < one < more < twice
    assert round((twice - one) / (more - one), 2) == 2


def _x(square: ElementTree.Element) -> float:
    return float(square.attrib["d"].removeprefix("M").split()[0])


def test_report(tmp_path: Path) -> None:
    def timed(peer: str, model: str, ratio: float, **fields: Any) -> results.Row:
        spread = {"against": "inductor", "median": ratio, "p5": ratio, "p95": ratio}
        metrics = {"device_ms": {"median": 2 * ratio, "p5": 1.5 * ratio, "p95": 3 * ratio}, "ratio": spread}
        return row(peer, model, metrics={**metrics, "work": {"flops": 8e11, "bytes": 1e9}}, **fields)

    path = tmp_path / "a.json"
    rows = [timed(peer, m, r) for m in ("gpt2", "resnet50") for peer, r in (("inductor", 1.0), ("eager", 3.0))]
    rows += [timed("rtx", "gpt2", 0.25), timed("rtx", "resnet50", 1.0)]
    rows.append(row("max-autotune", status="failed", reason="stopped after 9 s, during prepare", metrics={}))
    rows.append(row("onnxruntime", status="unavailable", reason="not installed: onnxruntime", metrics={}))
    found = Results()
    name = found.add_environment({"rates": {"bytes_per_s": 4e12, "flops_per_s": {"float16": 8e14}}, "cpu": "a CPU"})
    for each in rows:
        found.add({**each, "environment": name})
    found.save(path)
    text = report.page(results.load(path))
    assert text == report.page(results.merged([path, path]))
    lines = text.splitlines()
    assert "| workload | floor | eager | inductor | rtx |" in lines
    assert "| resnet50-b1 float16 | 1.00 | 6.00 | **2.00** | **2.00** |" in lines
    assert "| gpt2-b1 float16 | 1.00 | 6.00 | 2.00 | **0.500** |" in lines
    assert "| gpt2-b1 float16 | rtx | 0.500 (0.375–0.750) | 0.500 | 0.250 (0.250–0.250) |" in lines
    assert "| rtx | 2 | 0.500 | 0.250–1.00 |" in lines
    speedups = report.speedups(results.load(path))
    short = report.short_page(speedups)
    assert "| gpt2-b1 float16 | 0.500 | 4.00x |" in short.splitlines()
    assert "which is `inductor` for all of them" in short
    other = replace(speedups[0], against="onnxruntime")
    assert f"| {other.workload} | onnxruntime | " in report.short_page([*speedups, other])
    assert "- max-autotune (resnet50-b1 float16): failed: stopped after 9 s, during prepare" in lines
    assert "- onnxruntime: unavailable: not installed: onnxruntime" in lines
    assert lines.index("| resnet50-b1 float16 | 1.00 | 6.00 | **2.00** | **2.00** |") < lines.index(
        "| gpt2-b1 float16 | 1.00 | 6.00 | 2.00 | **0.500** |"
    )


def test_environments_that_differ_in_what_was_measured_alone_share_a_line(tmp_path: Path) -> None:
    found = Results()
    for model, cpu, clock, flops, commit in (
        ("gpt2", "a CPU", 1965, {"float16": 8e14}, "a1"),
        ("resnet50", "a CPU", 1830, {"float16": 7e14, "bfloat16": 9e14}, "b2"),
        ("vit_b_16", "another CPU", 1965, {"float16": 8e14}, "a1"),
    ):
        name = found.add_environment(
            {
                "cpu": cpu,
                "clocks": {"driver": "580.1", "sm_mhz": clock},
                "rates": {"bytes_per_s": 4e12, "flops_per_s": flops},
                "commit": commit,
            }
        )
        metrics = {"device_ms": {"median": 1.0, "p5": 1.0, "p95": 1.0}, "work": {"flops": 8e11, "bytes": 1e9}}
        found.add({**row("rtx", model, metrics=metrics), "environment": name})
    found.save(tmp_path / "a.json")
    text = report.page(results.load(tmp_path / "a.json"))
    assert [line for line in text.splitlines() if line.startswith("Measured with")] == [
        "Measured with a CPU, driver 580.1, 1830–1965 MHz, measured 4000 GB/s, 700–800 TFLOP/s in float16, 900 TFLOP/s "
        "in bfloat16, commit a1 and b2.",
        "Measured with another CPU, driver 580.1, 1965 MHz, measured 4000 GB/s, 800 TFLOP/s in float16, commit a1.",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (5, "5"), (0.01234, "0.0123"), (1.0, "1.00"), (123.4, "123"), (9999.9, "10000")]
)
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


def plotted(files: list[str], folder: Path) -> list[Path]:
    """The plots of result files, in a new folder; the tables are beside it."""
    assert main(["report", *files, "--out", str(folder.with_suffix(".md")), "--plots", str(folder)]) == 0
    return sorted(folder.iterdir())


def test_plots(tmp_path: Path) -> None:
    """Of each kind of section; the same results are the same bytes."""
    pytest.importorskip("matplotlib")
    files = [str(CHECKED_IN / name) for name in ("h200_latency_large.json", "h200_sweep.json")]
    once, again = (plotted(files, tmp_path / name) for name in ("once", "again"))
    assert {path.suffix for path in once} == {".svg", ".png"}
    assert any("latency-nvidia-h200" in path.name for path in once)
    for one, other in zip(once, again, strict=True):
        assert one.suffix == ".png" or one.read_bytes() == other.read_bytes()


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "--out", str(tmp_path / "page.md"), "--plots", str(tmp_path)]) == 2
    assert "plots need matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "page.md").exists()


def test_structure() -> None:
    """The limits of the library hold here, too."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert path.read_text().count("\n") <= MAX_FILE, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{path}: {node.name}"


def test_starting_is_light() -> None:
    """The process that starts the workers, and kills them, loads no torch."""
    code = "import sys, benchmarks.__main__; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
