"""Sizes and conditions of an FX graph as they were before PyTorch replaced what a check proves."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from torch_rtx.lowering.symbols import unbacked

SYM_QUERIES = frozenset((torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default))


def is_sym_node(node: fx.Node) -> bool:
    """Whether the node only computes a size or a condition on sizes, which is an expression in the IR."""
    if not isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | int | bool):
        return False
    if node.target in SYM_QUERIES:
        return True
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return not any(isinstance(v, torch.Tensor | torch.SymFloat | tuple | list) for v in values)


class ExactSizes:
    """Sizes and conditions as they were: after `torch._check(n == 3)`, `n`
    is 3 in the whole graph, and the condition to be checked is 3 == 3."""

    def __init__(self) -> None:
        self._env = ShapeEnv()  # without replacements
        self._values: dict[fx.Node, Any] = {}
        # By symbol: the name that a second trace gave it first. Any other name is that of another size, proved equal.
        self._names: dict[Any, Any] = {}

    def __call__(self, node: fx.Node) -> Any:
        """What the node of a size or of a condition computes."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if node.op == "call_function" and is_sym_node(node) and node.target not in SYM_QUERIES:
            return node.target(*fx.map_arg(node.args, self), **fx.map_arg(node.kwargs, self))  # type: ignore[operator]
        return self._original(value) if isinstance(value, torch.SymInt) else value

    def _original(self, size: torch.SymInt) -> torch.SymInt:
        now, before = size.node.expr, size.node._expr
        if now.is_Symbol and unbacked(size):
            before = now if self._names.setdefault(now, before) == before else before
        self._env.var_to_range = size.node.shape_env.var_to_range
        return torch.SymInt(SymNode(before, self._env, int, None))

    def meet(self, node: fx.Node) -> None:
        """Note the data-dependent sizes of the node's results: those are what their symbols stand for."""
        for tensor in pytree.tree_leaves(node.meta.get("val")):
            for size in tensor.shape if isinstance(tensor, torch.Tensor) else (tensor,):
                if isinstance(size, torch.SymInt):
                    self._original(size)

    def replaced(self, node: fx.Node) -> bool:
        """Whether the node reads a size that the data decides, in place of which the graph has another one."""
        value = node.meta.get("val")
        reads = isinstance(node.target, torch._ops.OpOverload) and (node.target in SYM_QUERIES or not is_sym_node(node))
        if not isinstance(value, torch.SymInt) or not reads:
            return False
        return bool(unbacked(self(node))) and self(node).node.expr != value.node.expr
