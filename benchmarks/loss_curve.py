"""Loss curves of GPT-2 (124M) from scratch on text that Python ships, with dropout: do peers learn as eager does?

    python -m benchmarks.loss_curve --peers inductor,rtx-lazy --out curves.json --plot curves.svg

All runs begin with the same weights and read the same tokens in the same order. Dropout draws other numbers in each, so
even two runs of eager differ, `eager` and `eager-2`, which have two seeds. Their distance is the measure for that of a
peer, and the exit status is 1 where one is further off, or fails.

The text is Python's reference in `pydoc_data` and the sources of its library, as tokens of a byte-level BPE of the
model's vocabulary, trained on it. AdamW with a linear warm-up and clipped gradients, in bfloat16 autocast on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from benchmarks import environment, models, training
from benchmarks.cases import Size
from benchmarks.peers import PEERS, Subject
from benchmarks.report import number, table
from benchmarks.timing import synchronize

SHAPES = {"full": (8, 512), "small": (4, 32)}  # sequences and tokens of each in a step
RATES = {"full": 6e-4, "small": 3e-3}
WARM_UP = 0.1  # of all steps
WINDOWS = 10  # curves are compared by their means over so many parts
FACTOR = 2  # distances between a few runs differ by chance
ROUNDING = 1e-3  # a distance that dropout is not needed to explain
TIMED = 20  # steps after the curve that are timed
SETTLE_S = 120


def text(size: Size) -> list[str]:
    """The documents: about 5 MB, or 20 kB."""
    if size == "small":
        return list(topics.values())[:20]
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [*topics.values(), *(path.read_text(errors="replace") for path in sources)]


def tokens(documents: Sequence[str], vocabulary: int) -> Tensor:
    """All documents as one row of token ids."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=vocabulary, show_progress=False)
    return torch.tensor([token for found in tokenizer.encode_batch(list(documents)) for token in found.ids])


def batches(ids: Tensor, size: Size, count: int) -> Iterator[Tensor]:
    """`[batch, length]` ids of each step: pieces of the text in a random order, which is always the same."""
    batch, length = SHAPES[size]
    pieces = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(0)
    times = math.ceil(count * batch / len(pieces))
    order = torch.cat([torch.randperm(len(pieces), generator=generator) for _ in range(times)])
    yield from pieces[order[: count * batch]].view(count, batch, length)


def untrained(size: Size, device: str) -> nn.Module:
    """GPT-2 with the weights that training begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.spec("gpt2").model(size)
    return training.traceable(model).to(device).train()


class Run:
    """Training with one peer: `step` learns from ids and returns the loss, a scalar on the device."""

    def __init__(self, peer: str, model: nn.Module, example: Tensor, size: Size, steps: int, folder: Path) -> None:
        self.device, self.model = example.device.type, model
        subject = Subject(model, (), {"input_ids": example, "labels": example}, folder, self.device)
        self.prepared = PEERS[peer].prepare(subject)
        self.optimizer = torch.optim.AdamW(model.parameters(), RATES[size], fused=self.device == "cuda")
        warm_up = max(1, round(WARM_UP * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warm_up))

    def step(self, ids: Tensor) -> Tensor:
        with training.autocast(self.device):
            loss = self.prepared(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.detach().clone()  # a replay may write over what it has returned


def curve(peer: str, seed: int, model: nn.Module, data: Sequence[Tensor], size: Size) -> dict[str, Any]:
    """The `loss` of each step, and `step_ms` at the peer's full speed, by some more steps with the last batch."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(peer, copy.deepcopy(model), data[0], size, len(data), Path(folder))
        losses = torch.stack([run.step(ids) for ids in data]).tolist()
        PEERS[peer].settled(SETTLE_S)
        begin = 0.0
        for index in range(2 * TIMED):
            if index == TIMED:
                synchronize(run.device)
                begin = time.perf_counter()
            run.step(data[-1])
        synchronize(run.device)
    return {"loss": losses, "step_ms": 1e3 * (time.perf_counter() - begin) / TIMED}


