"""Partitions a captured FX graph into engine blocks and nodes that fall back to PyTorch, in linear time.

Each node gets a level: the maximum over its inputs, plus one where an engine node reads a fallback node. The engine
nodes of one level form a block. No path between two nodes of a block leaves it, so that a block could run as one unit.
Blocks and fallback nodes stay in one graph and one plan.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import fx

from torch_rtx.errors import PartitionError, SettingsError
from torch_rtx.lowering.control_flow import inner_nodes
from torch_rtx.lowering.exact_sizes import is_sym_node
from torch_rtx.lowering.from_fx import DROPPED
from torch_rtx.lowering.location import Locations
from torch_rtx.settings import CompilationSettings


@dataclass
class Partition:
    """`blocks` of the engine in order, and the `fallbacks` with their reasons."""

    blocks: list[list[fx.Node]]
    fallbacks: dict[fx.Node, str]

    def __str__(self) -> str:
        lines = [f"block {index}: {', '.join(map(str, block))}" for index, block in enumerate(self.blocks)]
        lines += [f"fallback {node} ({node.target}): {why}" for node, why in self.fallbacks.items()]
        return "\n".join(lines) + "\n"


def partition(gm: fx.GraphModule, reason: Callable[[fx.Node], str | None], settings: CompilationSettings) -> Partition:
    """The partition of `gm`.

    Args:
        reason: returns why the engine can't hold a node, or None.

    Raises:
        PartitionError: `require_full_compilation` is set and a node falls back.
    """
    nodes = [node for node in gm.graph.nodes if _computes(node)]
    fallbacks: dict[fx.Node, str] = {}

    def visit(node: fx.Node) -> None:
        why = "listed in torch_executed_ops" if _listed(node, settings.torch_executed_ops) else reason(node)
        if why is not None:
            fallbacks[node] = why
            return
        for inner in filter(_computes, inner_nodes(node, deep=False)):
            visit(inner)

    for node in nodes:
        visit(node)
    blocks = _levels(gm.graph, fallbacks)
    small = [block for block in blocks if len(block) < settings.min_block_size]
    for block in small:
        why = f"its block has {len(block)} nodes, min_block_size is {settings.min_block_size}"
        fallbacks |= dict.fromkeys(block, why)
    if fallbacks and settings.require_full_compilation:
        locations = Locations()
        lines = [f"  {node.target}: {why} (at {locations.of(node)})" for node, why in fallbacks.items()]
        raise PartitionError(
            "require_full_compilation is set and these nodes must fall back:\n" + "\n".join(lines),
            hint="explain() shows the same without compiling",
        )
    return Partition([block for block in blocks if block not in small], fallbacks)


def check_ops(settings: CompilationSettings) -> None:
    """Raises SettingsError if `torch_executed_ops` names an unknown operator."""
    for name in sorted(settings.torch_executed_ops):
        if not _exists(name):
            hint = "names look like aten.exp or aten.exp.default"
            raise SettingsError(f"torch_executed_ops: no operator {name}", hint=hint)


def _computes(node: fx.Node) -> bool:
    """The node computes something: it is not getitem, a size, a check that the IR makes redundant, or the trailing
    `copy_` into an input, which the program executes whether or not the copied value falls back."""
    if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":  # type: ignore[union-attr]
        return False
    return (
        node.op in ("call_function", "call_method", "call_module")
        and node.target is not operator.getitem
        and node.target not in DROPPED
        and not is_sym_node(node)
    )


def _exists(name: str) -> bool:
    """There is an operator `name`: namespace.op, namespace.op.overload, or the name of a higher-order operator."""
    namespace, *path = name.split(".") if "." in name else ("higher_order", name)
    found = getattr(torch.ops, namespace)
    for part in path:
        found = getattr(found, part, None)
    return found is not None


def _listed(node: fx.Node, names: Set[str]) -> bool:
    name = str(node.target)
    return bool(names) and (name in names or name.rpartition(".")[0] in names)


def _levels(graph: fx.Graph, fallbacks: dict[fx.Node, str]) -> list[list[fx.Node]]:
    level: dict[fx.Node, int] = {}
    blocks: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        inside = _computes(node) and node not in fallbacks
        level[node] = max((level[n] + (inside and n in fallbacks) for n in node.all_input_nodes), default=0)
        if inside:
            blocks.setdefault(level[node], []).append(node)
    return [blocks[key] for key in sorted(blocks)]
