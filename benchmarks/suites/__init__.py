"""The suites: what each measures and with which peers. Their code is in the modules beside this one.

Loading this module loads no torch: the process that starts the workers reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks import pipelines, quantized
from benchmarks.cases import PIPELINES, TRAINED, Workload
from benchmarks.peers import PEERS, no_kernels
from benchmarks.sweep_table import ENTRIES, SWEEP

if TYPE_CHECKING:
    from benchmarks.cases import Job
    from benchmarks.worker import Reporter


def _anything(peer: str, workload: Workload, device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Suite:
    """One kind of measurement.

    Attributes:
        peers: its own peers by name; empty: all of `PEERS`.
        default_peers: those that are measured unless `--peers` says otherwise; empty: as the peers have it.
        workloads: its own workloads, see `cases.workloads`.
        rounds: how often the peers take turns unless `--rounds` says otherwise.
        together: all peers of a workload share a process; otherwise each has a process of its own.
        compared: rows are compared within a process: what lacks a row is measured with all others, again. Otherwise a
            row that is there stays.
        without_device: can be asked for a device that this machine does not have.
        dtype: of the weights, where it is not the workload's.
        independent: a peer that has ended a process is tried again at the next workload.
        why_not: why a peer can't be measured, None if it can; beside the peer's own reasons. An empty reason is none
            to tell: the workload has no such peer.
        headline: the metric that overviews and plots show: it, or else the one after it.
    """

    name: str
    help: str
    headline: tuple[str, ...]
    peers: tuple[str, ...] = ()
    default_peers: tuple[str, ...] = ()
    workloads: tuple[Workload, ...] = ()
    rounds: int = 20
    together: bool = True
    compared: bool = True
    without_device: bool = False
    dtype: str = ""
    independent: bool = False
    why_not: Callable[[str, Workload, str], str | None] = _anything

    def measure(self, job: Job, out: Reporter) -> None:
        """Do the job, in a worker."""
        import_module(f"benchmarks.suites.{self.name}").measure(job, out)

    def known_peers(self) -> list[str]:
        """The peers that it can be asked for."""
        return list(self.peers or PEERS)

    def measured_peers(self) -> list[str]:
        """Those of them that are measured by default."""
        default = [name for name in self.known_peers() if name not in PEERS or PEERS[name].by_default]
        return list(self.default_peers) or default

    def reason(self, peer: str, workload: Workload, device: str) -> str | None:
        """Why `peer` can't be measured on a device of this kind, None if it can."""
        own = PEERS[peer].why_not(device) if peer in PEERS and not self.without_device else None
        return own or self.why_not(peer, workload, device)


def _only_learners(peer: str, workload: Workload, device: str) -> str | None:
    if PEERS[peer].exported:
        return "an exported program has no gradients"
    return "a decode step is not trained" if workload.model.endswith("_decode") else None


def _only_varying(peer: str, workload: Workload, device: str) -> str | None:
    return None if workload.trace else "the shapes of this workload do not change"


def _only_varying_kernels(peer: str, workload: Workload, device: str) -> str | None:
    return no_kernels(device) or _only_varying(peer, workload, device)


def _only_refittable(peer: str, workload: Workload, device: str) -> str | None:
    return "its weights can't be replaced" if peer in ("onnxruntime", "tensorrt-rtx") else None


def _needs_gpu(peer: str, workload: Workload, device: str) -> str | None:
    import torch

    if peer == "aoti" and device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU of the kind that it builds for"
    return PEERS[peer].why_not(device)


def _only_installed(peer: str, workload: Workload, device: str) -> str | None:
    library = ENTRIES[workload.model].library if workload.model in ENTRIES else "own"
    return None if library == "own" or find_spec(library) else f"not installed: {library}"


SWEPT = tuple(Workload(entry.name, entry.batch) for entry in SWEEP)
_LEARNERS = ("eager", "inductor", "reduce-overhead", "rtx-lazy")

SUITES = {
    suite.name: suite
    for suite in (
        Suite("latency", "steady state: device events and wall clock", ("device_ms", "wall_ms")),
        Suite("cold", "from process start to full speed, caches empty and warm", ("cold.first_s",), together=False),
        Suite("shapes", "calls over changing shapes", ("total_s",), together=False, why_not=_only_varying),
        Suite(
            "build",
            "ahead of time, for `cuda` without a GPU: seconds and bytes",
            ("build_s",),
            ("aoti", "rtx-exported"),
            without_device=True,
            why_not=_needs_gpu,
        ),
        Suite("refit", "other weights for the same program", ("refit_ms",), together=False, why_not=_only_refittable),
        Suite("memory", "peak memory", ("run_peak_bytes", "process_peak_bytes"), together=False),
        Suite(
            "train",
            "a training step: forward, backward and AdamW, in bfloat16 autocast on a GPU",
            ("device_ms", "wall_ms"),
            default_peers=_LEARNERS,
            workloads=TRAINED,
            rounds=8,
            dtype="float32",  # as autocast expects
            why_not=_only_learners,
        ),
        Suite(
            "first_step",
            "the first training step of a process, caches empty and warm",
            ("cold.first_s",),
            default_peers=_LEARNERS,
            workloads=TRAINED,
            together=False,
            dtype="float32",
            why_not=_only_learners,
        ),
        Suite("host", "host time of a call", ("host_us",)),
        Suite(
            "tiers",
            "an exported engine's kernels for any size, for one, and for one alone",
            ("device_ms", "wall_ms"),
            ("generic", "specialized", "static", "no graphs"),
            why_not=_only_varying_kernels,
        ),
        Suite(
            "sweep",
            "models from outside: steady state, seconds and memory until then, what their engines consist of",
            ("device_ms", "wall_ms"),
            default_peers=("eager", "inductor", "reduce-overhead", "max-autotune", "rtx-lazy", "rtx-exported-lazy"),
            workloads=SWEPT,
            rounds=8,
            independent=True,
            why_not=_only_installed,
        ),
        Suite(
            "quantized",
            "quantized models beside half precision, torchao and library calls",
            ("device_ms", "wall_ms"),
            quantized.PEER_NAMES,
            default_peers=quantized.DEFAULT_PEERS,
            workloads=quantized.QUANTIZED,
            rounds=8,
            compared=False,
            independent=True,
            why_not=quantized.why_not,
        ),
        Suite(
            "pipelines",
            "texts and images as people make them: seconds from the start of a process, per result, per LoRA",
            ("result_s",),
            pipelines.PEER_NAMES,
            default_peers=pipelines.DEFAULT_PEERS,
            workloads=tuple(Workload(model, 1) for model in PIPELINES),
            rounds=3,
            together=False,
            compared=False,
            independent=True,
            why_not=pipelines.why_not,
        ),
        Suite(
            "counts",
            "what engines of these models consist of, for `cuda` without a GPU",
            ("layout_copies",),
            ("rtx-exported",),
            workloads=SWEPT,
            without_device=True,
            independent=True,
            why_not=_only_installed,
        ),
        Suite("backend", "seconds inside a torch.compile backend", ("backend_s",), ("aot_eager", "rtx")),
    )
}
# Where there is an engine cache, its key has a module here.
if find_spec("benchmarks.cache_key") is not None:
    SUITES["hash"] = Suite("hash", "the key of a graph in the cache", ("hash_ms",), ("inductor", "rtx"))
