"""`profile`: measures the time of a call node by node, in terms of the user's modules.

Watching one call finds the sessions that it runs. Each is then measured alone: probed code marks the time after every
node, and several runs yield a median per node. The whole call is measured without marks, so that a profile also shows
the time outside of nodes: launches, copies at the border, the signature, and Python around sessions.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch

from torch_rtx.errors import RtxError, SettingsError
from torch_rtx.files import write_file
from torch_rtx.ir import Node
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.clocks import Clock, clock_of, overhead
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.driver import checked, driver
from torch_rtx.runtime.inline import in_place, launched
from torch_rtx.runtime.node_cost import cost, is_view, operator, steps
from torch_rtx.runtime.profile_page import brief, digits, page
from torch_rtx.runtime.profile_row import Row
from torch_rtx.runtime.session import Session, watched_calls
from torch_rtx.runtime.tuning_db import triton_version
from torch_rtx.settings import CALLS
from torch_rtx.version import __version__

SHOWN = 30  # rows of a printed profile
WIDTH = 44  # characters of the column of operations


@dataclass(frozen=True)
class ModuleTime:
    """The nodes of one module and its submodules: their number, the sum of their medians in microseconds, its share."""

    module: str
    nodes: int
    us: float
    share: float


@dataclass(frozen=True)
class ModuleTable:
    """Times by module, longest first; `print` it."""

    rows: tuple[ModuleTime, ...]

    def __str__(self) -> str:
        cells = [(f"{r.us:.1f}", f"{r.share:.1%}", str(r.nodes), r.module or "(the model itself)") for r in self.rows]
        return "\n".join(_columns(("us", "share", "nodes", "module"), cells, left=1))


@dataclass(frozen=True)
class Profile:
    """The times of a call; `print` it.

    Attributes:
        rows: the nodes in the order of execution, of all graphs of the call.
        device: the name of the device.
        call_us: the whole call, median in microseconds; on a GPU from the end of one call to the end of the next,
            without waiting for results in between.
        plain_us: the code of the graphs alone, without CUDA graphs, measured alike.
        cuda_graph: the call runs as CUDA graphs entirely.
        about: names and values of what was measured: the model, versions, the day.
    """

    rows: tuple[Row, ...]
    device: str
    call_us: float
    plain_us: float
    cuda_graph: bool
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def us(self) -> float:
        """The sum of all rows' medians, in microseconds."""
        return sum(row.us for row in self.rows)

    def by_module(self, depth: int = 2) -> ModuleTable:
        """The times by module; submodules deeper than `depth` names count for the module at that depth."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(".".join(row.module.split(".")[:depth]), []).append(row)
        times = [
            ModuleTime(name, len(rows), sum(row.us for row in rows), sum(row.share for row in rows))
            for name, rows in found.items()
        ]
        return ModuleTable(tuple(sorted(times, key=lambda time: -time.us)))

    def table(self, limit: int | None = SHOWN) -> str:
        """The totals and the `limit` longest rows as text; None: all rows."""
        rows = sorted(self.rows, key=lambda row: -row.us)
        shown = rows[:limit]
        head = ("us", "p95", "share", "GB/s", "TFLOP/s", "operations", "runs as", "where")
        lines = _columns(head, [_cells(row) for row in shown], left=3)
        if len(rows) > len(shown):
            rest = sum(row.us for row in rows[len(shown) :])
            lines.append(f"and {len(rows) - len(shown)} more, {rest:.1f} us together")
        return "\n".join([*lines, "", *self.totals()])

    def _sums(self) -> tuple[tuple[str, float], ...]:
        """Names and microseconds of what was measured as a whole: all rows, the code without marks, the call."""
        runs = len(self.rows[0].times) if self.rows else 0
        return (
            (f"{len(self.rows)} nodes, medians of {runs} runs", self.us),
            ("unprofiled code, without CUDA graphs", self.plain_us),
            (f"whole call{', as CUDA graphs' * self.cuda_graph}", self.call_us),
        )

    def totals(self) -> Iterator[str]:
        """The last lines of the table: the sum of the rows beside the times of whole calls."""
        (nodes, us), *others = self._sums()
        yield f"{nodes} on {self.device}: {us:.1f} us"
        for name, other in others:
            yield f"{name}: {other:.1f} us, {abs(other - us):.1f} us {'more' if other >= us else 'less'} than the nodes"

    def __str__(self) -> str:
        return self.table()

    @cached_property
    def run(self) -> int:
        """The run that a trace shows: the one whose sum is the median of all."""
        sums = [sum(times) for times in zip(*(row.times for row in self.rows), strict=True)]
        return sorted(range(len(sums)), key=lambda run: sums[run])[(len(sums) - 1) // 2] if sums else 0

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write one run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: nodes one after
        another, nested in their modules."""
        write_file(path, json.dumps({"traceEvents": list(self._events()), "displayTimeUnit": "ns"}, indent=0))

    def _events(self) -> Iterator[dict[str, Any]]:
        process = {"ph": "M", "pid": 1, "tid": 1}
        yield {**process, "name": "process_name", "args": {"name": "torch_rtx"}}
        yield {**process, "name": "thread_name", "args": {"name": self.device}}
        marks = [0]  # integers, in ns: a rounding error would break the nesting
        for row in self.rows:
            marks.append(marks[-1] + round(1000 * row.times[self.run]))
        for name, start, end, above in _nested([row.module.split(".") for row in self.rows]):
            yield _event(name, "module", marks[start], marks[end], {"module": ".".join((*above, name))})
        for index, row in enumerate(self.rows):
            about = {"node": row.name, "tier": row.tier, "tactic": row.tactic, "where": row.where}
            yield _event(_title(row), row.kind, marks[index], marks[index + 1], {**about, "operations": row.what})

    def html(self, path: str | os.PathLike[str], model: str | None = None) -> None:
        """Write a self-contained HTML page: the graph, coloured by time, and a table of its nodes.

        Args:
            path: of the page.
            model: the name of the model that the page shows; None: that of its class.
        """
        named = {} if model is None else {"model": model}
        facts = {**self.about, **named, "device": self.device}
        write_file(path, page(self.rows, facts, self._sums()))


