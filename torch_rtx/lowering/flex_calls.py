"""Gives calls of `flex_attention` in a captured graph the form that engines hold: see `flex_attention` of the package.

PyTorch's operators are of higher order: their modifications of scores are graph modules. These become text; what they
compute of captured tensors alone is computed once, before the call.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils import _pytree as pytree

from torch_rtx import aten
from torch_rtx.errors import InvalidIR, Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.captured_gradients import PROBLEM, Gradients, total_of
from torch_rtx.lowering.from_fx import attribute, call_arguments, number_of, op_of
from torch_rtx.score_mods import INDEX, OPS, PLACES, buffer, is_place, modification, scalar, terms_of

log = logging.getLogger(__name__)
aten_ops = torch.ops.aten
FORWARD = torch.ops.higher_order.flex_attention
BACKWARD = torch.ops.higher_order.flex_attention_backward
WHY = "torch_rtx_problem"  # of a call that stays, among its meta data
SINGLE = 1 << 30  # the block size of a mask that lists one block, of everything
LISTS, LISTS_BY_KEYS = slice(2, 6), slice(6, 10)  # in a block mask: of blocks of keys, and of blocks of queries
ROUNDED = ("f32", "f64")  # to narrower floats
OMITTED = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
ALIASES = frozenset(
    getattr(torch.ops.aten, name).default for name in ("alias", "detach", "clone", "lift_fresh", "lift_fresh_copy")
)
# What makes one number, and which.
FILLED: dict[str, Callable[..., Any]] = {
    "aten.scalar_tensor.default": lambda number: number,
    "aten.full.default": lambda size, number: number,
    "aten.full_like.default": lambda like, number: number,
    "aten.new_full.default": lambda like, size, number: number,
    **dict.fromkeys((f"aten.{name}.default" for name in ("ones", "ones_like", "new_ones")), lambda *_: 1),
    **dict.fromkeys((f"aten.{name}.default" for name in ("zeros", "zeros_like", "new_zeros")), lambda *_: 0),
}


def name_flex_attention(gm: fx.GraphModule) -> None:
    """Replace the calls in `gm`; those with a modification that no text expresses stay, and fall back."""
    replacements = {FORWARD: _replace_forward, BACKWARD: _replace_backward}
    calls = [node for target in replacements for node in gm.graph.find_nodes(op="call_function", target=target)]
    for node in calls:
        try:
            replacements[node.target](gm, node)
        except (Unsupported, InvalidIR) as error:
            log.info("%s stays PyTorch's own: %s", node, error.message)
            node.meta[WHY] = error.message
    if calls:
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _replace_forward(gm: fx.GraphModule, node: fx.Node) -> None:
    given: Any = node.args
    query, key, value, score_mod, mask, scale, _, score_buffers, mask_buffers = given
    writer = _Writer(gm, node)
    dtype = _wide(query)
    texts = {
        "score_mod": writer.text(score_mod, score_buffers, dtype),
        "mask_mod": writer.text(mask[-1], mask_buffers),
    }
    blocks, sizes = _blocks(mask, LISTS)
    out = node.meta["val"][0]
    options = {"scale": scale, **texts, "block_size": sizes, "order": _order(out)}
    target = torch.ops.torch_rtx.flex_attention.default
    made = writer.emit(target, (query, key, value, blocks, writer.buffers), options)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)


def _replace_backward(gm: fx.GraphModule, node: fx.Node) -> None:
    given: Any = node.args
    operands, (gradient, of_logsumexp), mods = given[:5], given[5:7], given[7:9]
    mask, scale, _, score_buffers, mask_buffers = given[9:]
    query, key, value, out, logsumexp = operands
    results: dict[Any, fx.Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(results) < len(node.users):
        raise Unsupported("gradients that are read as a whole")
    if gradient is None:
        raise Unsupported("a gradient of statistics alone")
    writer, dtype = _Writer(gm, node), _wide(query)
    options = {
        "scale": scale,
        "score_mod": writer.text(mods[0], score_buffers, dtype),
        "mask_mod": writer.text(mask[-1], mask_buffers),
        "score_gradient": writer.text(mods[1], score_buffers, dtype, gradient=True),
    }
    delta = writer.emit(aten_ops.mul.Tensor, (_as(writer, gradient, torch.float32), _as(writer, out, torch.float32)))
    delta = writer.emit(aten_ops.sum.dim_IntList, (delta, [-1]))
    if of_logsumexp is not None:
        shift = writer.emit(aten_ops.mul.Tensor, (of_logsumexp, 1 / math.log(2)))
        delta = writer.emit(aten_ops.sub.Tensor, (delta, shift))
    made: dict[int, fx.Node] = {}
    tensors = (gradient, query, key, value, logsumexp, delta)
    captured = _captured(writer, results.get(3), mods[1], score_buffers, tensors, options, mask)
    orders = [_order(one) for one in node.meta["val"][:3]]
    if 0 in results:
        blocks, options["block_size"] = _blocks(mask, LISTS)
        target = torch.ops.torch_rtx.flex_attention_grad_query.default
        made[0] = writer.emit(target, (*tensors, blocks, writer.buffers), {**options, "order": orders[0]})
    if 1 in results or 2 in results:
        blocks, options["block_size"] = _blocks(mask, LISTS_BY_KEYS)
        target = torch.ops.torch_rtx.flex_attention_grad_key_value.default
        laid_out = {"key_order": orders[1], "value_order": orders[2]}
        both = writer.emit(target, (*tensors, blocks, writer.buffers), {**options, **laid_out})
        made |= {index: writer.emit(operator.getitem, (both, index - 1)) for index in (1, 2)}
    for index, user in results.items():
        if index in made:
            user.replace_all_uses_with(made[index])
        for one in list(user.users):
            if one in captured:
                one.replace_all_uses_with(captured[one])
            gm.graph.erase_node(one)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _captured(
    writer: _Writer,
    results: fx.Node | None,
    joint: fx.Node,
    given: Sequence[Any],
    tensors: Sequence[fx.Node],
    options: dict[str, Any],
    mask: Sequence[Any],
) -> dict[fx.Node, fx.Node]:
    """By the node that reads the gradient of a captured tensor: what is in its place; those of others are None.

    Raises:
        Unsupported: a gradient is no sum over scores.
    """
    read = [user for user in results.users if user.users] if results is not None else []
    if any(user.target is not operator.getitem for user in read):
        raise Unsupported("gradients of captured tensors that are read as a whole")
    if not read:
        return {}
    text, mod, nodes = writer.gradients(joint, given, [user.args[1] for user in read], _wide(tensors[1]))  # type: ignore[misc]
    assert mod.gradients is not None
    total: fx.Node | None = None
    if text:
        blocks, size = _blocks(mask, LISTS)
        _, arguments = mod.gradients.texts()
        elements = total_of(arguments["sizes"], arguments["ranks"])
        like = {"dtype": _wide(tensors[1]), "device": tensors[1].meta["val"].device}
        zeros = writer.emit(aten_ops.full.default, ([elements], 0), like)
        same = {name: options[name] for name in ("scale", "score_mod", "mask_mod")}
        outer = {**same, **arguments, "block_size": size, "gradients": text}
        target = torch.ops.torch_rtx.flex_attention_grad_captured.default
        total = writer.emit(target, (zeros, *tensors, blocks, writer.buffers), outer)
    found = mod.gradients.finish(total, writer.emit)
    return {user: found(mod.gradients.result(node)) for user, node in zip(read, nodes, strict=True)}


def _as(writer: _Writer, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
    if tensor.meta["val"].dtype in (dtype, torch.float64):
        return tensor
    return writer.emit(aten_ops._to_copy.default, (tensor,), {"dtype": dtype})


def _wide(query: Any) -> torch.dtype:
    return torch.promote_types(query.meta["val"].dtype, torch.float32)


def _order(like: torch.Tensor) -> list[int]:
    """The order of dimensions in memory."""
    steps = [one if isinstance(one, int) else one.node.hint for one in like.stride()]
    return sorted(range(like.dim()), key=lambda axis: (-steps[axis], axis))


def _blocks(mask: Sequence[Any], lists: slice) -> tuple[list[fx.Node], list[int]]:
    """The lists of a block mask, and the queries and keys of a block; none of a mask of a single block.

    Raises:
        Unsupported: the lists are not there.
    """
    # Where PyTorch left the size of blocks open it is fixed now: kernels are made for it.
    sizes = [int(one.meta["val"] if isinstance(one, fx.Node) else one) for one in mask[-3:-1]]
    if min(sizes) >= SINGLE:
        return [], []
    found = [one for one in mask[lists] if one is not None]
    if len(found) not in (2, 4):
        raise Unsupported("a block mask without lists of blocks")
    return found, sizes


@dataclass
class _Partial:
    """A tensor that is indexed along its first dimensions."""

    buffer: fx.Node
    indices: list[Any]


@dataclass
class _Writer:
    """Writes modifications of one call as text.

    Attributes:
        buffers: what they read, in the outer graph.
    """

    gm: fx.GraphModule
    call: fx.Node
    buffers: list[fx.Node] = field(default_factory=list)

    def text(
        self, mod: fx.Node, given: Sequence[Any], score: torch.dtype | None = None, *, gradient: bool = False
    ) -> str:
        """The text of a modification; "" of one that changes and hides nothing.

        Args:
            given: the captured tensors and numbers.
            score: the dtype of scores; None: it is a mask.
            gradient: it computes the gradient of the score, and of what is captured, from that of the modified score.

        Raises:
            Unsupported: no text expresses it.
        """
        inner = attribute(self.gm, mod)
        found = _Mod(self, inner)
        names = ["score", *PLACES] if score is not None else list(PLACES)
        found.begin([*names, "g"] if gradient else names, given, score)
        output = found.write()
        unchanged = True if score is None else found.scalars["g" if gradient else "score"]
        if output is unchanged:
            return ""
        if not isinstance(output, Value):
            output = found.constant(output, torch.bool if score is None else score)
        text = str(found.graph(output)).strip()
        modification(text)
        return text

    def gradients(
        self, joint: fx.Node, given: Sequence[Any], which: Sequence[int], score: torch.dtype
    ) -> tuple[str, _Mod, list[fx.Node]]:
        """The text of gradients of captured tensors, how it was made, and the node of each gradient in the module.

        Args:
            which: of `given` have gradients.
        """
        found = _Mod(self, attribute(self.gm, joint))
        found.begin(["score", *PLACES, "g"], given, score)
        found.gradients = Gradients(found.env, found.widened)
        leaves = found.results()
        nodes = [leaves[len(PLACES) + 1 + index] for index in which]
        if not all(isinstance(one, fx.Node) for one in nodes):
            raise Unsupported(PROBLEM)
        found.run(nodes)
        for one in nodes:
            found.gradients.result(one)
        outputs, arguments = found.gradients.texts()
        if not outputs:
            return "", found, nodes
        text = str(found.graph(*outputs)).strip()
        terms_of(text, **arguments)
        return text, found, nodes

    def place_of(self, buffer: fx.Node) -> int:
        """Which of `buffers` a tensor of the outer graph is."""
        if buffer not in self.buffers:
            self.buffers.append(buffer)
        return self.buffers.index(buffer)

    def emit(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A call in the outer graph, before the one that is replaced."""
        with self.gm.graph.inserting_before(self.call):
            made = self.gm.graph.call_function(target, args, kwargs or {})
        values = pytree.tree_map_only(fx.Node, lambda one: one.meta["val"], (args, kwargs or {}))
        mode = getattr(self.call.meta["val"][0], "fake_mode", torch.no_grad())
        with mode:
            made.meta = {**self.call.meta, "val": target(*values[0], **values[1])}
        return made


