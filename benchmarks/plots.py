"""Plots of result files: one per suite, device and size, as SVG and PNG. Needs matplotlib."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.report import Section, ratios, sections, shape
from benchmarks.results import Results, ResultsError, headline


class NoPlots(ResultsError):
    """Plots were asked for and matplotlib is missing."""


def write(results: Results, folder: Path) -> list[Path]:
    """Draw every section that has figures; the files, two each.

    Raises:
        NoPlots: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NoPlots("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "torch_rtx"  # the same results give the same file
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections(results):
        if any(headline(row, section.suite.headline) for row in section.ok):
            name = re.sub(r"\W+", "-", f"{section.suite.name}-{section.device}-{section.size}").strip("-").lower()
            draw = _draw_speedups if section.suite.name == "sweep" else _draw
            written += draw(section, folder / name)
    return written


def _draw(section: Section, base: Path) -> list[Path]:
    """Bars of the headline metric by workload, one colour per peer, on a logarithmic axis."""
    from matplotlib.figure import Figure

    found = {(shape(row), row["peer"]): headline(row, section.suite.headline) for row in section.ok}
    values = {place: pair[1] for place, pair in found.items() if pair is not None}
    workloads = list(dict.fromkeys(workload for workload, _ in values))
    peers = list(dict.fromkeys(peer for _, peer in values))
    figure = Figure(figsize=(max(6, 1.5 + 1.1 * len(workloads)), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        heights = [values.get((workload, peer), float("nan")) for workload in workloads]
        places = [i + (index - (len(peers) - 1) / 2) * width for i in range(len(workloads))]
        axes.bar(places, heights, width, label=peer)
    axes.set_yscale("log")
    axes.set_xticks(range(len(workloads)), workloads, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(", ".join(dict.fromkeys(pair[0] for pair in found.values() if pair is not None)))
    axes.set_title(f"{section.suite.name}, {section.device}", fontsize=10)
    axes.legend(fontsize=8)
    return _save(figure, base)


def _draw_speedups(section: Section, base: Path) -> list[Path]:
    """For many models: how many times faster than the best other peer, by model in order, a line per way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    for peer, found in ratios(row for row in section.ok if PEERS[row["peer"]].ours).items():
        axes.plot(range(1, len(found) + 1), sorted(1 / value for value in found), marker=".", label=peer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("models, from the slowest to the fastest")
    axes.set_ylabel("times faster than the best other peer")
    axes.set_title(f"{section.suite.name}, {section.device}", fontsize=10)
    axes.legend(fontsize=8)
    return _save(figure, base)


def _save(figure: Any, base: Path) -> list[Path]:
    paths = [base.with_suffix(suffix) for suffix in (".svg", ".png")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
