"""Builds bodies of kernels, call by call, with the types that ATen gives their results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch_rtx.dtypes import register
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.kernels import view_types

Values = tuple[Value, ...]


class BodyBuilder:
    """Nodes in order. New values get names that are not in `taken`, and are added to it."""

    def __init__(self, taken: set[str], nodes: Iterable[Node] = ()) -> None:
        self.nodes, self._taken = list(nodes), taken

    def call(self, op: str, type_: TensorType, /, **args: Attr) -> Value:
        """The result, of type `type_`, of an overload: `add.Tensor` is one of ATen, `torch_rtx.x.default` one of this
        package. Arguments in the order of its schema."""
        return self.calls(op, (type_,), **args)[0]

    def calls(self, op: str, types: Iterable[TensorType], /, **args: Attr) -> Values:
        """As `call`, for several results."""
        values = tuple(Value(self._name(), type_) for type_ in types)
        self.nodes.append(Node("op", op if op.startswith("torch_rtx.") else f"aten.{op}", tuple(args.items()), values))
        return values

    def _name(self) -> str:
        name = f"p{len(self._taken)}"
        while name in self._taken:
            name += "x"
        self._taken.add(name)
        return name

    def define(self, result: Value, value: Value) -> None:
        """Let `value`, reshaped and cast, be `result`, a value that other nodes know already."""
        type_, shaped = type_of(result), self.reshape(value, type_of(result).shape)
        if type_of(shaped).dtype == type_.dtype:
            self.call("clone.default", type_, self=shaped)
        else:
            self.call("_to_copy.default", type_, self=shaped, dtype=type_.dtype)
        self.name_last(result)

    def name_last(self, value: Value) -> None:
        """Let the last call define `value`, which other nodes know already."""
        last = self.nodes.pop()
        self.nodes.append(Node(last.kind, last.op, last.args, (value,)))

    def body(self, inputs: Values, result: Value) -> Graph:
        """A body of all nodes, the last of which defines `result`."""
        self.name_last(result)
        return Graph("import", inputs, nodes=tuple(self.nodes), outputs=(result,))

    # ---- casts and pointwise operations ------------------------------------------------------------------------------

    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in `dtype`."""
        old = type_of(value)
        return (
            value
            if old.dtype == dtype
            else self.call("_to_copy.default", TensorType(dtype, old.shape, old.strides), self=value, dtype=dtype)
        )

    def widen(self, value: Value) -> Value:
        """`value` in the dtype that kernels compute in: halves in float32."""
        return self.cast(value, register(type_of(value).dtype))

    def pointwise(self, op: str, value: Value, /, **args: Attr) -> Value:
        """A pointwise call whose first argument is `value` and whose result has the type of `value`."""
        return self.call(op, type_of(value), **{"self": value, **args})

    def add(self, one: Value, two: Value) -> Value:
        """one + two, of the type of `one`."""
        return self.pointwise("add.Tensor", one, other=two)

    def sub(self, one: Value, two: Value) -> Value:
        """one - two, of the type of `one`."""
        return self.pointwise("sub.Tensor", one, other=two)

    def mul(self, one: Value, two: Value) -> Value:
        """one * two, of the type of `one`."""
        return self.pointwise("mul.Tensor", one, other=two)

    # ---- views -------------------------------------------------------------------------------------------------------

    def reshape(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        """The elements in row-major order as a tensor of `shape`: a view, of a contiguous copy where it takes one."""
        old = type_of(value)
        if old.shape == shape:
            return value
        type_ = view_types.view(old, shape)
        if type_ is None:
            dense = TensorType(old.dtype, old.shape, contiguous(old.shape))
            value = self.call("clone.default", dense, self=value, memory_format="contiguous_format")
            type_ = TensorType(old.dtype, shape, contiguous(shape))
        return self.call("view.default", type_, self=value, size=shape)

    def split_dim(self, value: Value, axis: int, count: int, size: Dim | None = None) -> Value:
        """`value` with the dimension `axis` as two, [count, size]: the number of a part, and the position in it."""
        shape = type_of(value).shape
        size = dim_expr("//", shape[axis], count) if size is None else size
        return self.reshape(value, (*shape[:axis], count, size, *shape[axis + 1 :]))

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """`value` with its dimensions in another order."""
        if list(order) == list(range(len(order))):
            return value
        return self.call("permute.default", view_types.permute(type_of(value), order), self=value, dims=tuple(order))

    def move_to_front(self, value: Value, axis: int) -> Value:
        """`value` with the dimension `axis` before all others."""
        rank = len(type_of(value).shape)
        return self.permute(value, (axis, *(other for other in range(rank) if other != axis)))

    def unsqueeze(self, value: Value, axis: int) -> Value:
        """`value` with one more dimension, of size 1, at `axis`."""
        return self.call("unsqueeze.default", view_types.unsqueeze(type_of(value), axis), self=value, dim=axis)

    def unbind(self, value: Value, axis: int) -> Values:
        """The positions of a dimension of known size, one by one."""
        old = type_of(value)
        count = old.shape[axis]
        assert isinstance(count, int)
        args = {"dim": axis} if axis else {}
        return self.calls("unbind.int", [view_types.unbind(old, axis)] * count, self=value, **args)


def names_in(body: Graph) -> set[str]:
    """The names that `body` uses: of its values and symbols."""
    return {value.name for value in body.values()} | body.syms.keys()


def type_of(value: Attr) -> TensorType:
    """The type of a tensor."""
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return value.type


def argument(node: Node, name: str) -> Value:
    """The tensor that a node gets as `name`."""
    value = node.arg(name)
    assert isinstance(value, Value), name
    return value


def needed(nodes: Sequence[Node], wanted: Iterable[Attr]) -> list[Node]:
    """Those of `nodes` that the values in `wanted` need."""
    names = {value.name for attr in wanted for value in attr_values(attr)}
    found = []
    for node in reversed(nodes):
        if any(value is not None and value.name in names for value in node.outputs):
            found.append(node)
            names.update(value.name for value in node.inputs)
    return found[::-1]


def flat(nodes: Iterable[Node]) -> list[Node]:
    """The operations of `nodes`, with those of kernels in their place."""
    found: list[Node] = []
    for node in nodes:
        if node.body is None:
            found.append(node)
            continue
        inner, outer = (*node.body.inputs, *node.body.outputs), (*node.inputs, *node.results)
        names = {one.name: other for one, other in zip(inner, outer, strict=True) if isinstance(one, Value)}

        def renamed(value: Value, names: Mapping[str, Value] = names, node: Node = node) -> Value:
            return names.get(value.name, Value(f"{node.results[0].name}_{value.name}", value.type))

        for step in node.body.nodes:
            outputs = tuple(None if value is None else renamed(value) for value in step.outputs)
            found.append(replace(step, args=step.map_inputs(renamed), outputs=outputs))
    return found


def kernel(op: str, given: Collection[Value], nodes: Sequence[Node], outputs: Values) -> Node:
    """The kernel node of a body; of the values `given` it takes those that it reads."""
    read = {value.name for node in nodes for value in node.inputs} | {value.name for value in outputs}
    inputs = tuple(value for value in given if value.name in read)
    args = tuple((f"in{index}", value) for index, value in enumerate(inputs))
    return Node("kernel", op, args, outputs, Graph("import", inputs, nodes=tuple(nodes), outputs=outputs))