def profile(model: Callable[..., Any], *args: Any, repeats: int = 20, warmup: int = 3, **kwargs: Any) -> Profile:
    """Measure one call, node by node.

    The call is made some `3 * (warmup + repeats)` times, as a whole and in parts: what it changes (caches, running
    statistics) changes each time. Nothing else should keep the device busy meanwhile.

    Args:
        model: a `CompiledModule`, what `torch.compile(backend="rtx")` returned, a `Session`, or any function that calls
            such; args and kwargs are those of one call.
        repeats: runs that are measured; their medians count.
        warmup: runs before, at least 2 where CUDA graphs are used: the second call captures, the third replays.

    Raises:
        RtxError: no engine ran in the call.
        SettingsError: no runs are asked for.
        InputError, ...: what the call itself raises.
    """
    if repeats < 1 or warmup < 0:
        raise SettingsError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    with watched_calls() as calls:
        model(*args, **kwargs)
    if not calls:
        hint = 'pass what torch_rtx.compile, load or torch.compile(backend="rtx") returned; see torch_rtx.explain'
        raise RtxError(f"no engine ran in this call of a {type(model).__name__}", hint=hint)
    device = calls[0][0].device
    whole = clock_of(device, queued=False)
    call_us = _per_call(whole, partial(model, *args, **kwargs), repeats, warmup)
    codes = [session.current(inputs).code for session, inputs in calls]  # a background job may swap it
    runs = [partial(s.run, code, inputs, s.store.values) for (s, inputs), code in zip(calls, codes, strict=True)]
    plain_us = sum(_per_call(whole, run, repeats, warmup) for run in runs)
    found = [_measure(*call, code, repeats, warmup) for call, code in zip(calls, codes, strict=True)]
    total = sum(median(times) for measured in found for times in measured)
    rows: list[Row] = []
    for measured, (session, inputs), code in zip(found, calls, codes, strict=True):
        rows += _rows(bind_sizes(session.graph, inputs), code, measured, total, len(rows))
    pools = [session.pool for session, _ in calls]
    captured = all(pool is not None and pool.disabled is None for pool in pools)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Profile(tuple(rows), name, call_us, plain_us, captured, dict(_about(model, device)))


def _about(model: Callable[..., Any], device: torch.device) -> Iterator[tuple[str, str]]:
    called = getattr(model, "_orig_mod", model)  # of torch.compile
    yield "model", getattr(called, "__qualname__", type(called).__name__)
    yield "versions", ", ".join(f"{name} {version}" for name, version in _versions(device))
    yield "measured", time.strftime("%Y-%m-%d %H:%M")


