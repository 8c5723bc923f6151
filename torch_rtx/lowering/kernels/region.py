"""A region: the body of a kernel node as kernel IR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from torch_rtx.accumulation import starts
from torch_rtx.dtypes import BYTES, DTYPES, register
from torch_rtx.errors import Unsupported
from torch_rtx.ir import (
    MAIN,
    Attr,
    Dim,
    Expr,
    Graph,
    Node,
    Sym,
    TensorType,
    Value,
    attr_values,
    contiguous,
    dim_syms,
    has_parts,
    type_dims,
)
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, flat
from torch_rtx.lowering.kernels.index import bounds, from_dim, product, to_dim
from torch_rtx.lowering.kernels.kernel_ir import (
    Load,
    Reduce,
    Scatter,
    Tensor,
    cast,
    children,
    everything,
    in_memory,
    load,
    text,
)
from torch_rtx.lowering.kernels.ops import (
    accumulations,
    copies,
    factories,
    gradients,
    indexing,
    pointwise,
    pooling,
    reductions,
    resampling,
    views,
)
from torch_rtx.lowering.kernels.ops.registry import OPS
from torch_rtx.lowering.kernels.ops.views import reshape, shape_of
from torch_rtx.lowering.kernels.reduction_rules import RULES, written_out
from torch_rtx.op_work import ANCHORS

# Importing them fills OPS.
SIZES = frozenset(("size", "shape", "split_size", "split_sizes", "output_size", "input_size"))  # arguments
DECLARED = (accumulations, copies, factories, gradients, indexing, pointwise, pooling, reductions, resampling, views)


def is_loop(op: str) -> bool:
    """Whether kernels compute calls of `op` element by element or row by row: it is no anchor."""
    return op in OPS or op in RULES


@dataclass(frozen=True, eq=False)
class Region:
    """What a kernel computes.

    Attributes:
        outputs: the tensors to store.
        anchor: the node among ANCHORS, if any; None if there are parts. Its results are `Load`s with `anchor` set.
        values: every value of the body as kernel IR.
        parts: those of a horizontal kernel, whose body has a kernel for each of them and nothing else.
        as_bytes: the dtypes of which the kernel reads and writes bytes, since the target does not have them.
    """

    body: Graph
    outputs: tuple[Tensor, ...]
    anchor: Node | None
    values: Mapping[str, Tensor]
    parts: tuple[Region, ...] = ()
    as_bytes: frozenset[str] = frozenset()

    @cached_property
    def reductions(self) -> tuple[Reduce, ...]:
        """All reductions that the outputs depend on, in topological order."""
        return tuple(tensor for tensor in everything(self.outputs) if isinstance(tensor, Reduce))

    @property
    def types(self) -> tuple[TensorType, ...]:
        """The types of the outputs."""
        return tuple(v.type for v in attr_values(self.body.outputs) if isinstance(v.type, TensorType))

    @property
    def memory_types(self) -> tuple[TensorType, ...]:
        """The types of the tensors that the kernel reads or writes: the inputs of the body and the outputs."""
        return (*map(tensor_type, self.body.inputs), *self.types)

    @cached_property
    def read_types(self) -> tuple[TensorType, ...]:
        """The types of the inputs of the body; in place of one of which a loop reads a part, such as some rows of a
        table, or a range of its channels, as many elements in a row."""
        whole = tuple(map(tensor_type, self.body.inputs))
        if self.anchor is not None or self.parts:
            return whole
        read = _elements_read(self.outputs)
        names = (value.name for value in self.body.inputs)
        return tuple(_part(type_, read.get(name)) for name, type_ in zip(names, whole, strict=True))

    @property
    def moved_types(self) -> tuple[TensorType, ...]:
        """As `memory_types`, with what is read and written of a result that the kernel adds to, in place of all of it
        and of what it starts from."""
        added = {index: output for index, output in enumerate(self.outputs) if isinstance(output, Scatter)}
        begun = {_start(output).name for output in added.values()}
        dims = [dim for value in self.body.values() for dim in type_dims(value.type)]
        inputs = zip(self.body.inputs, self.read_types, strict=True)
        found = [type_ for value, type_ in inputs if value.name not in begun]
        for index, type_ in enumerate(self.types):
            if index in added:
                shape = tuple(to_dim(size, dims) for size in added[index].shape)
                found += [TensorType(type_.dtype, shape, contiguous(shape))] * 2
            else:
                found.append(type_)
        return tuple(found)

    def __str__(self) -> str:
        """The text form, see `kernel_ir.text`."""
        if self.anchor is None:
            return text(self.outputs)
        args = {key: self.values[attr.name] if isinstance(attr, Value) else attr for key, attr in self.anchor.args}
        return text(self.outputs, self.anchor.op, args)


def _part(type_: TensorType, count: int | None) -> TensorType:
    """`count` elements of a tensor as one of that size; all of it, if it has no more, or a size is not known."""
    sizes = [size for size, stride in zip(type_.shape, type_.strides, strict=True) if stride != 0]
    if count is None or not all(isinstance(size, int) for size in sizes) or count >= prod(sizes):  # type: ignore[arg-type]
        return type_
    return TensorType(type_.dtype, (count,), (1,))


def _elements_read(outputs: Sequence[Tensor]) -> dict[str, int | None]:
    """By the name of an input, how many of its elements a loop reads at most; None where that depends on sizes that are
    not known."""
    wanted: dict[Tensor, int | None] = {output: product(output.shape).number for output in outputs}
    read: dict[str, int | None] = {}
    for tensor in reversed([*everything(outputs)]):  # readers first
        size, count = product(tensor.shape).number, wanted[tensor]
        count = None if count is None or size is None else min(count, size)
        if isinstance(tensor, Load):
            read[tensor.name] = _sum(read.get(tensor.name, 0), count)
        for below in children(tensor):
            each = count
            if isinstance(tensor, Reduce) and count is not None:
                whole = product(below.shape).number
                each = whole if whole is None or not size else count * (whole // size)
            elif isinstance(tensor, Scatter):
                each = product(below.shape).number
            wanted[below] = _sum(wanted.get(below, 0), each)
    return read


def _sum(one: int | None, two: int | None) -> int | None:
    return None if one is None or two is None else one + two


class Exact:
    """A graph as a key of a cache: other than for `==`, 0.0, -0.0, 0 and False are different numbers."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Exact):
            return False
        one, two = self.graph, other.graph
        return one is two or (one == two and str(one) == str(two))