def means(losses: Sequence[float]) -> list[float]:
    """Of the parts that curves are compared by."""
    ends = [round(part * len(losses) / WINDOWS) for part in range(WINDOWS + 1)]
    return [statistics.fmean(losses[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Between two curves of at least `WINDOWS` steps: the root mean square over the parts. NaN stays NaN."""
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(means(ours), means(theirs), strict=True)))


def compare(curves: dict[str, list[float]]) -> dict[str, Any]:
    """The `spread` of the two runs of eager; each peer's `distance` to the nearer of them, and whether they `agree`."""
    first, second = curves["eager"], curves["eager-2"]
    spread = distance(first, second)
    others = {name: found for name, found in curves.items() if name not in ("eager", "eager-2")}
    found = {name: min(distance(losses, first), distance(losses, second)) for name, losses in others.items()}
    limit = max(FACTOR * spread, ROUNDING)
    return {"spread": spread, "distance": found, "agree": {name: away <= limit for name, away in found.items()}}


def measure(peers: Sequence[str], size: Size, steps: int, device: str) -> dict[str, Any]:
    """All runs, one after the other, and how far they are from each other."""
    model = untrained(size, device)
    ids = tokens(text(size), model.config.vocab_size)
    data = [batch.to(device) for batch in batches(ids, size, steps)]
    curves: dict[str, dict[str, Any]] = {}
    failed = {}
    for name, peer, seed in (("eager", "eager", 1), ("eager-2", "eager", 2), *((peer, peer, 1) for peer in peers)):
        try:
            curves[name] = curve(peer, seed, model, data, size)
            print(f"{name}: {curves[name]['loss'][-1]:.4f}, {curves[name]['step_ms']:.1f} ms", file=sys.stderr)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {
        "environment": environment.record(device),
        "size": size,
        "shape": SHAPES[size],
        "tokens": len(ids),
        "curves": curves,
        "failed": failed,
        **compare({name: found["loss"] for name, found in curves.items()}),
    }


def report(result: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = []
    for name, found in result["curves"].items():
        parts = means(found["loss"])
        away = result["distance"].get(name)
        agrees = {True: "yes", False: "no", None: ""}[result["agree"].get(name)]
        losses = [f"{parts[at]:.3f}" for at in (0, WINDOWS // 2, -1)]
        lines.append([name, *losses, number(found["step_ms"]), "" if away is None else f"{away:.4f}", agrees])
    header = ["run", "loss at first", "half way", "in the end", "step ms", "distance", "agrees"]
    failed = "".join(f"- {name}: {why}\n" for name, why in result["failed"].items())
    return table(header, lines) + f"\nDistance of the runs of eager: {result['spread']:.4f}\n" + failed


def plot(result: dict[str, Any], path: Path) -> None:
    """The curves; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in result["curves"].items():
        axes.plot(found["loss"], label=name, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy")
    axes.legend()
    figure.savefig(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        "python -m benchmarks.loss_curve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--peers", type=lambda names: names.split(","), default=["inductor", "rtx-lazy"])
    top.add_argument("--steps", type=int, default=200, help=f"at least {WINDOWS}")
    top.add_argument("--size", choices=tuple(SHAPES), default="full")
    top.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--out", type=Path, help="file for the result, as JSON")
    top.add_argument("--plot", type=Path, help="file for a plot, such as curves.svg; needs matplotlib")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where all peers learn as eager does."""
    top = parser()
    options = top.parse_args(arguments)
    unknown = sorted(set(options.peers) - {name for name, peer in PEERS.items() if not peer.exported})
    if unknown or options.steps < WINDOWS:
        top.error(f"peers that can't train: {', '.join(unknown)}" if unknown else f"fewer than {WINDOWS} steps")
    result = measure(options.peers, options.size, options.steps, options.device)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)
    print(report(result))
    return 0 if all(result["agree"].values()) and not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
