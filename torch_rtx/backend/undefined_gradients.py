"""Gradients of results that no loss depends on, such as the logits beside the loss of a language model.

Eager mode computes nothing from them: they are *undefined*. AOTAutograd's backward graph has an input for each, and
autograd passes zeros there, which take the memory of the result and are read and added like any gradient. Here autograd
passes None (`undefined_is_none`), and the first backward with another set of undefined gradients compiles a graph
without everything that is zero with them (`without`). A parameter that gets no other gradient then has none at all, as
in eager mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.schemas import OutputType, ViewAndMutationMeta

from torch_rtx.backend.training import Partitioner, traced

aten = torch.ops.aten
Call = Callable[[list[Any]], Any]
Missing = frozenset[int]  # positions of placeholders whose gradient is undefined

# Operators that are linear in their first argument. Those whose name ends with `_backward` are, too.
_LINEAR = frozenset(
    """
    _conj _reshape_alias _to_copy _unsafe_view alias as_strided clone detach diagonal div expand flip gather imag index
    index_select mean narrow neg permute real repeat reshape roll select slice split split_with_sizes squeeze sum t
    transpose tril triu unbind unfold unsqueeze view view_as_complex view_as_real
    """.split()  # noqa: SIM905
)
_PRODUCTS = frozenset(("mul", "mm", "bmm", "matmul", "mv", "dot"))  # of their first two arguments, linear in both
_SUMS = frozenset(("add", "sub"))


def defined(gradient: torch.Tensor | None, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """The gradient; zeros if it is undefined. Backward graphs call it with each of several gradients, for compiled
    autograd, which runs them as they are."""
    return torch.zeros(size, dtype=dtype, device=device) if gradient is None else gradient


class Tolerating:
    """`partitioner`, whose backward graph takes None for an undefined gradient where it has several.

    Attributes:
        tolerates: whether the last backward graph does.
    """

    def __init__(self, partitioner: Partitioner) -> None:
        self._partitioner, self.tolerates = partitioner, False

    def __call__(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = self._partitioner(joint, inputs, **options)
        placeholders, symbols = backward.graph.find_nodes(op="placeholder"), _symbols(backward.graph)
        gradients = [node for node in placeholders if node.name.startswith("tangents_")]  # AOTAutograd's name for them
        sizes = [_size(node, symbols) for node in gradients]
        self.tolerates = len(gradients) > 1 and None not in sizes
        for node, size in zip(gradients, sizes, strict=True) if self.tolerates else ():
            value = node.meta["val"]
            with backward.graph.inserting_before(_first_call(backward.graph)):
                made = backward.graph.call_function(defined, (node, size, value.dtype, value.device))
            made.meta["val"] = value
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        backward.recompile()
        return forward, backward


def _symbols(graph: fx.Graph) -> dict[object, fx.Node]:
    """The placeholders of the symbols of sizes."""
    values = [(node, node.meta.get("val")) for node in graph.find_nodes(op="placeholder")]
    return {value.node.expr: node for node, value in values if isinstance(value, torch.SymInt)}


def _size(node: fx.Node, symbols: Mapping[object, fx.Node]) -> list[Any] | None:
    """The size of a tensor as arguments of a call; None if placeholders do not tell it."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    size = [symbols.get(dim.node.expr) if isinstance(dim, torch.SymInt) else dim for dim in value.shape]
    return None if None in size else size


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def positions(backward: fx.GraphModule) -> list[int]:
    """Those of the placeholders for which None may be passed."""
    placeholders = backward.graph.find_nodes(op="placeholder")
    return [i for i, node in enumerate(placeholders) if any(user.target is defined for user in node.users)]


def undefined_is_none(call: Callable[..., Any], meta: ViewAndMutationMeta) -> Callable[..., Any]:
    """`call`, a function from AOTAutograd whose backward takes None for undefined gradients, so that it gets them."""
    kinds = [info.requires_grad and info.output_type is OutputType.non_alias for info in meta.output_info]
    if True not in kinds:
        return call
    index = kinds.index(True)

    def keeping(*args: Any) -> Any:
        results = call(*args)
        results[index].grad_fn.materialize_grads = False  # all results have the same, which a backward reads
        return results

    return keeping


