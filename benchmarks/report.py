"""Result files as Markdown: the same rows always give the same text, and no figure is written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks import pipelines
from benchmarks.cases import FURTHER_WORKLOADS, PIPELINES, TRAINED, WORKLOADS
from benchmarks.peers import PEERS
from benchmarks.quantized import QUANTIZED, beside
from benchmarks.results import Results, Row, headline, metric
from benchmarks.suites import SUITES, Suite
from benchmarks.sweep_table import SWEEP

Cell = Callable[[Row, dict[str, Any]], str]
DASH = "–"
NO_COMPILER = ("eager", "aot_eager")

SHORT = """\
# Performance

The table says how many times faster a call is with torch_rtx than with the fastest other compiler{against}.
`reduce-overhead` and `max-autotune` are modes of `torch.compile`. Calls follow each other without waits in between;
both sides take turns in one process, on {devices}. A workload is a model, its batch size (`b`), the length of its text
(`l`) and its dtype.

![Times faster, by workload](performance.svg)

{table}
## Models from outside

Models of timm, torchvision, transformers and diffusers, and a few that are written here. `benchmarks/sweep_table.py`
lists {listed}, each before it ran. So far {ran} ran beside another compiler, and each of these is in the table.

{means}
![Times faster, by model from outside](performance-outside.svg)

{outside}
[How this was measured, and everything else that was](performance-details.md): all compilers, cold starts, memory,
training, quantized models. `torch-rtx bench` measures your model on your GPU; in a clone, `python -m benchmarks run`
and `python -m benchmarks sweep` measure these.
"""
HEAD = """\
# Performance, in detail

`python -m benchmarks report --docs docs` generates this page, [the page before it](performance.md) and its plot from
`benchmarks/results/`. A test checks that they are up to date. To measure in a clone, run `python -m benchmarks run
--suite S,.. --models M,.. --peers P,.. --out results.json`. The command `python -m benchmarks list` names suites,
models and peers.

Weights are random and inputs change from call to call. The results of every peer are compared with a float64 run before
any peer is timed. Ratios are between peers that took turns in one process, round by round. Do not compare times of
different machines or sections.

- Times are medians, with the 5th and 95th percentile in parentheses.
- *device*: time per call in a row of calls without a wait between them, by device events. *wall*: time of one call
  alone, until its result is complete.
- *of floor*: time relative to a lower bound. The bound is the larger of two times: FLOPs over the measured rate of a
  large matrix product, and compulsory bytes (weights, inputs, outputs, once) over the measured rate of a large copy.
- *of best*: time, host time or memory relative to the best peer of the same process that is not torch_rtx.

A training step is forward, backward and AdamW. It has no dropout, so that gradients can be compared. Gradients of a
wider dtype (float32 on a GPU) are the reference. Models of `transformers` compute their loss themselves, from labels.
The UNet is trained by LoRA of its attention projections, with the rest in bfloat16. Llama's layers are checkpointed.

- *host*: time until a step is queued, on a device that was idle before.
- *peak*: memory that PyTorch's allocator takes from the device for a step, with weights and optimizer, if it keeps
  nothing from earlier steps. Memory pools of CUDA graphs count as a whole, because nothing else can use the free memory
  in them.
- *allocated*: PyTorch's `max_memory_allocated` for the same step, which does not count that free memory.
- *first step*: time from `torch.compile` to the end of the first step (in suite `train`, to the end of its backward),
  with caches that are empty or that an earlier process has filled. In `train`, Inductor's modes run in one process and
  share compiled code.

Quantized models are measured one peer after the other, beside the same model in half precision (`half`). `fp8`, `int8`
and `int4` are models that `torch_rtx.quantize` makes, all run by `rtx-merged`. A name with a hyphen is the same format
by torchao's `quantize_`, compiled by torch_rtx or by Inductor with `max-autotune`, or run as library calls.

- *times*: how many times faster than `half`, and than the same format by other peers.
- *of bandwidth*: the time to read codes and scales of all layers at the measured rate of a large copy, as a share of
  the time of the call.
- *error* is the error against the unquantized model in float64. *distance* is the distance from the quantized model's
  own eager result. Each is at most 1.5 times the error of this eager result.