def _versions(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "torch_rtx", __version__
    yield "torch", torch.__version__
    if (triton := triton_version()) is not None:
        yield "triton", triton
    if device.type == "cuda" and (cuda := driver()) is not None:
        version = checked(cuda.cuDriverGetVersion())
        yield "driver for CUDA", f"{version // 1000}.{version % 1000 // 10}"


def _per_call(clock: Clock, call: Callable[[], Any], repeats: int, warmup: int) -> float:
    """The median of the time from the end of one call to the end of the next, in microseconds."""
    for _ in range(warmup):
        call()
    clock()
    for _ in range(repeats):
        call()
        clock()
    return median(clock.read())


def _measure(session: Session, inputs: Sequence[Any], code: Code, repeats: int, warmup: int) -> list[tuple[float, ...]]:
    """Per node that runs, the microseconds of each run, minus the overhead of a mark."""
    clock = clock_of(session.device, queued=True)
    idle = overhead(clock)
    probed = session.probed(code, clock)
    runs = []
    for _ in range(warmup + repeats):
        session.run(probed, inputs, session.store.values)
        runs.append([max(0.0, us - idle) for us in clock.read()])
    return list(zip(*runs[warmup:], strict=True))


def _nodes(code: Code) -> Iterator[tuple[Node, str]]:
    """The nodes that run, each with the kind of its tactic, see `Row.tactic`."""
    for node, inlined in zip(code.graph.nodes, in_place(code.graph, code.tactics), strict=True):
        tactic = code.tactics.get(node.op)
        kind = "" if node.kind != "kernel" else CALLS if tactic is None else tactic.kind
        yield from ((inner, kind) for inner in inlined)


def _rows(
    sizes: dict[str, int], code: Code, measured: Sequence[tuple[float, ...]], total: float, first: int
) -> Iterator[Row]:
    """The rows of one session for inputs of these sizes, numbered from `first`."""
    makers: dict[str, int] = {}
    kernels = launched(code.tactics)
    for index, ((node, tactic), times) in enumerate(zip(_nodes(code), measured, strict=True), first):
        launcher = kernels.get(node.op) if node.kind == "kernel" else None
        tier = "fallback" if node.kind == "fallback" else "library call"
        inside = list(steps(node))
        locs = dict.fromkeys(loc for loc in (node.loc, *(step.loc for step in inside)) if loc is not None)
        named = [value.name for value in node.outputs if value is not None]
        yield Row(
            named[0] if named else node.op,
            "view" if is_view(node) else "extern" if node.kind == "op" else node.kind,
            node.op,
            tier if launcher is None else f"kernel for {launcher.target}",
            tactic,
            tuple(operator(step.op) for step in inside),
            tuple(locs),
            times,
            median(times) / total if total else 0.0,
            cost(node, sizes),
            tuple(dict.fromkeys(makers[value.name] for value in node.inputs if value.name in makers)),
        )
        makers |= dict.fromkeys(named, index)


def _nested(paths: Sequence[Sequence[str]], above: tuple[str, ...] = (), first: int = 0) -> Iterator[Any]:
    """`(name, start, end, names above)` of each run of neighbouring rows in one module, outer modules first."""
    depth, start = len(above), 0
    while start < len(paths):
        name = paths[start][depth] if len(paths[start]) > depth else ""
        end = start + 1
        while end < len(paths) and (paths[end][depth] if len(paths[end]) > depth else "") == name:
            end += 1
        if name:
            yield name, first + start, first + end, above
            yield from _nested(paths[start:end], (*above, name), first + start)
        start = end


def _event(name: str, category: str, start: int, end: int, about: dict[str, str]) -> dict[str, Any]:
    spent = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {"name": name, "cat": category, "ph": "X", **spent, "pid": 1, "tid": 1, "args": about}


def _title(row: Row) -> str:
    """A short title of the row."""
    return row.op if row.kind == "kernel" else operator(row.op)


def _cells(row: Row) -> tuple[str, ...]:
    gbps, tflops = ("" if x is None else digits(x) for x in (row.gbps, row.tflops))
    times = f"{row.us:.1f}", f"{row.p95:.1f}", f"{row.share:.1%}"
    return *times, gbps, tflops, brief(row.what, WIDTH), row.runs_as, row.where


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of aligned cells; the last `left` columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    sides = [">"] * (len(head) - left) + ["<"] * left
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
