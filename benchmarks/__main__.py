"""The benchmarks from the command line. docs/architecture/checking.md says how they work.

    python -m benchmarks run --suite latency --models resnet50-b1,bert_base --out results.json
    python -m benchmarks report results.json more.json --plots plots
    python -m benchmarks report --docs docs       the pages of the documentation, from the results that are checked in
    python -m benchmarks sweep --out sweep.json       models from outside, one per GPU at a time, and their summary
    python -m benchmarks sweep --counts --out counts.json       what engines of them consist of; needs no GPU
    python -m benchmarks pipelines --models llama_1b --out pipelines.json       texts and images, as people make them
    python -m benchmarks list

Needs nothing but Python's own library until a worker starts, and matplotlib for plots alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from benchmarks import chart, report, results, runner, sweep
from benchmarks.cases import FURTHER_WORKLOADS, TRAINED, WORKLOADS, UsageError
from benchmarks.peers import PEERS
from benchmarks.quantized import QUANTIZED
from benchmarks.suites import SUITES

CHECKED_IN = Path(__file__).parent / "results"


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; what has a row in --out already is skipped")
    run.add_argument("--suite", type=_names, default=("latency",), help="comma-separated, see `list`")
    run.add_argument(
        "--per-gpu", type=int, help="cases at a time on each visible GPU; they take turns at measuring; default: one"
    )
    _measured(run, Path("results.json"), 150, "auto")
    swept = commands.add_parser("sweep", help="measure models from outside, and print a summary; resumes like `run`")
    swept.add_argument("--counts", action="store_true", help="fallbacks, calls and copies in engines; needs no GPU")
    swept.add_argument("--per-gpu", type=int, default=1, help="models at a time on a GPU; they take turns at measuring")
    swept.add_argument("--model-limit", type=float, default=math.inf, help="seconds that all peers of a model may take")
    swept.set_defaults(suite=("sweep",))
    _measured(swept, Path("sweep.json"), 400, "cuda")
    piped = commands.add_parser("pipelines", help="measure texts and images, and print them side by side; resumes")
    piped.add_argument("--cold", action="store_true", help="without a second process, which finds full caches")
    piped.set_defaults(suite=("pipelines",))
    _measured(piped, Path("pipelines.json"), 120, "auto")
    for command in (run, swept, piped):
        command.add_argument(
            "--settle", type=float, default=math.inf, help="seconds that a peer has to reach its full speed"
        )
    show = commands.add_parser("report", help="print tables as Markdown")
    show.add_argument("files", type=Path, nargs="*", help="result files; default: those that are checked in")
    show.add_argument("--out", type=Path, help="write the Markdown to a file instead")
    show.add_argument("--docs", type=Path, help="folder to write the pages and the plot of the documentation to")
    show.add_argument("--plots", type=Path, help="folder for plots, as SVG and PNG; needs matplotlib")
    commands.add_parser("list", help="the suites, peers and models")
    return top


def _measured(command: argparse.ArgumentParser, out: Path, limit_s: float, device: str) -> None:
    """The options of commands that measure."""
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default=device)
    command.add_argument(
        "--models", type=_names, default=(), help="models or single shapes of them, see `list`; default: the suite's"
    )
    command.add_argument("--peers", type=_names, default=(), help="default: as `list` says")
    command.add_argument("--out", type=Path, default=out, help="result file, which may exist")
    command.add_argument("--size", choices=("small", "full"), default="full", help="small: tiny models, for tests")
    command.add_argument("--rounds", type=int, help="how often the peers take turns; default: as the suite has it")
    command.add_argument("--limit", type=float, default=limit_s, help="seconds that one case may take")
    command.add_argument("--budget", type=float, default=math.inf, help="seconds that all may take")
    command.add_argument("--again", choices=("failed", "all"), default="", help="measure these again")
    command.add_argument("--plugin", action="append", default=[], help="a module that registers further peers")


def _run(options: argparse.Namespace) -> int:
    for plugin in options.plugin:
        import_module(plugin)
    plan = runner.Plan(
        suites=options.suite,
        out=options.out,
        names=options.models,
        peers=options.peers,
        size=options.size,
        device=options.device,
        rounds=options.rounds,
        limit_s=options.limit,
        budget_s=options.budget,
        again=options.again,
        plugins=tuple(options.plugin),
        warm=not getattr(options, "cold", False),
        settle_s=getattr(options, "settle", math.inf),
    )
    if options.command == "sweep":
        return sweep.main(replace(plan, model_limit_s=options.model_limit), options.counts, options.per_gpu)
    if getattr(options, "per_gpu", None):
        plan = sweep.spread(plan, options.per_gpu)
    status = runner.main(plan, sys.stderr)
    if options.command == "pipelines":
        found = results.load(plan.out) if plan.out.exists() else results.Results()
        for section in report.sections(found):
            if section.suite.name == "pipelines":
                print(report.pipelines_summary(section))
    return status


def _report(options: argparse.Namespace) -> int:
    found = results.merged(options.files or sorted(CHECKED_IN.glob("*.json")))
    text = report.page(found)
    if options.docs:
        speedups, outside = report.speedups(found), report.speedups(found, "sweep")
        pages = {
            "performance.md": report.short_page(speedups, outside),
            "performance.svg": chart.speedup_chart(speedups),
            "performance-outside.svg": chart.speedup_chart(outside),
        }
        for name, content in {**pages, "performance-details.md": text}.items():
            (options.docs / name).write_text(content)
    elif options.out:
        options.out.write_text(text)
    else:
        print(text, end="")
    if options.plots:
        from benchmarks import plots

        for path in plots.write(found, options.plots):
            print(path, file=sys.stderr)
    return 0


def _list() -> int:
    print("suites")
    for suite in SUITES.values():
        own = ", ".join(suite.peers or suite.default_peers)
        print(f"  {suite.name:10} {suite.help}" + (f" (peers: {own})" if own else ""))
        if suite.workloads:
            print(f"  {'':10} {', '.join(w.name for w in suite.workloads)}")
    print("peers\n  " + ", ".join(name if peer.by_default else f"{name} (on request)" for name, peer in PEERS.items()))
    print("models and their shapes")
    known = dict.fromkeys((*WORKLOADS, *TRAINED, *FURTHER_WORKLOADS, *QUANTIZED))
    for model in dict.fromkeys(w.model for w in known):
        shapes = ", ".join(dict.fromkeys(w.name for w in known if w.model == model))
        print(f"  {model:16} {shapes}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a command, a file or a machine that nothing can be done with."""
    options = parser().parse_args(arguments)
    try:
        if options.command in ("run", "sweep", "pipelines"):
            return _run(options)
        return _report(options) if options.command == "report" else _list()
    except (UsageError, results.ResultsError, runner.NoEnvironment) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