| peer | what it is |
| --- | --- |
| inductor, reduce-overhead, max-autotune | `torch.compile` with Inductor, by mode |
| aoti | AOTInductor |
| rtx, rtx-exported | torch_rtx by library calls alone: `torch.compile`, an engine file |
| rtx-lazy, rtx-exported-lazy | the default, after specialization: `torch.compile`, an engine file |
| rtx-merged | rtx-lazy with `copy_weights=True`: layers over one input are one, 4-bit weights are packed for kernels |
| rtx-kernels | an engine file with kernels for this GPU, not specialized |
| rtx-generated, rtx-split, rtx-library | the same with one kind of tactics: kernels, split kernels, library calls |
"""
WAYS = {"`torch.compile`": False, "engine file": True}  # whether the engine was built ahead of time


def number(value: float) -> str:
    """Three significant digits, and no exponent; counts as they are."""
    if isinstance(value, int) or value == 0:
        return str(int(value))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def spread(value: Any) -> str:
    """A summary of many values, or a single one."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return number(value)
    if "p5" not in value:
        return number(value["median"])
    return f"{number(value['median'])} ({number(value['p5'])}{DASH}{number(value['p95'])})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty in every row; numbers to the right."""
    rows = [list(row) for row in rows]
    kept = [i for i, name in enumerate(header) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], ["---" if i < 2 else "--:" for i in kept]]
    lines += [[row[i] or DASH for i in kept] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Columns ------------------------------------------------------------------------------------------------------------


def _of(name: str, factor: float = 1) -> Cell:
    """A metric, times a factor; lists and absent ones are left out."""

    def cell(row: Row, environment: dict[str, Any]) -> str:
        value = metric(row, name)
        return spread(value * factor if isinstance(value, int | float) else value)

    return cell


def _of_floor(row: Row, environment: dict[str, Any]) -> str:
    floor, found = floor_ms(row, environment), metric(row, "device_ms") or metric(row, "wall_ms")
    return number(found["median"] / floor) if floor and found else ""


def _settled(row: Row, environment: dict[str, Any]) -> str:
    """Seconds until nothing was left to do in the background, or as many that did not suffice."""
    seconds = metric(row, "settle_s")
    return "" if seconds is None else f"{'' if metric(row, 'settled') else 'more than '}{number(seconds)}"


def _swapped(row: Row, environment: dict[str, Any]) -> str:
    """Seconds by which a result is later after a swap, or that did not suffice for any."""
    stopped = metric(row, "early_stopped_s")
    seconds = metric(row, "lora.swap_s")
    return f"more than {number(stopped)}" if stopped and seconds is None else spread(seconds)


def _ops(name: str) -> Cell:
    """Operators of an engine by number."""

    def cell(row: Row, environment: dict[str, Any]) -> str:
        return operators(metric(row, name) or {})

    return cell


def operators(found: dict[str, int]) -> str:
    """Operators with their numbers in words, such as `3 topk`."""
    short = (op.removeprefix("aten.").removesuffix(".default") for op in found)
    return ", ".join(f"{count} {op}" for op, count in zip(short, found.values(), strict=True))


def _of_bandwidth(row: Row, environment: dict[str, Any]) -> str:
    packed, found = metric(row, "packed_bytes"), metric(row, "device_ms")
    rate = environment.get("rates", {}).get("bytes_per_s")
    return f"{packed / rate / (found['median'] / 1e3):.0%}" if packed and found and rate else ""


def floor_ms(row: Row, environment: dict[str, Any]) -> float | None:
    """The least milliseconds that the row's work takes on its device; None where either is unknown."""
    work, rates = metric(row, "work"), environment.get("rates", {})
    flops_per_s = rates.get("flops_per_s", {}).get(row["dtype"])
    if not work or not flops_per_s:
        return None
    return 1e3 * max(work["flops"] / flops_per_s, work["bytes"] / rates["bytes_per_s"])


MIB = 2**-20
_TIMES: list[tuple[str, Cell]] = [("device ms", _of("device_ms")), ("wall ms", _of("wall_ms"))]
_RATIO: tuple[str, Cell] = ("of best", _of("ratio"))
_CONTENTS: list[tuple[str, Cell]] = [
    ("kernels", _of("kernels")),
    ("layout copies", _of("layout_copies")),
    ("calls left", _ops("calls")),
    ("fallbacks", _ops("fallbacks")),
]
COLUMNS: dict[str, list[tuple[str, Cell]]] = {
    "latency": [*_TIMES, ("of floor", _of_floor), _RATIO],
    "cold": [
        (f"{phase}: {title}", _of(f"{phase}.{name}"))
        for phase in ("cold", "warm")
        for title, name in (("import s", "import_s"), ("first result s", "first_s"), ("full speed s", "full_speed_s"))
    ],
    "shapes": [
        ("first call s", _of("first_s")),
        ("worst later call ms", _of("worst_ms")),
        ("settled ms", _of("settled_ms")),
        ("all calls s", _of("total_s")),
    ],
    "build": [
        ("s", _of("build_s")),
        ("first s", _of("first_s")),
        ("file MiB", _of("file_bytes", MIB)),
        ("weights MiB", _of("weight_bytes", MIB)),
        ("library calls", _of("extern_nodes")),
        ("kernels", _of("kernel_nodes")),
    ],
    "refit": [
        ("refit ms", _of("refit_ms")),
        ("next call ms", _of("next_ms")),
        ("later calls ms", _of("call_ms")),
        ("weights MiB", _of("weight_bytes", MIB)),
    ],
    "memory": [
        ("weights MiB", _of("weight_bytes", MIB)),
        ("peak, preparing MiB", _of("prepare_peak_bytes", MIB)),
        ("peak, running MiB", _of("run_peak_bytes", MIB)),
        ("outside PyTorch MiB", _of("outside_bytes", MIB)),
        ("process, peak MiB", _of("process_peak_bytes", MIB)),
    ],
    "train": [
        *_TIMES,
        _RATIO,
        ("host ms", _of("host_ms")),
        ("of best", _of("host_ratio")),
        ("peak MiB", _of("peak_bytes", MIB)),
        ("of best", _of("peak_ratio")),
        ("allocated MiB", _of("allocated_peak_bytes", MIB)),
        ("first step s", _of("first_s")),
    ],
    "first_step": [
        (f"{phase}: {title}", _of(f"{phase}.{name}"))
        for phase in ("cold", "warm")
        for title, name in (("import s", "import_s"), ("first step s", "first_s"))
    ],
    "tiers": [*_TIMES, ("of specialized", _of("ratio"))],
    "host": [
        ("host us", _of("host_us")),
        ("bare replay us", _of("bare_replay_us")),
        ("over it us", _of("over_replay_us")),
        _RATIO,
    ],
    "sweep": [
        *_TIMES,
        _RATIO,
        ("settled after s", _of("settle_s")),
        ("peak until then MiB", _of("prepare_peak_bytes", MIB)),
        ("weights MiB", _of("weight_bytes", MIB)),
        *_CONTENTS,
    ],
    "quantized": [
        *_TIMES,
        ("times half", _of("times_half")),
        ("times inductor", _of("times_inductor")),
        ("times eager", _of("times_eager")),
        ("packed MiB", _of("packed_bytes", MIB)),
        ("of bandwidth", _of_bandwidth),
        ("error", _of("error")),
        ("eager's error", _of("quantization_error")),
        ("distance", _of("distance")),
        ("prepared in s", _of("prepare_s")),
    ],
    "pipelines": [
        ("result s", _of("result_s")),
        ("times best", _of("times_best")),
        ("cold: first result s", _of("cold.first_s")),
        ("of best", _of("cold_of_best")),
        ("warm: first result s", _of("warm.first_s")),
        ("of best", _of("warm_of_best")),
        ("next s", _of("warm.next_s")),
        ("settled after s", _settled),
        ("tokens per s", _of("tokens_per_s")),
        ("of its steps", _of("of_bare")),
        ("sampled", _of("sampled_tokens_per_s")),
        ("LoRA swap s", _swapped),
        ("in memory s", _of("lora.set_s")),
        ("graphs for it", _of("lora.graphs")),
        ("results after it", _of("lora.later")),
        ("same again", lambda row, _: {True: "yes", False: "no"}.get(metric(row, "lora.same_again"), "")),
    ],
    "counts": [*_CONTENTS, ("s", _of("lower_s"))],
    "backend": [("s", _of("backend_s")), _RATIO],
    "hash": [("nodes", _of("nodes")), ("ms", _of("hash_ms")), _RATIO],
}

# Sections -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """The rows of one suite on one device at one size, in the order of workloads and peers."""

    suite: Suite
    device: str
    size: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> list[Row]:
        """Those that were measured."""
        return [row for row in self.rows if row["status"] == "ok"]


def sections(results: Results) -> list[Section]:
    """Suites in their order, then devices and sizes; in each, models and peers in theirs."""
    own = [peer for suite in SUITES.values() for peer in suite.peers if peer not in PEERS]
    models = [w.model for w in (*WORKLOADS, *TRAINED, *FURTHER_WORKLOADS, *QUANTIZED)] + [*PIPELINES]
    orders = {"suite": list(SUITES), "model": models, "peer": [*own, *PEERS]}

    def index(row: Row, name: str) -> tuple[int, str]:
        known, value = orders[name], row[name]
        return (known.index(value) if value in known else len(known)), value

    def place(row: Row) -> tuple[Any, ...]:
        shape = (row["batch"], row["length"] or 0, row["dtype"])
        suite = (*index(row, "suite"), row["device"], row["size"])
        return *suite, *index(row, "model"), *shape, *index(row, "peer")

    found = []
    rows = sorted(results.rows.values(), key=place)
    for (_, name, device, size), group in groupby(rows, key=lambda row: place(row)[:4]):
        suite = SUITES.get(name) or Suite(name, name, ())
        found.append(Section(suite, device, size, tuple(group)))
    return found


def shape(row: Row) -> str:
    """The workload of a row in words."""
    parts = [row["model"], f"b{row['batch']}", f"l{row['length']}" if row["length"] else ""]
    return "-".join(filter(None, parts)) + f" {row['dtype']}"


def ratios(rows: Iterable[Row]) -> dict[str, list[float]]:
    """The ratios to the best other peer, or what else a suite compares with, by peer; of that itself it is 1."""
    found: dict[str, list[float]] = {}
    for row in rows:
        ratio = metric(row, "ratio")
        if ratio is not None:
            found.setdefault(row["peer"], []).append(ratio["median"])
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _overview(section: Section, environments: dict[str, dict[str, Any]]) -> str:
    """One line per workload with the headline of each peer, the fastest in bold."""
    names = list(dict.fromkeys(row["peer"] for row in section.ok))
    lines = []
    for workload, group in groupby(section.ok, key=shape):
        rows = {row["peer"]: row for row in group}
        values = {peer: headline(row, section.suite.headline) for peer, row in rows.items()}
        best = min((value for _, value in filter(None, values.values())), default=None)
        cells = []
        for name in names:
            found = values.get(name)
            text = number(found[1]) if found else ""
            cells.append(f"**{text}**" if found and found[1] == best else text)
        floors = [floor_ms(row, environments[row["environment"]]) for row in rows.values()]
        floor = next((floor for floor in floors if floor is not None), None)
        lines.append([workload, "" if floor is None else number(floor), *cells])
    return table(["workload", "floor", *names], lines)


@dataclass(frozen=True)
class Speedup:
    """A workload on a GPU: the fastest other compiler in the same process, the milliseconds of our fastest peer, and
    how many times faster each of `WAYS` is."""

    workload: str
    device: str
    against: str
    ms: float
    times: dict[str, float]


def speedups(results: Results, suite: str = "latency") -> list[Speedup]:
    """Of all workloads of a suite that ran beside another compiler."""
    chosen = [section for section in sections(results) if section.suite.name == suite and section.size == "full"]
    rows = [row for section in chosen for row in section.ok if metric(row, "device_ms") and metric(row, "ratio")]
    found = []
    for workload, group in groupby(rows, key=shape):
        ours = [row for row in group if PEERS[row["peer"]].ours and metric(row, "ratio")["against"] not in NO_COMPILER]
        if ours:
            fastest = min(ours, key=lambda row: float(metric(row, "device_ms")["median"]))
            times = {}
            for way, exported in WAYS.items():
                if ratio := ratios(row for row in ours if PEERS[row["peer"]].exported == exported):
                    times[way] = 1 / min(map(min, ratio.values()))
            against, ms = metric(fastest, "ratio")["against"], float(metric(fastest, "device_ms")["median"])
            found.append(Speedup(workload, fastest["device"], against, ms, times))
    return found


def speedup_table(found: Sequence[Speedup]) -> str:
    """The same as a table, which names the other compilers where there are several."""
    several = len({one.against for one in found}) > 1
    lines = [
        [
            one.workload,
            *[one.against] * several,
            number(one.ms),
            *(f"{one.times[way]:.2f}x" if way in one.times else "" for way in WAYS),
        ]
        for one in found
    ]
    return table(["workload", *["compared with"] * several, "torch_rtx, device ms", *WAYS], lines)


def speedup_means(found: Sequence[Speedup]) -> str:
    """How many times faster each way is, in short."""
    lines = []
    for way in WAYS:
        times = [one.times[way] for one in found if way in one.times]
        if times:
            mean = geometric_mean(times)
            lines.append(f"- {way}: {mean:.2f}x in the geometric mean of {len(times)}, {min(times):.2f}x at least\n")
    return "".join(lines)


def _means(section: Section) -> str:
    found = ratios(section.ok)
    lines = [
        [peer, str(len(values)), number(geometric_mean(values)), f"{number(min(values))}{DASH}{number(max(values))}"]
        for peer, values in found.items()
    ]
    return table(["peer", "workloads", "geometric mean of the ratios", "range"], lines) if lines else ""


def _not_measured(section: Section) -> str:
    """What has no figures, by peer and reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in section.rows:
        if row["status"] != "ok":
            reasons.setdefault((row["status"], row["peer"], row["reason"]), []).append(shape(row))
    lines = []
    for (status, peer, reason), shapes in reasons.items():
        where = "" if status == "unavailable" else f" ({', '.join(shapes)})"
        lines.append(f"- {peer}{where}: {status}: {reason}\n")
    return "".join(lines)


def _described(environments: Iterable[dict[str, Any]]) -> str:
    """Environments, a line for all that differ in measured rates, clocks and commits alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for environment in environments:
        groups.setdefault(_fixed(environment), []).append(environment)
    lines = []
    for fixed, group in sorted(groups.items()):
        clocks = [int(one["clocks"]["sm_mhz"]) for one in group if one.get("clocks")]
        rates = [one["rates"] for one in group if one.get("rates")]
        parts = [fixed, f"{_range(clocks)} MHz" if clocks else ""]
        if rates:
            parts.append(f"measured {_range([one['bytes_per_s'] / 1e9 for one in rates])} GB/s")
            for dtype in dict.fromkeys(dtype for one in rates for dtype in one["flops_per_s"]):
                flops = [one["flops_per_s"][dtype] / 1e12 for one in rates if dtype in one["flops_per_s"]]
                parts.append(f"{_range(flops)} TFLOP/s in {dtype}")
        commits = sorted({one["commit"] for one in group if one.get("commit")})
        parts.append(f"commit {' and '.join(commits)}" if commits else "")
        parts += dict.fromkeys(one.get("note", "") for one in group)
        lines.append(f"Measured with {', '.join(filter(None, parts))}.\n")
    return "".join(lines)


def _fixed(environment: dict[str, Any]) -> str:
    """What an environment is made of."""
    packages, clocks = environment.get("packages", {}), environment.get("clocks", {})
    parts = [environment.get("cpu"), f"{environment['threads']} threads" if "threads" in environment else None]
    parts += [f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if name in packages]
    parts.append(f"CUDA {environment['cuda']}" if environment.get("cuda") else None)
    parts.append(f"driver {clocks['driver']}" if clocks else None)
    return ", ".join(filter(None, parts))


def _range(values: Sequence[float]) -> str:
    """A number, or from the smallest to the largest."""
    return DASH.join(dict.fromkeys(map(number, (min(values), max(values)))))


def columns(section: Section, environments: dict[str, dict[str, Any]]) -> str:
    """The table of a section: a line for every row."""
    shown = COLUMNS[section.suite.name]
    rows = section.ok
    side_by_side = {"quantized": beside, "pipelines": pipelines.beside}.get(section.suite.name)
    if side_by_side:
        rows = [row for _, group in groupby(rows, key=shape) for row in side_by_side(list(group))]
    lines = [
        [shape(row), row["peer"], *(cell(row, environments.get(row["environment"], {})) for _, cell in shown)]
        for row in rows
    ]
    return table(["workload", "peer", *(title for title, _ in shown)], lines)


def sweep_summary(section: Section) -> str:
    """What models from outside have in common: how much faster they are, which are slower, and what is left of them."""
    lines = []
    ours = [row for row in section.ok if PEERS[row["peer"]].ours]
    for peer in dict.fromkeys(row["peer"] for row in ours):
        rows = [row for row in ours if row["peer"] == peer]
        beside = [row for row in rows if metric(row, "ratio") and metric(row, "ratio")["against"] not in NO_COMPILER]
        faster = {row["model"]: 1 / metric(row, "ratio")["median"] for row in beside}
        if faster:
            slower = sorted((times, model) for model, times in faster.items() if times < 1)
            named = ", ".join(f"{model} {times:.2f}x" for times, model in slower) or "none"
            mean = geometric_mean(list(faster.values()))
            lines.append(f"{peer}: {mean:.2f}x the best other compiler in the geometric mean of {len(faster)} models")
            lines.append(f"{peer}: below 1.0x: {named}")
        seconds = sorted(found for row in rows if (found := metric(row, "settle_s")) is not None)
        if seconds:
            middle, most = number(seconds[len(seconds) // 2]), number(seconds[-1])
            lines.append(f"{peer}: at full speed after {middle} s in the median, {most} s at most")
        looked = [row for row in rows if metric(row, "calls") is not None]
        for name, title in (("calls", "library calls"), ("fallbacks", "fallbacks")):
            having = [(row["model"], operators(metric(row, name))) for row in looked if metric(row, name)]
            if looked:
                lines.append(f"{peer}: {len(having)} of {len(looked)} models have {title} left")
                lines += [f"  - {model}: {found}" for model, found in having]
    return "".join(f"{line}\n" if line.startswith(" ") else f"- {line}\n" for line in lines)


def pipelines_summary(section: Section) -> str:
    """The peers of each workload side by side; of those that were stopped or failed, what they had until then."""
    text, shown = "", COLUMNS["pipelines"]
    for name, group in groupby((row for row in section.rows if row["metrics"]), key=shape):
        rows = pipelines.beside(list(group))
        lines = [[row["peer"], row["reason"] or "", *(cell(row, {}) for _, cell in shown)] for row in rows]
        what = pipelines.RESULTS[rows[0]["model"]] if section.size == "full" else "a tiny model"
        text += f"\n{name}: {what}\n\n" + table(["peer", "failed", *(title for title, _ in shown)], lines)
    return f"{section.device}\n{text}"


def section_text(section: Section, environments: dict[str, dict[str, Any]]) -> str:
    """A section as Markdown."""
    size = ", small models" if section.size == "small" else ""
    text = f"\n## {section.suite.name}: {section.suite.help}\n\n{section.device}{size}.\n"
    text += _described(environments[name] for name in sorted({row["environment"] for row in section.rows}))
    if section.suite.name == "latency" and section.ok:
        text += "\n" + _overview(section, environments)
    if section.ok and section.suite.name in COLUMNS:
        text += "\n" + columns(section, environments)
    if section.suite.name in ("sweep", "counts"):
        text += "\n" + sweep_summary(section)
    for part in (_means(section), _not_measured(section)):
        text += f"\n{part}" if part else ""
    return text


def page(results: Results) -> str:
    """The page of all details."""
    return HEAD + "".join(section_text(section, results.environments) for section in sections(results))


def short_page(found: Sequence[Speedup], outside: Sequence[Speedup] = ()) -> str:
    """The page that has what most ask for: a plot and a table, of our own workloads and of models from outside."""
    devices = " and ".join(dict.fromkeys(one.device for one in found))
    others = {one.against for one in found}
    against = f", which is `{others.pop()}` for all of them" if len(others) == 1 else ""
    tables = {"table": speedup_table(found), "outside": speedup_table(outside), "means": speedup_means(outside)}
    return SHORT.format(devices=devices, against=against, listed=len(SWEEP), ran=len(outside), **tables)
