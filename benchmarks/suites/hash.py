"""Suite `hash`: the key of a graph in the engine cache against Inductor's, on the same graphs at their full size."""

from __future__ import annotations

from benchmarks import cache_key
from benchmarks.cases import Job
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """`hash_ms` of a key, the `ratio` to Inductor's, and the `nodes` of the graph."""
    out.begin(None, "measure")
    found = cache_key.measure(job.workload.model, job.rounds)
    ratios = {"inductor": 1.0, "rtx": 1 / found["ratio"]}
    for name in job.peers:
        ratio = {"against": "inductor", "median": ratios[name]}
        out.ok(name, {"hash_ms": {"median": found[f"{name}_ms"]}, "ratio": ratio, "nodes": found["nodes"]})
