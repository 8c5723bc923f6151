"""Suite `memory`: what a model needs at most, while it is prepared and while it runs; each peer in its own process."""

from __future__ import annotations

import sys

import torch

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.peers import PEERS
from benchmarks.suites import common
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """On a GPU `prepare_peak_bytes`, `run_peak_bytes` and `outside_bytes`; on the CPU `process_peak_bytes`.

    The peaks are PyTorch's own, with the model's weights and inputs in them; `outside_bytes` is what libraries and
    compiled code have taken from the device besides.
    """
    (name,) = job.peers
    out.begin(None, "model")
    with common.set_up(job) as setup, out.attempt(name, "measure"):
        if job.device == "cuda":
            prepared, metrics = _on_gpu(name, setup)
        else:
            prepared = PEERS[name].prepare(setup.subject)
            timing.warm_up(setup.rotating(prepared), job.device)
            metrics = _of_process()
        setup.check(prepared)
        model = setup.subject.model
        metrics["weight_bytes"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        out.ok(name, metrics)


def _outside() -> int:
    """Bytes of the device in use that PyTorch's allocator does not hold."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _on_gpu(name: str, setup: common.Setup) -> tuple[common.Prepared, dict[str, int]]:
    before = _outside()
    torch.cuda.reset_peak_memory_stats()
    prepared = PEERS[name].prepare(setup.subject)
    call = setup.rotating(prepared)
    timing.warm_up(call, "cuda")
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 * common.SETS):
        call()
    torch.cuda.synchronize()
    running = torch.cuda.max_memory_allocated()
    return prepared, {"prepare_peak_bytes": peak, "run_peak_bytes": running, "outside_bytes": _outside() - before}


def _of_process() -> dict[str, int]:
    """The most memory that this process has had, where the system says so."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
