"""Suite `build`: engines ahead of time, for `cuda` on a machine with or without a GPU."""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import torch_rtx
from benchmarks import models, timing
from benchmarks.cases import Job
from benchmarks.peers import PEERS, Subject
from benchmarks.worker import Reporter
from torch_rtx.lowering.kernels import toolchain

BUILDS = 3


def measure(job: Job, out: Reporter) -> None:
    """`build_s` from the model to a file, `first_s` with what only the first in a process pays, `file_bytes`."""
    w = job.workload
    for name in job.peers:
        with out.attempt(name, "build"), torch.no_grad():
            # An engine for a GPU needs no weights; what it is compared with does, and is built on the GPU.
            stripped = name == "rtx-exported" and job.device == "cuda"
            options: dict[str, Any] = {"batch": w.batch, "dtype": getattr(torch, w.dtype)}
            if stripped:
                model = models.without_weights(w.model, w.size, **options)
                args, kwargs = models.inputs(w.model, w.size, length=w.length, **options)
            else:
                model, args, kwargs = models.build(w.model, w.size, length=w.length, device=job.device, **options)
            seconds, metrics = [], {}
            for _ in range(BUILDS):
                torch._dynamo.reset()
                with tempfile.TemporaryDirectory() as folder:
                    subject = Subject(model, args, kwargs, Path(folder), job.device)
                    start = time.perf_counter()
                    path = _rtx(subject) if name == "rtx-exported" else _other(name, subject)
                    seconds.append(time.perf_counter() - start)
                    metrics = {"file_bytes": path.stat().st_size}
                    if name == "rtx-exported":
                        metrics |= _contents(path)
            out.ok(name, {"first_s": seconds[0], "build_s": timing.summary(seconds[1:]), **metrics})


def _rtx(subject: Subject) -> Path:
    toolchain.forget()
    settings = torch_rtx.CompilationSettings(
        device=subject.device,
        targets="portable" if subject.device == "cuda" and find_spec("triton") else None,
        cache_built_engines=False,
        reuse_cached_engines=False,
    )
    path = subject.folder / "model.rtx"
    torch_rtx.save(torch_rtx.compile(subject.model, subject.args, subject.kwargs, settings=settings), path)
    return path


def _other(name: str, subject: Subject) -> Path:
    PEERS[name].prepare(subject)
    (path,) = subject.folder.iterdir()
    return path


def _contents(path: Path) -> dict[str, int]:
    """Bytes of the weights that a stripped file leaves out, its calls by kind, and its kernels by target."""
    found = torch_rtx.inspect(path)
    kinds = {f"{kind}_nodes": count for kind, count in found.kinds.items()}
    kernels = {f"kernels_{target}": count for target, (count, _) in found.kernels.items()}
    return {"weight_bytes": found.weight_bytes, **kinds, **kernels}