def region(body: Graph, as_bytes: frozenset[str] = frozenset()) -> Region:
    """The body of a kernel as kernel IR.

    Args:
        as_bytes: the dtypes, of 8 bits, that the target does not have. The kernel also gets bytes of those that Triton
            does not have, and of those whose bits it looks at.

    Raises:
        Unsupported: an operator, dtype or argument that kernels do not cover; or two anchors.
    """
    return _region(Exact(body), as_bytes)


@lru_cache(maxsize=1024)  # layers of a model have equal regions, which are asked for by configuration and SM version
def _region(key: Exact, as_bytes: frozenset[str]) -> Region:
    body = key.graph
    as_bytes |= BYTES | _viewed(body)
    types = {value.name: tensor_type(value) for value in body.inputs}
    values = {name: load(name, type_, as_bytes=type_.dtype in as_bytes) for name, type_ in types.items()}
    anchors, is_divided = list(_fill(body, values)), has_parts(body)
    if len(anchors) > 1 and not is_divided:
        raise Unsupported(f"{anchors[0].op} and {anchors[1].op} in one kernel", loc=anchors[1].loc)
    results = (values[value.name] for value in attr_values(body.outputs))
    outputs = tuple(in_memory(tensor, tensor.dtype in as_bytes) for tensor in results)
    _check_accumulations(body, outputs, bool(anchors))
    inner = (node.body for node in body.nodes if node.body is not None) if is_divided else ()
    parts = tuple(region(part, as_bytes) for part in inner)
    return Region(body, outputs, anchors[0] if anchors and not parts else None, values, parts, as_bytes)


def _viewed(body: Graph) -> frozenset[str]:
    """The dtypes whose bits a kernel looks at, which it then gets as bytes."""
    views = [node for node in flat(body.nodes) if node.op == "aten.view.dtype"]
    found = (tensor_type(value).dtype for node in views for value in (*node.inputs, *node.results))
    return frozenset(dtype for dtype in found if DTYPES[dtype].packing)


def _start(tensor: Scatter) -> Load:
    """The tensor that an accumulation starts from, as the kernel gets it.

    Raises:
        Unsupported: the kernel computes it.
    """
    source = tensor.target.source
    if not isinstance(source, Load) or source.anchor:
        raise Unsupported("an addition to what the same kernel computes")
    return source


