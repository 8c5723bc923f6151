"""Several GPUs beside eager mode and Inductor: tensor parallel inference, FSDP2, DDP, and the start of ranks.

    python -m benchmarks.ranks [decode prefill fsdp ddp start] [--ranks 2] [--budget 260] [--json FILE] [--small]

`decode` and `prefill`: layers of Llama 8B in bfloat16, one token with a cache, and 2048 tokens; `engine` is
`torch_rtx.compile`, `rtx` is `torch.compile` with `skip_layer_guards`, and `inductor-filtered` is Inductor with the
same filter. `fsdp`: a training step of Llama 1B, 2 x 2048 tokens per rank. `ddp`: one of ResNet-50, 64 images per rank.
`start`: seconds until the first result of all ranks, and of one, in new processes that find all in the caches.

Cases are in the order of the items; each has a limit, and none begins when the budget is spent. Without GPUs the ranks
are on gloo, which is for tests. Needs nothing but Python's own library until the ranks start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# By item: seconds that a case may take, and its peers; with @1: each GPU by itself.
ITEMS: dict[str, tuple[float, tuple[str, ...]]] = {
    "decode": (40, ("engine", "inductor", "engine@1", "rtx", "inductor-filtered", "eager")),
    "prefill": (40, ("engine", "inductor", "eager")),
    "fsdp": (240, ("rtx", "inductor", "eager")),
    "ddp": (240, ("rtx", "eager", "inductor")),
    "start": (60, ()),
}
START_S = 60  # until the ranks have imported everything
GONE_S = 2.0  # until ranks have ended that were told to
POLL_S = 0.2
Row = dict[str, Any]


class Runner:
    """Starts ranks, and ends them when a case takes too long or all time is spent.

    Attributes:
        rows: what has been measured.
        folder: of the caches, and of the file that ranks write to.
    """

    def __init__(self, ranks: int, budget: float, small: bool, folder: Path) -> None:
        self.ranks, self.small, self.folder = ranks, small, folder
        self.end = time.monotonic() + budget
        self.rows: list[Row] = []

    def run(self, cases: list[str], ranks: int, caches: str = "caches") -> None:
        """Run cases in one start of the ranks; after one that failed, the others in another."""
        while cases and time.monotonic() < self.end:
            file = self.folder / f"{time.monotonic_ns()}.jsonl"
            file.touch()
            child = self._start(cases, ranks, file, caches)
            current = self._watched(child, file, cases[0])
            done = [row for row in _lines(file) if "begun" not in row]
            self.rows += done
            if current is not None and all(row["case"] != current for row in done):
                done.append({"case": current, "failed": "took too long, or ended"})
                self._take(done[-1])
            cases = cases[len(done) :]

    def _start(self, cases: list[str], ranks: int, file: Path, caches: str) -> subprocess.Popen[bytes]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        worker = ["-m", "benchmarks.rank_worker", *cases, f"--rows={file}", *["--small"] * self.small]
        begun = {
            "RANKS_OF": str(os.getpid()),
            "RANKS_BEGUN": str(time.time()),
            "TORCH_RTX_CACHE_DIR": str(self.folder / caches),
        }
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | begun
        return subprocess.Popen([sys.executable, *torchrun, *worker], env=environment, start_new_session=True)

    def _watched(self, child: subprocess.Popen[bytes], file: Path, first: str) -> str | None:
        """Wait for the ranks; returns the case that they were at, if they did not end well."""
        current, since, seen = first, time.monotonic() + START_S, 0
        while child.poll() is None:
            lines = _lines(file)
            for line in lines[seen:]:
                if "begun" in line:
                    current, since = line["case"], time.monotonic()
                else:
                    self._tell(line)
            seen = len(lines)
            if time.monotonic() > min(self.end, since + ITEMS[current.split(":")[0]][0]):
                os.killpg(child.pid, signal.SIGKILL)  # torchrun, whose ranks see that it is gone
                child.wait()
                time.sleep(GONE_S)
                return current
            time.sleep(POLL_S)
        for line in _lines(file)[seen:]:
            if "begun" not in line:
                self._tell(line)
        return None if child.returncode == 0 else current

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        self._tell(row)

    def _tell(self, row: Row) -> None:
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k != "case"}
        print(f"{row['case']:26}", *(f"{name} {value}" for name, value in values.items()), flush=True)

    def start(self) -> None:
        """The first result of one rank and of all, with caches that an earlier start has filled."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self._started, "empty"), (1, self.ranks)))
        for ranks in (1, self.ranks):
            self._started("full", ranks)

    def _started(self, caches: str, ranks: int) -> None:
        self.run([f"start:{caches}:{ranks}"], ranks, f"caches-{ranks}")


def _lines(file: Path) -> list[Row]:
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def summary(rows: list[Row], ranks: int) -> list[str]:
    """The ratios that matter, of what was measured."""
    ms = {row["case"]: row.get("ms", row.get("seconds")) for row in rows if "failed" not in row}
    found = []

    def ratio(text: str, above: str, below: str) -> None:
        if above in ms and below in ms:
            found.append(f"{text}: {ms[above] / ms[below]:.2f}")

    for item in ("decode", "prefill"):
        for peer in ("engine", "rtx"):
            for other in ("inductor", "inductor-filtered", "eager"):
                ratio(f"{item} {peer}, speed beside {other}", f"{item}:{other}:{ranks}", f"{item}:{peer}:{ranks}")
        ratio(f"{item} engine, speed of {ranks} GPUs beside one", f"{item}:engine:1", f"{item}:engine:{ranks}")
    for item in ("fsdp", "ddp"):
        for other in ("inductor", "eager"):
            ratio(f"{item}, time beside {other}", f"{item}:rtx:{ranks}", f"{item}:{other}:{ranks}")
    ratio(f"start of {ranks} ranks beside one", f"start:full:{ranks}", "start:full:1")
    return found


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", choices=[*ITEMS, []], default=[])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--budget", type=float, default=600, help="seconds that all may take")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--small", action="store_true", help="tiny models, for tests")
    options = parser.parse_args(arguments)
    items = options.items or list(ITEMS)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(options.ranks, options.budget, options.small, Path(folder))
        cases = [
            f"{item}:{peer.removesuffix('@1')}:{1 if peer.endswith('@1') else options.ranks}"
            for item in items
            for peer in ITEMS[item][1]
        ]
        runner.run(cases, options.ranks)
        if "start" in items:
            runner.start()
    found = summary(runner.rows, options.ranks)
    print("\n".join(found))
    if options.json:
        options.json.write_text(json.dumps({"rows": runner.rows, "summary": found}, indent=1) + "\n")
    return runner.rows


if __name__ == "__main__":
    main()