def specializing(
    positions: Sequence[int],
    graph: Callable[[], fx.GraphModule],
    compile: Callable[[fx.GraphModule], Call],
    compiled: Iterable[tuple[Missing, Call]] = (),
) -> Call:
    """A boxed callable for a backward graph: one compiled graph for each set of undefined gradients that occurs.

    Args:
        positions: of the gradients that may be undefined among the arguments.
        graph: returns the backward graph; it is not called before a set occurs that is not among `compiled`.
        compile: compiles what `without` made for a set.
    """
    calls, lock = dict(compiled), threading.Lock()

    def call(args: list[Any]) -> Any:
        missing = frozenset([i for i in positions if args[i] is None])
        if missing not in calls:
            with lock:
                if missing not in calls:
                    calls[missing] = compile(without(graph(), missing))
        return calls[missing](args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def without(backward: fx.GraphModule, missing: Collection[int]) -> fx.GraphModule:
    """A copy of `backward` for gradients of which those at the positions `missing` are undefined, and no others.

    It has the same placeholders; those of undefined gradients are None. What is zero with these is not computed, and
    is None among the results. (JAX calls such values symbolic zeros.)
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(backward.graph, copies))
    graph.output_node().meta = dict(backward.graph.output_node().meta)
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if position in missing:
            node.meta["val"] = None
    rules = _Zeros(graph)
    for node in list(graph.nodes):
        rules.simplify(node)
    graph.eliminate_dead_code()
    return fx.GraphModule(backward, graph)


class _Zeros:
    """What is zero in a graph.

    Attributes:
        zeros: the nodes so far.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph, self._symbols = graph, _symbols(graph)
        self.zeros = set[fx.Node]()

    def simplify(self, node: fx.Node) -> None:
        """Replace `node`, or note that it is zero."""
        if node.target is defined:
            gradient: Any = node.args[0]
            if gradient.meta["val"] is None:
                self.zeros.add(node)
            else:
                node.replace_all_uses_with(gradient)
        elif node.op == "output":
            node.args = (fx.map_arg(node.args[0], lambda result: None if result in self.zeros else result),)
        elif not self.zeros.isdisjoint(node.all_input_nodes):
            if _is_zero(node, self.zeros):
                self.zeros.add(node)
            elif (other := self._addend(node)) is not None:
                node.replace_all_uses_with(other)
            else:
                self._write_inputs(node)

    def _addend(self, node: fx.Node) -> fx.Node | None:
        """What a sum with zero is; None if `node` is none."""
        if _name(node) not in _SUMS:
            return None
        first, second = node.args[:2]
        value, result = second if first in self.zeros else first, node.meta["val"]
        if not isinstance(value, fx.Node) or node.kwargs.get("alpha", 1) != 1:
            return None
        if value is second and _name(node) == "sub":
            value = self._call(node, aten.neg.default, value)
        if value.meta["val"].dtype != result.dtype:
            value = self._call(node, aten._to_copy.default, value, dtype=result.dtype)
        if value.meta["val"].shape != result.shape:
            size = _size(node, self._symbols)
            value = None if size is None else self._call(node, aten.expand.default, value, size)
        return value

    def _call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(before):
            made = self._graph.call_function(target, args, kwargs)
        made.meta = {**before.meta, "val": traced(target, args, kwargs)}
        return made

    def _write_inputs(self, node: fx.Node) -> None:
        """Let `node` read zeros from memory where it reads one of `zeros`."""
        for zero in [given for given in node.all_input_nodes if given in self.zeros]:
            value = zero.meta["val"]
            size: Any = zero.args[1] if zero.target is defined else _size(zero, self._symbols)
            if size is None:
                self._write_inputs(zero)
                self.zeros.discard(zero)
            else:
                with self._graph.inserting_before(zero):
                    options = {"dtype": value.dtype, "device": value.device}
                    full = self._graph.call_function(aten.full.default, (size, 0), options)
                full.meta = {**zero.meta}
                node.replace_input_with(zero, full)


def _name(node: fx.Node) -> str:
    return (
        node.target._opname if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    )


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    name, args = _name(node), node.args
    if name in _PRODUCTS:
        return args[0] in zeros or args[1] in zeros
    if name in _SUMS:
        return args[0] in zeros and args[1] in zeros
    if name in ("cat", "stack"):
        return all(part in zeros for part in args[0])  # type: ignore[union-attr]
    if name == "where":
        return args[1] in zeros and args[2] in zeros
    linear = name in _LINEAR or name == "getitem" or name.endswith(("_backward", "_backward_data"))
    return linear and args[0] in zeros and zeros.isdisjoint(node.all_input_nodes[1:])
