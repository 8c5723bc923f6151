"""Equal operations on each element that follow several matrix products, as one operation on products side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.merged_weights import MergedWeights, is_pointwise
from torch_rtx.lowering.rewrite import Rewriter, from_weights, only_user, users

RESHAPES = frozenset(("aten.view.default", "aten._unsafe_view.default"))
Step = list[Node]  # equal operations, one for each product
Args = dict[str, Attr]


class Steps:
    """Finds and merges such operations in `graph`.

    Args:
        layout_visible: names of values whose strides something depends on.
        computed: of the same graph.
    """

    def __init__(self, graph: Graph, infer: Inference, layout_visible: Set[str], computed: MergedWeights) -> None:
        self._graph, self._infer, self._visible = graph, infer, set(layout_visible)
        self._computed = computed
        self._constants = from_weights(graph)
        self._producer = {value.name: node for node in graph.nodes for value in node.results}
        self.readers = users(graph)

    def after(self, products: Step) -> list[Step]:
        """The products, which have their columns in the last dimension, and the steps that follow all of them."""
        found = [products]
        total = _beside([type_of(node.outputs[0]) for node in products])
        while True:
            readers = [only_user(node.outputs, self.readers, self._visible) for node in found[-1]]
            step = [node for node in readers if node is not None and self._is_sliced(node)]
            if len(step) < len(products) or len(set(map(id, step))) < len(step):
                return found
            merged = self._type(step, found[-1], total)
            if merged is None:
                return found
            found.append(step)
            total = merged

    def _is_sliced(self, node: Node) -> bool:
        """The only result of the node may be a slice."""
        return len(node.outputs) == 1 and not any(value.name in self._visible for value in node.results)

    def _type(self, step: Step, before: Step, total: TensorType) -> TensorType | None:
        """The type of the merged operation on a tensor of type `total`; None if they are not equal."""

        def cat(values: Sequence[Value]) -> Value:
            return Value("columns", _beside([type_of(value) for value in values]))

        def expand(value: Value, shape: tuple[Dim, ...]) -> Value:
            return Value("column", TensorType(type_of(value).dtype, shape, contiguous(shape)))

        args = self._args(step, before, Value("merged", total), lambda value: value, cat, expand)
        if args is None:
            return None
        try:
            (found,) = self._infer(step[0].op, tuple(args.items()))
        except Unsupported:
            return None
        wanted = _beside([type_of(node.outputs[0]) for node in step])
        same = isinstance(found, TensorType) and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        return found if isinstance(found, TensorType) and same else None

    def emit(self, step: Step, before: Step, merged: Value, rewriter: Rewriter) -> Value:
        """Add the merged operation on `merged`, the step before it."""
        loc = step[0].loc

        def cat(values: Sequence[Value]) -> Value:
            last = len(type_of(values[0]).shape) - 1
            if self._computed.are_equal(values, last):
                return self._computed.merged(values, last, rewriter)
            return rewriter.emit("aten.cat.default", loc, tensors=tuple(values), dim=-1)

        def expand(value: Value, shape: tuple[Dim, ...]) -> Value:
            return rewriter.emit("aten.expand.default", loc, self=value, size=shape)

        args = self._args(step, before, merged, rewriter.current, cat, expand)
        assert args is not None
        return rewriter.emit(step[0].op, loc, **args)

    def _args(
        self,
        step: Step,
        before: Step,
        merged: Value,
        current: Callable[[Value], Attr],
        cat: Callable[[Sequence[Value]], Value],
        expand: Callable[[Value, tuple[Dim, ...]], Value],
    ) -> Args | None:
        """The arguments of the merged operation: numbers and tensors that all have, and weights side by side."""
        first, widths = step[0], [type_of(node.outputs[0]).shape[-1] for node in step]
        if not is_pointwise(first) and first.op not in RESHAPES:
            return None
        if any((node.kind, node.op, _keys(node)) != (first.kind, first.op, _keys(first)) for node in step):
            return None
        if widths != [type_of(node.outputs[0]).shape[-1] for node in before]:
            return None
        args: Args = {}
        for key, attr in first.args:
            each = [node.arg(key) for node in step]
            if each == [node.outputs[0] for node in before]:
                found: Attr = merged
            elif all(isinstance(one, Value) for one in each):
                values = [one for one in each if isinstance(one, Value)]
                found = self._columns(values, widths, current, cat, expand)
                if found is None:
                    return None
            elif first.op in RESHAPES and len({one[:-1] for one in each if isinstance(one, tuple)}) == 1:
                assert isinstance(attr, tuple)
                found = (*attr[:-1], type_of(merged).shape[-1])
            elif all((type(one), one) == (type(attr), attr) for one in each) and not any(attr_values(attr)):
                found = attr
            else:
                return None
            args[key] = found
        return args

    def _columns(
        self,
        values: list[Value],
        widths: list[Dim],
        current: Callable[[Value], Attr],
        cat: Callable[[Sequence[Value]], Value],
        expand: Callable[[Value, tuple[Dim, ...]], Value],
    ) -> Attr | None:
        """An operand of each operation as one: the same for all columns, or weights of columns side by side."""
        rows = [self._before_expand(value) for value in values]
        if all(row == rows[0] for row in rows) and type_of(rows[0]).shape[-1:] in ((), (1,)):
            return current(rows[0])
        types = [type_of(value) for value in values]
        kinds = {(max(len(type_.shape), 1), type_.dtype) for type_ in types}
        if len(kinds) > 1 or any(value.name not in self._constants for value in values):
            return None
        ((rank, _),) = kinds
        parts = []
        for value, type_, width in zip(values, types, widths, strict=True):
            if any(size != 1 for size in type_.shape[:-1]) or type_.shape[-1:] not in ((), (1,), (width,)):
                return None
            shape = (*(1,) * (rank - 1), width)
            parts.append(value if type_.shape == shape else expand(value, shape))
        return cat(parts)

    def _before_expand(self, value: Value) -> Value:
        """What `value` repeats along its columns alone; itself if that is nothing."""
        node = self._producer.get(value.name)
        source = node.arg("self") if node is not None and node.op == "aten.expand.default" else None
        if not isinstance(source, Value):
            return value
        return source if type_of(source).shape == (*type_of(value).shape[:-1], 1) else value

    def constants_of(self, groups: Sequence[Sequence[Step]]) -> set[int]:
        """The ids of the nodes that compute weights which the steps of `groups` read."""
        read = (value for group in groups for step in group[1:] for node in step for value in node.inputs)
        wanted, found = {value.name for value in read} & self._constants, set[int]()
        for node in reversed(self._graph.nodes):
            if any(value.name in wanted for value in node.results):
                found.add(id(node))
                wanted.update(value.name for value in node.inputs)
        return found


def _keys(node: Node) -> tuple[str, ...]:
    return tuple(key for key, _ in node.args)


def _beside(types: Sequence[TensorType]) -> TensorType:
    """The type of tensors side by side in the last dimension."""
    shape = (*types[0].shape[:-1], sum(type_.shape[-1] for type_ in types))  # type: ignore[misc]  # known sizes
    return TensorType(types[0].dtype, shape, contiguous(shape))
