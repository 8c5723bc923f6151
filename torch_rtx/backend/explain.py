"""`explain`: reports which nodes of a model run in the engine, which fall back to PyTorch, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func

from torch_rtx.backend.capture import capture
from torch_rtx.backend.compiler import check_settings, device_of
from torch_rtx.backend.partition import partition
from torch_rtx.ir import Loc
from torch_rtx.lowering.effects import drop_tokens
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.support import reasons
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings


@dataclass(frozen=True)
class Fallback:
    """A node that stays in PyTorch: its operator, the reason, and the line of the model that calls it."""

    op: str
    reason: str
    loc: Loc | None


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: node counts of the engine's blocks, the fallbacks, and the reason of the graph break."""

    blocks: tuple[int, ...]
    fallbacks: tuple[Fallback, ...]
    break_reason: str | None


@dataclass(frozen=True)
class Explanation:
    """How torch.compile(backend="rtx") partitions a model. `print` it, or read `graphs`."""

    graphs: tuple[GraphReport, ...]

    @property
    def engine_nodes(self) -> int:
        """Nodes that run in engines."""
        return sum(sum(graph.blocks) for graph in self.graphs)

    @property
    def fallback_nodes(self) -> int:
        """Nodes that stay in PyTorch."""
        return sum(len(graph.fallbacks) for graph in self.graphs)

    def __str__(self) -> str:
        lines = [
            f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}: "
            f"{self.engine_nodes} nodes in engines, {self.fallback_nodes} fall back to PyTorch"
        ]
        for index, graph in enumerate(self.graphs):
            blocks = ", ".join(map(str, graph.blocks)) or "none"
            lines.append(f"graph {index}: blocks of {blocks} nodes")
            for fallback in graph.fallbacks:
                lines.append(f"  fallback {fallback.op}: {fallback.reason}")
                if fallback.loc is not None:
                    lines.append(f"    at {fallback.loc}")
            if graph.break_reason is not None:
                lines.append(f"  graph break: {graph.break_reason}")
        return "\n".join(lines)


def explain(
    model: Callable[..., Any], *args: Any, settings: CompilationSettings | None = None, **kwargs: Any
) -> Explanation:
    """Capture `model` for inference as torch.compile would, run it once in PyTorch, and report how it is partitioned.

    Args:
        model: a module or function; `args` and `kwargs` are passed to it.
        settings: those of the compilation to explain; `require_full_compilation` is ignored.
    """
    settings = replace(settings or CompilationSettings(), require_full_compilation=False)
    check_settings(settings)
    reports: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reason = getattr(gm, "compile_subgraph_reason", None)
        stopped = getattr(reason, "graph_break", False)

        def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            reports.append(report(graph, settings, _break_text(reason) if stopped else None))
            return make_boxed_func(graph.forward)

        return capture(gm, example_inputs, compiler, compiler)

    hooked = isinstance(model, nn.Module) and (model._forward_hooks or model._forward_pre_hooks)
    function = model.forward if isinstance(model, nn.Module) and not hooked else model
    # Dynamo limits the recompilations of a function: `explain` must neither hit that limit nor count towards it.
    known = signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    with torch.no_grad():
        torch.compile(function, backend=backend, **isolated)(*args, **kwargs)
    return Explanation(tuple(reports))


def report(gm: fx.GraphModule, settings: CompilationSettings, break_reason: str | None = None) -> GraphReport:
    """The partition of one functional ATen graph as a `GraphReport`."""
    drop_tokens(gm)
    symbols = Symbols(device_of(gm))
    parts = partition(gm, reasons(gm, symbols), settings)
    locations = Locations()
    fallbacks = tuple(Fallback(str(node.target), why, locations.of(node)) for node, why in parts.fallbacks.items())
    return GraphReport(tuple(map(len, parts.blocks)), fallbacks, break_reason)


def _break_text(reason: Any) -> str:
    frame = reason.user_stack[-1] if reason.user_stack else None
    text = str(reason.reason).strip().splitlines()[0]
    return f"{text} ({frame.filename}:{frame.lineno})" if frame is not None else text
