"""What the suite `pipelines` measures: what a user waits for, from the start of a process to the last of many results.

A workload is a result, such as an image or a text, see `RESULTS`. Weights are random. Each peer has its own process
with empty caches, and a second one that finds what the first has kept. Loading this module loads no torch.

| peer | text | images |
|---|---|---|
| `rtx-engine` | a `GenerationEngine`, which the second process loads; that of Whisper has an encoder | |
| `rtx` | `generate` with `CompileConfig(backend="rtx")` | `accelerate(pipe)` |
| `rtx-blocks` | | `accelerate(pipe, repeated_blocks=True)` |
| `reduce-overhead` | `generate` with a static cache, as transformers compiles it | this mode for denoiser and decoder |
| `max-autotune` | the same with this mode | `max-autotune-no-cudagraphs` for denoiser and decoder |
| `inductor-blocks` | | `compile_repeated_blocks(fullgraph=True)`, as diffusers recommends |
| `eager` | `generate` by itself | the pipeline by itself |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.cases import Workload
from benchmarks.results import Row, headline, metric

TEXT, IMAGES = ("llama_1b", "llama_8b", "whisper_small"), ("sdxl", "sdxl_lora", "flux")
RESULTS = {
    "llama_1b": "128 tokens after a prompt of 32",
    "llama_8b": "128 tokens after a prompt of 32",
    "whisper_small": "30 s of sound, 100 tokens",
    "sdxl": "30 steps, 1024 x 1024",
    "sdxl_lora": "4 steps, 1024 x 1024, latents, with a LoRA of rank 16",
    "flux": "28 steps, 1024 x 1024",
}
SETTLE_S = 30.0  # seconds that what goes on in the background may take before results are timed
EARLY_S, MORE_S = 25.0, 60.0  # seconds that the stages for `early` and `more` may take
OURS = ("rtx-engine", "rtx", "rtx-blocks")
# What is asked most of comes first: a run that is stopped keeps what it has.
PEER_NAMES = (*OURS, "reduce-overhead", "inductor-blocks", "max-autotune", "eager")
DEFAULT_PEERS = ("rtx-engine", "rtx", "reduce-overhead", "inductor-blocks", "eager")


@dataclass
class Pipeline:
    """A pipeline by one peer.

    Attributes:
        result: makes a result.
        brief: the same with fewer steps, by the same programs.
        more: further metrics as they are found; None: there are none.
        early: the same, of those that need nobody to wait for the background.
        check: raises `AssertionError` if results are wrong. Afterwards the pipeline is another one.
        keep: keeps files for the next process.
    """

    result: Callable[[], Any]
    brief: Callable[[], Any]
    check: Callable[[], None]
    more: Callable[[], Iterator[dict[str, Any]]] | None = None
    keep: Callable[[], None] = lambda: None
    early: Callable[[], Iterator[dict[str, Any]]] | None = None


def why_not(peer: str, workload: Workload, device: str) -> str | None:
    """Why a peer can't be measured, None if it can; empty where the workload has no such peer."""
    text = workload.model in TEXT
    if peer.endswith("-blocks") if text else peer == "rtx-engine":
        return ""
    needed = ("transformers",) if text else ("diffusers", "transformers", *["peft"] * (workload.model == "sdxl_lora"))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if device != "cuda" and peer in ("reduce-overhead", "max-autotune"):
        return "is measured on GPUs alone"
    return None


def beside(rows: Sequence[Row]) -> list[Row]:
    """The rows of one workload; those of torch_rtx with how they compare with the fastest other peer: `times_best` in
    seconds per result, and `cold_of_best` and `warm_of_best`, the time to the first result as a share of that of the
    fastest peer that compiles."""
    found = {row["peer"]: value[1] for row in rows if (value := headline(row, ("result_s",)))}
    others = {peer: seconds for peer, seconds in found.items() if peer not in OURS}
    compilers = [peer for peer in others if peer != "eager"]
    compiled = next((row for row in rows if compilers and row["peer"] == min(compilers, key=others.__getitem__)), None)
    more = []
    for row in rows:
        metrics = dict(row["metrics"])
        if row["peer"] in OURS:
            if row["peer"] in found and others:
                metrics["times_best"] = min(others.values()) / found[row["peer"]]
            for phase in ("cold", "warm"):
                pair = [metric(one, f"{phase}.first_s") for one in (row, compiled) if one is not None]
                if len(pair) == 2 and None not in pair:
                    metrics[f"{phase}_of_best"] = pair[0] / pair[1]
        more.append({**row, "metrics": metrics})
    return more