@dataclass
class _Mod:
    """One modification: from its graph module to nodes of the IR.

    Attributes:
        env: by node of the module, a value of the modification, a number, a node of the outer graph or a partly
            indexed one.
    """

    writer: _Writer
    inner: fx.GraphModule
    env: dict[fx.Node, Any] = field(default_factory=dict)
    scalars: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    gradients: Gradients | None = None

    def begin(self, names: Sequence[str], given: Sequence[Any], score: torch.dtype | None) -> None:
        """Name the inputs."""
        placeholders = self.inner.graph.find_nodes(op="placeholder")
        for name, node in zip(names, placeholders, strict=False):
            dtype = "i32" if name in PLACES else aten.dtype_name(score or torch.float32)
            self.env[node] = self.scalars[name] = scalar(name, dtype)
        for node, outer in zip(placeholders[len(names) :], given, strict=True):
            self.env[node] = outer

    def write(self) -> Any:
        """Write all calls; returns the result: a value or a number."""
        result = self.results()[0]
        if not isinstance(result, fx.Node):
            raise Unsupported("a modification of scores without a result")
        self.run([result])
        return self._operand(self.env[result])

    def results(self) -> list[Any]:
        """What the module returns: of one that computes gradients, those of the score, the places and what is
        captured."""
        (output,) = self.inner.graph.find_nodes(op="output")
        return pytree.tree_leaves(output.args)

    def run(self, results: Sequence[fx.Node]) -> None:
        """Write the calls that results need."""
        needed = set().union(*map(_needed, results))
        for node in self.inner.graph.nodes:
            if node not in needed or node.op == "placeholder":
                continue
            if node.op not in ("get_attr", "call_function"):
                raise Unsupported(f"a modification of scores with a {node.op}")
            if self.gradients is not None and self.gradients.takes(node):
                self.env[node] = self.gradients.call(node)
            else:
                self.env[node] = self._attribute(node) if node.op == "get_attr" else self._call(node)

    def widened(self, number: Value) -> Value:
        """What a number was before it was rounded."""
        made = next((node for node in self.nodes if number in node.results), None)
        source = made.arg("self") if made is not None and made.op == "aten._to_copy.default" else None
        is_float = isinstance(source, Value) and isinstance(source.type, TensorType) and source.type.dtype in ROUNDED
        return source if is_float else number  # type: ignore[return-value]

    def graph(self, *outputs: Value) -> Graph:
        """What was written."""
        read = {value.name for node in self.nodes for value in node.inputs} | {value.name for value in outputs}
        inputs = [value for value in (*self.scalars.values(), *self.inputs.values()) if value.name in read]
        return Graph("import", tuple(inputs), nodes=tuple(self.nodes), outputs=outputs)

    def constant(self, number: bool | int | float, dtype: torch.dtype) -> Value:
        """A number as a value."""
        args = (("size", ()), ("fill_value", number), ("dtype", aten.dtype_name(dtype)))
        return self._append("aten.full.default", args, dtype)

    def _attribute(self, node: fx.Node) -> Any:
        content = attribute(self.inner, node)
        number = number_of(content) if isinstance(content, torch.Tensor) and not content.dim() else None
        if number is None:
            raise Unsupported("a modification of scores with a constant tensor")
        return self.constant(number, content.dtype)

    def _call(self, node: fx.Node) -> Any:
        arguments = [self.env.get(one) for one in node.all_input_nodes]
        if arguments and not any(isinstance(one, Value | _Partial) for one in arguments):
            return self._outside(node)
        op = op_of(node)
        if node.target in ALIASES and len(arguments) == 1:
            return arguments[0]
        if not isinstance(op, torch._ops.OpOverload):
            raise Unsupported(f"{node.target} in a modification of scores")
        if str(op) in (INDEX, "aten._unsafe_index.Tensor"):
            return self._index(node)
        if str(op) in FILLED and not node.meta["val"].dim():
            number = FILLED[str(op)](*node.args)
            if isinstance(number, bool | int | float):
                dtype = node.meta["val"].dtype
                return True if dtype == torch.bool and number else self.constant(number, dtype)
        op = self._of_tensors(op, node)
        if str(op) not in OPS:
            raise Unsupported(f"{op} in a modification of scores")
        args, metas = [], {}
        for name, given in call_arguments(node):
            if name in OMITTED:
                continue
            attr, metas[name] = self._attr(given)
            args.append((name, attr))
        made = op(**metas)
        if made.dim():
            raise Unsupported(f"{op} of whole tensors in a modification of scores")
        return self._append(str(op), tuple(args), made.dtype)

    def _of_tensors(self, op: torch._ops.OpOverload, node: fx.Node) -> torch._ops.OpOverload:
        """The overload that takes tensors in place of numbers of the capture, which are values here."""
        others = [one for one in node.args[1:] if isinstance(one, fx.Node)]
        is_scalar = op._overloadname == "Scalar" and any(_is_number(self.env[one]) for one in others)
        return getattr(op._overloadpacket, "Tensor", op) if is_scalar else op

    def _outside(self, node: fx.Node) -> Any:
        """A call that reads captured tensors alone, in the outer graph."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: self.env[one])
        return self.writer.emit(node.target, args, kwargs)

    def _index(self, node: fx.Node) -> Any:
        given: Any = node.args
        source, places = given[:2]
        read = self.env[source]
        partial = read if isinstance(read, _Partial) else _Partial(read, [])
        if not isinstance(partial.buffer, fx.Node) or any(one is None for one in places):
            raise Unsupported("an index of what is no captured tensor in a modification of scores")
        if isinstance(read, Value):
            raise Unsupported("an index of a number in a modification of scores")
        found = _Partial(partial.buffer, [*partial.indices, *(self._operand(self.env[one]) for one in places)])
        content = found.buffer.meta["val"]
        if not all(isinstance(one, Value) and is_place(one.type) for one in found.indices):
            raise Unsupported("an index that is no whole number in a modification of scores")
        if len(found.indices) < content.dim():
            return found
        args = (("self", self._buffer(found.buffer)), ("indices", tuple(found.indices)))
        return self._append(INDEX, args, content.dtype)

    def _buffer(self, outer: fx.Node) -> Value:
        content = outer.meta["val"]
        value = buffer(self.writer.place_of(outer), aten.dtype_name(content.dtype), content.dim())
        return self.inputs.setdefault(value.name, value)

    def _operand(self, found: Any) -> Any:
        """A value or number for what a call reads."""
        if isinstance(found, _Partial):
            raise Unsupported("a part of a captured tensor in a modification of scores")
        if isinstance(found, py_sym_types) or (isinstance(found, fx.Node) and _is_number(found)):
            dtype = torch.float64 if isinstance(_content(found), torch.SymFloat) else torch.int64
            device = self.writer.call.meta["val"][0].device
            found = self.writer.emit(torch.ops.aten.scalar_tensor.default, (found,), {"dtype": dtype, "device": device})
        if isinstance(found, fx.Node):
            if found.meta["val"].dim():
                raise Unsupported("a whole captured tensor in a modification of scores")
            return self._buffer(found)
        return found

    def _attr(self, given: Any) -> tuple[Attr, Any]:
        """An argument, and what stands for it where types are inferred."""
        if isinstance(given, fx.Node):
            found = self._operand(self.env[given])
            if not isinstance(found, Value):
                return found, found
            assert isinstance(found.type, TensorType)
            return found, torch.empty((), dtype=aten.DTYPES[found.type.dtype], device="meta")
        if isinstance(given, torch.dtype):
            return aten.dtype_name(given), given
        if given is not None and not isinstance(given, bool | int | float | str):
            raise Unsupported(f"an argument of type {type(given).__name__} in a modification of scores")
        return given, given

    def _append(self, op: str, args: tuple[tuple[str, Attr], ...], dtype: torch.dtype) -> Value:
        made = scalar(f"t{len(self.nodes)}", aten.dtype_name(dtype))
        self.nodes.append(Node("op", op, args, (made,)))
        return made


def _needed(result: fx.Node) -> set[fx.Node]:
    """The nodes that compute `result`, itself among them."""
    found, left = set[fx.Node](), [result]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _content(found: Any) -> Any:
    return found.meta.get("val") if isinstance(found, fx.Node) else found


def _is_number(found: Any) -> bool:
    return isinstance(_content(found), py_sym_types)
