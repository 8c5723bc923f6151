"""Suite `counts`: what an engine consists of, for `cuda` without a GPU and without kernels being compiled."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import torch_rtx
from benchmarks import models
from benchmarks.cases import Job, Workload
from benchmarks.worker import Reporter
from torch_rtx.errors import CaptureError
from torch_rtx.ir import Graph, Node, TensorType

log = logging.getLogger(__name__)
COPIES = {"aten.clone.default", "aten._to_copy.default", "aten.copy_.default"}
# Beside copies, what only says how memory is read.
_VIEWS = {
    f"aten.{name}"
    for name in (
        "alias.default",
        "expand.default",
        "permute.default",
        "reshape.default",
        "select.int",
        "slice.Tensor",
        "squeeze.dim",
        "squeeze.dims",
        "t.default",
        "transpose.int",
        "unsqueeze.default",
        "view.default",
        "_unsafe_view.default",
    )
}


def measure(job: Job, out: Reporter) -> None:
    """`fallbacks` and `calls` by operator, numbers of `kernels` and `layout_copies`, and `lower_s`, seconds."""
    for name in job.peers:
        with out.attempt(name, "lower"), torch.no_grad():
            w = job.workload
            settings = torch_rtx.CompilationSettings(
                device="cuda", targets="later", cache_built_engines=False, reuse_cached_engines=False
            )
            start = time.perf_counter()
            try:
                made = _compiled(without_data(w), settings)
            except CaptureError:  # its code reads numbers that its buffers have
                start = time.perf_counter()
                dtype = getattr(torch, w.dtype)
                made = _compiled(models.build(w.model, w.size, batch=w.batch, length=w.length, dtype=dtype), settings)
            out.ok(name, {**counted(made.engine.graph), "lower_s": time.perf_counter() - start})


def _compiled(call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]], settings: Any) -> torch_rtx.CompiledModule:
    model, args, kwargs = call
    return torch_rtx.compile(model, args, kwargs, settings=settings)


def without_data(w: Workload) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model on the `meta` device with inputs on the CPU; with weights, where its code reads them to build it."""
    dtype = getattr(torch, w.dtype)
    args, kwargs = models.inputs(w.model, w.size, batch=w.batch, length=w.length, dtype=dtype)
    try:
        return models.without_weights(w.model, w.size, batch=w.batch, dtype=dtype), args, kwargs
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.info("%s can't be built without weights: %s", w.model, error)
        return models.build(w.model, w.size, batch=w.batch, length=w.length, dtype=dtype)


def counted(graph: Graph) -> dict[str, Any]:
    """What a graph of level fused consists of."""
    copies = sum(map(is_layout_copy, graph.nodes))
    return {
        "kernels": sum(node.kind == "kernel" for node in graph.nodes),
        "layout_copies": copies,
        "calls": _by_op(graph, "extern"),
        "fallbacks": _by_op(graph, "fallback"),
    }


def _by_op(graph: Graph, kind: str) -> dict[str, int]:
    found = (node.op for node in graph.nodes if node.kind == kind and not is_layout_copy(node))
    return dict(Counter(found).most_common())


def is_layout_copy(node: Node) -> bool:
    """Whether a node of a fused graph only writes its operand to memory in another order."""
    inner = list(_leaves(node))
    return (
        any(one.op in COPIES for one in inner)
        and all(one.op in COPIES or one.op in _VIEWS for one in inner)
        and not node.writes
        and _dtypes(node.inputs) == _dtypes(node.results)
    )


def _leaves(node: Node) -> Iterator[Node]:
    for inner in (node,) if node.body is None else node.body.nodes:
        yield from (inner,) if inner is node or inner.body is None else _leaves(inner)


def _dtypes(values: Any) -> set[str]:
    return {value.type.dtype for value in values if isinstance(value.type, TensorType)}
