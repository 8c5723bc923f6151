"""Gradients of results that no loss depends on, such as the logits beside the loss of a language model.

Eager mode computes nothing from them: they are *undefined*. AOTAutograd's backward graph has an input for each, and
autograd passes zeros there, which take the memory of the result and are read and added like any gradient. Here autograd
passes None (`undefined_is_none`), and the first backward with another set of undefined gradients compiles a graph
without everything that is zero with them (`without`). A parameter whose gradients are all computed from undefined ones
has none at all, as in eager mode, whatever operators compute them.
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
# Results of AOTAutograd's function, and views that it makes of one afterwards.
_OWN = frozenset((OutputType.non_alias, OutputType.unsafe_view_alias))
_VIEWS = frozenset(
    (
        OutputType.alias_of_intermediate,
        OutputType.alias_of_intermediate_save_as_output,
        OutputType.alias_of_intermediate_base_is_user_output,
    )
)

# Operators that are linear in their first argument. Those whose name ends with `_backward` are, too.
_LINEAR = frozenset(
    """
    _conj _reshape_alias _to_copy _unsafe_view alias as_strided clone cumsum detach diagonal div expand flip gather imag
    index index_select mean narrow neg permute real repeat reshape roll select slice split split_with_sizes squeeze sum
    t transpose tril triu unbind unfold unsqueeze view view_as_complex view_as_real
    """.split()  # noqa: SIM905
)
_PRODUCTS = frozenset(("mul", "mm", "bmm", "matmul", "mv", "dot"))  # of their first two arguments, linear in both
_SUMS = frozenset(("add", "sub"))
# Operators that are linear in several arguments together, and the positions of these.
_TOGETHER = {
    "add": (0, 1),
    "sub": (0, 1),
    "where": (1, 2),
    "masked_fill": (0, 2),
    "constant_pad_nd": (0, 2),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "diagonal_scatter": (0, 1),
    "index_put": (0, 2),
    "_unsafe_index_put": (0, 2),
    "index_add": (0, 3),
    "scatter": (0, 3),
    "scatter_add": (0, 3),
}
# Operators that make zeros, or repeat the number at this position of their arguments.
_CONSTANTS = {"zeros": None, "zeros_like": None, "new_zeros": None, "full": 1, "full_like": 1, "new_full": 2}


def defined(gradient: torch.Tensor | None, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """The gradient; zeros if it is undefined. Backward graphs call it with each gradient, for compiled autograd,
    which runs them as they are."""
    return torch.zeros(size, dtype=dtype, device=device) if gradient is None else gradient


class Tolerating:
    """`partitioner`, whose backward graph takes None for an undefined gradient. That of a single result is undefined if
    the next function, as after a graph break, has other results, too, and only these are used.

    Attributes:
        tolerates: whether the last backward graph does.
    """

    def __init__(self, partitioner: Partitioner) -> None:
        self._partitioner, self.tolerates = partitioner, False

    def __call__(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = self._partitioner(joint, inputs, **options)
        if not inputs:  # the graphs of a nested region, which other graphs call
            return forward, backward
        placeholders, symbols = backward.graph.find_nodes(op="placeholder"), _symbols(backward.graph)
        gradients = [node for node in placeholders if node.name.startswith("tangents_")]  # AOTAutograd's name for them
        sizes = [_size(node, symbols) for node in gradients]
        self.tolerates = bool(sizes) and None not in sizes
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
    kinds = [info.output_type if info.requires_grad else None for info in meta.output_info]
    index = next((i for i, kind in enumerate(kinds) if kind in _OWN or kind in _VIEWS), None)
    if index is None:
        return call
    is_view = kinds[index] in _VIEWS

    def keeping(*args: Any) -> Any:
        results = call(*args)
        own = results[index]._base if is_view else results[index]
        own.grad_fn.materialize_grads = False  # all results have the same, which a backward reads
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

    It has the same placeholders; those of undefined gradients are None. What is zero with these is not computed. (JAX
    calls such values symbolic zeros.) Results that are computed from them, and from no other gradient, are None.
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
        zeros: the nodes so far that are zero with the gradients that are undefined.
        undefined: those computed from such gradients, and from no others. In eager mode nothing computes them.
        given: those computed from other gradients.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph, self._symbols = graph, _symbols(graph)
        self.zeros, self.undefined, self.given = set[fx.Node](), set[fx.Node](), set[fx.Node]()

    def simplify(self, node: fx.Node) -> None:
        """Replace `node`, or note that it is zero."""
        if node.target is defined:
            gradient: Any = node.args[0]
            if gradient.meta["val"] is None:
                self.zeros.add(node)
                self.undefined.add(node)
            else:
                node.replace_all_uses_with(gradient)
                self.given.add(gradient)
        elif node.op == "output":
            node.args = (fx.map_arg(node.args[0], lambda result: None if result in self.undefined else result),)
            self._write_inputs(node)
        else:
            kind = next((k for k in (self.given, self.undefined) if not k.isdisjoint(node.all_input_nodes)), set())
            kind.add(node)
            if not self.zeros.isdisjoint(node.all_input_nodes):
                self._apply_rules(node)

    def _apply_rules(self, node: fx.Node) -> None:
        """The same of a call that reads zeros."""
        if _is_zero(node, self.zeros):
            self.zeros.add(node)
        elif node in self.given and (other := self._addend(node)) is not None:
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
        self.given.add(made)
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
    target: Any = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """`node`, which reads some of `zeros`, is zero with them."""
    name, args = _name(node), node.args
    if name in _PRODUCTS:
        return args[0] in zeros or args[1] in zeros
    if name in _TOGETHER:
        return all(args[i] in zeros or _is_constant_zero(args[i]) for i in _TOGETHER[name] if i < len(args))
    if name in ("cat", "stack"):
        return all(part in zeros or _is_constant_zero(part) for part in args[0])  # type: ignore[union-attr]
    linear = name in _LINEAR or name == "getitem" or name.endswith(("_backward", "_backward_data"))
    return linear and args[0] in zeros and zeros.isdisjoint(node.all_input_nodes[1:])


def _is_constant_zero(given: Any) -> bool:
    """A number, or a tensor that a graph makes of one, is zero."""
    if not isinstance(given, fx.Node):
        return isinstance(given, (int, float)) and given == 0
    position = _CONSTANTS.get(_name(given), -1)
    return position is None or (position > 0 and _is_constant_zero(given.args[position]))
