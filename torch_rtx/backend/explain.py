"""`explain`: reports which nodes of a model run in the engine, which fall back to PyTorch, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import unset_fake_temporarily

from torch_rtx.backend.capture import capture
from torch_rtx.backend.capture_errors import checked_model
from torch_rtx.backend.compiler import check_settings, device_of
from torch_rtx.backend.dynamo import Break, break_after, break_before, breaks
from torch_rtx.backend.entry import static_inputs
from torch_rtx.backend.partition import partition
from torch_rtx.ir import Loc
from torch_rtx.lowering.addressing import count_from_tensors
from torch_rtx.lowering.associative_scans import write_out_scans
from torch_rtx.lowering.effects import drop_tokens
from torch_rtx.lowering.flex_calls import name_flex_attention
from torch_rtx.lowering.from_fx import Role, from_fx
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.pipeline import quantized_floats
from torch_rtx.lowering.support import reasons
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings, settings_of


@dataclass(frozen=True)
class Fallback:
    """A node that stays in PyTorch, or a product of floats: its operator, the reason, and the line of the model that
    calls it."""

    op: str
    reason: str
    loc: Loc | None


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: node counts of the engine's blocks, the fallbacks, the reason of the graph break, and the
    products with a quantized operand that engines for a GPU compute with floats."""

    blocks: tuple[int, ...]
    fallbacks: tuple[Fallback, ...]
    break_reason: str | None
    floats: tuple[Fallback, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """How torch.compile(backend="rtx") partitions a model. `print` it, or read its attributes.

    Attributes:
        graphs: in the order in which they were captured.
        graph_breaks: where Dynamo leaves code to Python, and why. How many nodes that code would be is unknown: they
            are in no count.
    """

    graphs: tuple[GraphReport, ...]
    graph_breaks: tuple[str, ...] = ()

    @property
    def engine_nodes(self) -> int:
        """Nodes that run in engines."""
        return sum(sum(graph.blocks) for graph in self.graphs)

    @property
    def fallback_nodes(self) -> int:
        """Nodes of the graphs that stay in PyTorch."""
        return sum(len(graph.fallbacks) for graph in self.graphs)

    def __str__(self) -> str:
        title = _counted(len(self.graphs), "graph")
        if self.graph_breaks:
            title += ", " + _counted(len(self.graph_breaks), "graph break")
        title += f": {self.engine_nodes} nodes in engines, {self.fallback_nodes} fall back to PyTorch"
        if self.graph_breaks:
            title += ", and PyTorch runs what is between the graphs"
        lines = [title]
        for index, graph in enumerate(self.graphs):
            blocks = ", ".join(map(str, graph.blocks)) or "none"
            lines.append(f"graph {index}: blocks of {blocks} nodes")
            for what, found in (("fallback", graph.fallbacks), ("floats in", graph.floats)):
                for one in found:
                    lines.append(f"  {what} {one.op}: {one.reason}")
                    if one.loc is not None:
                        lines.append(f"    at {one.loc}")
        lines += [f"graph break: {text}" for text in self.graph_breaks]
        return "\n".join(lines)


def explain(
    model: Callable[..., Any], *args: Any, settings: CompilationSettings | None = None, **kwargs: Any
) -> Explanation:
    """Capture `model` for inference as torch.compile would, run it once in PyTorch, and report how it is partitioned.

    Args:
        model: a module or function; `args` and `kwargs` are passed to it.
        settings: those of the compilation to explain; `require_full_compilation` is ignored.

    Raises:
        CaptureError: the model is an engine or a ScriptModule, or does not take the arguments.
    """
    model = checked_model(model, args, kwargs)
    settings = replace(settings_of(CompilationSettings, settings), require_full_compilation=False)
    check_settings(settings)
    reports: list[GraphReport] = []
    found: list[Break | None] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        after = break_after(gm)
        found.extend((break_before(), after))

        def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            reports.append(report(graph, settings, None if after is None else str(after)))
            return make_boxed_func(graph.forward)

        return capture(gm, example_inputs, compiler, compiler, compiler, settings.logits_chunk_bytes)

    hooked = isinstance(model, nn.Module) and (model._forward_hooks or model._forward_pre_hooks)
    function = model.forward if isinstance(model, nn.Module) and not hooked else model
    # Dynamo limits the recompilations of a function: `explain` must neither hit that limit nor count towards it.
    known = signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    start, left = len(breaks(0)), _left()
    with torch.no_grad():
        torch.compile(function, backend=backend, **isolated)(*args, **kwargs)
    found += reversed(breaks(start))  # those without a graph before them
    if not reports and _left() > left:
        found.append(Break(f"{getattr(function, '__qualname__', function)} can't be compiled as a whole", "", 0))
    return Explanation(tuple(reports), tuple(dict.fromkeys(str(one) for one in found if one is not None)))


def report(
    gm: fx.GraphModule,
    settings: CompilationSettings,
    break_reason: str | None = None,
    roles: Sequence[Role] | None = None,
    symbols: Symbols | None = None,
    writes: Mapping[int, str] | None = None,
) -> GraphReport:
    """The partition of one functional ATen graph as a `GraphReport`.

    Args:
        roles, symbols, writes: see `from_fx`; None: those of a graph of torch.compile.
    """
    drop_tokens(gm)
    write_out_scans(gm)
    count_from_tensors(gm)
    name_flex_attention(gm)
    symbols = symbols or Symbols(device_of(gm))
    parts = partition(gm, reasons(gm, symbols), settings)
    locations = Locations()
    fallbacks = tuple(Fallback(str(node.target), why, locations.of(node)) for node, why in parts.fallbacks.items())
    if roles is None:
        static = static_inputs(gm)
        names = (node.name for node in gm.graph.nodes if node.op == "placeholder")
        roles = [Role("parameter" if index in static else "input", name) for index, name in enumerate(names)]
    with unset_fake_temporarily():  # passes compute constants
        graph = from_fx(gm, roles, parts.fallbacks, symbols, writes).graph
        floats = tuple(Fallback(node.op, why, node.loc) for node, why in quantized_floats(graph))
    return GraphReport(tuple(map(len, parts.blocks)), fallbacks, break_reason, floats)


def _left() -> int:
    """How many functions this process has tried to compile in vain."""
    return counters["frames"]["total"] - counters["frames"]["ok"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
