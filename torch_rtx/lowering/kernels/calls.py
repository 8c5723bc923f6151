"""Bodies of kernels that are written call by call, with the types that ATen gives their results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr


class Calls:
    """Nodes, one behind the other; new values get names that are not `taken`, and are from then on."""

    def __init__(self, taken: set[str], nodes: Iterable[Node] = ()) -> None:
        self.nodes, self._taken = list(nodes), taken

    def call(self, op: str, type_: TensorType, /, **args: Attr) -> Value:
        """The result, of type `type_`, of the ATen overload `op`; arguments in the order of its schema."""
        return self.calls(op, (type_,), **args)[0]

    def calls(self, op: str, types: Iterable[TensorType], /, **args: Attr) -> tuple[Value, ...]:
        """As `call`, for several results."""
        values = tuple(Value(self._name(), type_) for type_ in types)
        self.nodes.append(Node("op", f"aten.{op}", tuple(args.items()), values))
        return values

    def _name(self) -> str:
        name = f"p{len(self._taken)}"
        while name in self._taken:
            name += "x"
        self._taken.add(name)
        return name

    def ends_in(self, value: Value) -> None:
        """The last call gives `value`, which other nodes know already."""
        last = self.nodes.pop()
        self.nodes.append(Node(last.kind, last.op, last.args, (value,)))

    # ---- views and casts ---------------------------------------------------------------------------------------------

    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in `dtype`."""
        old = type_of(value)
        return (
            value
            if old.dtype == dtype
            else self.call("_to_copy.default", TensorType(dtype, old.shape, old.strides), self=value, dtype=dtype)
        )

    def divided(self, value: Value, axis: int, parts: int, size: Dim | None = None) -> Value:
        """`value` with the dimension `axis` as two: which part, and the place in it, of `size`."""
        old = type_of(value)
        size = dim_expr("//", old.shape[axis], parts) if size is None else size
        shape = (*old.shape[:axis], parts, size, *old.shape[axis + 1 :])
        stride = old.strides[axis]
        strides = (*old.strides[:axis], dim_expr("*", stride, size), stride, *old.strides[axis + 1 :])
        return self.call("view.default", TensorType(old.dtype, shape, strides), self=value, size=shape)

    def permuted(self, value: Value, order: Sequence[int]) -> Value:
        """`value` with its dimensions in another order."""
        old = type_of(value)
        if list(order) == list(range(len(order))):
            return value
        shape, strides = (tuple(dims[axis] for axis in order) for dims in (old.shape, old.strides))
        return self.call("permute.default", TensorType(old.dtype, shape, strides), self=value, dims=tuple(order))

    def first(self, value: Value, axis: int) -> Value:
        """`value` with the dimension `axis` before all others."""
        rank = len(type_of(value).shape)
        return self.permuted(value, (axis, *(other for other in range(rank) if other != axis)))

    def unsqueezed(self, value: Value, axis: int) -> Value:
        """`value` with one more dimension, of size 1, at `axis`."""
        old = type_of(value)
        shape = (*old.shape[:axis], 1, *old.shape[axis:])
        after = dim_expr("*", old.shape[axis], old.strides[axis]) if axis < len(old.shape) else 1
        type_ = TensorType(old.dtype, shape, (*old.strides[:axis], after, *old.strides[axis:]))
        return self.call("unsqueeze.default", type_, self=value, dim=axis)

    def reshaped(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        """The elements in row-major order as a tensor of `shape`."""
        old = type_of(value)
        if old.shape == shape:
            return value
        if old.strides != contiguous(old.shape):
            dense = TensorType(old.dtype, old.shape, contiguous(old.shape))
            value = self.call("clone.default", dense, self=value, memory_format="contiguous_format")
        return self.call("view.default", TensorType(old.dtype, shape, contiguous(shape)), self=value, size=shape)

    def unbound(self, value: Value, axis: int) -> tuple[Value, ...]:
        """The positions of a dimension of known size, one by one."""
        old = type_of(value)
        count = old.shape[axis]
        assert isinstance(count, int)
        shape, strides = ((*dims[:axis], *dims[axis + 1 :]) for dims in (old.shape, old.strides))
        args = {"dim": axis} if axis else {}
        return self.calls("unbind.int", [TensorType(old.dtype, shape, strides)] * count, self=value, **args)

    def same(self, op: str, value: Value, /, **args: Attr) -> Value:
        """A pointwise call of which `value` is the first argument and has the type of the result."""
        return self.call(op, type_of(value), **{"self": value, **args})


def type_of(value: Value) -> TensorType:
    """The type of a tensor."""
    assert isinstance(value.type, TensorType)
    return value.type


def needed(nodes: Sequence[Node], wanted: Iterable[Attr]) -> list[Node]:
    """Those of `nodes` that the values in `wanted` need."""
    names = {value.name for attr in wanted for value in attr_values(attr)}
    found = []
    for node in reversed(nodes):
        if any(value is not None and value.name in names for value in node.outputs):
            found.append(node)
            names.update(value.name for value in node.inputs)
    return found[::-1]


def kernel(op: str, given: Collection[Value], nodes: Sequence[Node], outputs: tuple[Value, ...]) -> Node:
    """The kernel node of a body; of the values `given` it takes those that it reads."""
    read = {value.name for node in nodes for value in node.inputs} | {value.name for value in outputs}
    inputs = tuple(value for value in given if value.name in read)
    args = tuple((f"in{index}", value) for index, value in enumerate(inputs))
    return Node("kernel", op, args, outputs, Graph("import", inputs, nodes=tuple(nodes), outputs=outputs))