def _check_accumulations(body: Graph, outputs: tuple[Tensor, ...], anchored: bool) -> None:
    """Raises Unsupported unless each accumulation is one result of a loop, which lies in memory as what it starts from,
    and nothing else in the kernel reads either."""
    named = {value.name: value for value in attr_values(body.outputs)}
    begun: list[Tensor] = [_start(output) for output in outputs if isinstance(output, Scatter)]
    if begun and anchored:
        raise Unsupported("additions in memory beside a product")
    nodes = set(everything(outputs))
    read = any(isinstance(child, Scatter) for tensor in nodes for child in children(tensor))
    found = starts(body)
    if anchored:  # the anchor itself may add to an input
        begun = [load(start.name, tensor_type(start)) for start in found.values()]
        read = any(not (isinstance(one, Load) and one.anchor) for one in outputs) and bool(begun)
    if not body.updated.keys() <= found.keys():
        raise Unsupported("an update of elements that a mask chooses")
    if any(named[name].type != start.type for name, start in found.items()):
        raise Unsupported("a sum in another layout than what a kernel adds to")
    if read or not len({*begun}) == len(begun) == len(found) or not nodes.isdisjoint(begun):
        raise Unsupported("a sum that a kernel adds to, beside other uses of it")


def _fill(body: Graph, values: dict[str, Tensor]) -> Iterator[Node]:
    """Add the results of the nodes of `body` to `values`, which has the inputs; yields the anchors."""
    for node in body.nodes:
        if node.op in ANCHORS:
            values.update({v.name: load(v.name, tensor_type(v), anchor=True) for v in node.outputs if v is not None})
            yield node
        elif node.body is not None:  # a prologue or epilogue
            inner = {own.name: values[given.name] for own, given in zip(node.body.inputs, node.inputs, strict=True)}
            yield from _fill(node.body, inner)
            named = zip(node.outputs, attr_values(node.body.outputs), strict=True)
            values.update({value.name: inner[own.name] for value, own in named if value is not None})
        else:
            values.update(express(node, values))


def express(node: Node, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of `node`, by name.

    Raises:
        Unsupported: see `region`.
    """
    if node.kind not in ("op", "view"):
        raise Unsupported(f"{node.op} in a kernel", loc=node.loc)
    if node.op not in OPS:
        return _written_out(node, values)
    given = {key: _given(attr, values, key in SIZES) for key, attr in node.args}
    types = tuple(tensor_type(value) if value is not None else TensorType("bool", (), ()) for value in node.outputs)
    found = OPS[node.op](**given, out=types)
    results = found if isinstance(found, tuple) else (found,)
    named = zip(node.outputs, results, strict=True)
    return {value.name: tensor for value, tensor in named if value is not None and tensor is not None}


def _written_out(node: Node, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of `node`, by the calls of its rule in `reduction_rules`."""
    outputs = [value for value in node.outputs if value is not None]
    body = BodyBuilder({value.name for value in (*node.inputs, *outputs)})
    results = written_out(body, node)
    inner = {value.name: values[value.name] for value in node.inputs}
    for call in body.nodes:
        inner.update(express(call, inner))
    return {
        value.name: cast(reshape(inner[found.name], shape_of((type_,))), type_.dtype)
        for value, found in zip(node.outputs, results, strict=True)
        if value is not None and (type_ := tensor_type(value))
    }


def tensor_type(value: Value) -> TensorType:
    """The type of a tensor that kernels can access.

    Raises:
        Unsupported: a number, another device, or a dtype that kernels do not cover.
    """
    type_ = value.type
    if not isinstance(type_, TensorType) or type_.device != MAIN or not register(type_.dtype):
        raise Unsupported(f"{value.type} in a kernel")
    return type_


def _given(attr: Attr, values: dict[str, Tensor], is_size: bool) -> object:
    if isinstance(attr, Value):
        return values[attr.name]
    if isinstance(attr, Sym | Expr):
        if _divides_signed(attr, is_size):
            raise Unsupported(f"{attr}, a division of a number that may be negative")
        return from_dim(attr)
    return tuple(_given(item, values, is_size) for item in attr) if isinstance(attr, tuple) else attr


def _divides_signed(dim: Dim, is_size: bool) -> bool:
    """Whether `dim` divides a number that may be negative, which Triton rounds towards 0. In the size of a tensor,
    differences of sizes are not: the size would be."""
    if not isinstance(dim, Expr):
        return False
    signed = dim.op in ("//", "%") and any(sym.min < 0 for sym in dim_syms(dim))
    below = dim.op == "//" and not is_size and bounds(dim.args[0])[0] < 0
    return signed or below or any(_divides_signed(arg, is_size) for arg in dim.args)


def needed(tensor: Tensor) -> Iterator[Reduce]:
    """The nearest reductions that `tensor` depends on."""
    seen: set[Tensor] = set()
    left = [tensor]
    while left:
        for child in children(left.pop()):
            if child not in seen:
                seen.add(child)
                if isinstance(child, Reduce):
                    yield child
                else:
                    left.append(child)
