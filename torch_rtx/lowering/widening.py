"""Widening: chains of operations whose result has more bytes than their inputs, such as dequantization of weights.

As the prologue of the product that reads it, such a chain costs arithmetic but saves memory traffic, and the weights
stay packed in memory. So `hoist_weights` leaves it in the graph, and fusion makes it the product's prologue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Set

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES, FLOAT, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_values
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.index import product
from torch_rtx.lowering.kernels.kernel_ir import (
    Const,
    Gather,
    Iota,
    Load,
    Pointwise,
    Select,
    Tensor,
    View,
    everything,
    load,
)
from torch_rtx.lowering.kernels.region import express, tensor_type
from torch_rtx.lowering.rewrite import from_weights
from torch_rtx.op_work import ANCHORS, PRODUCTS

CAST = "aten._to_copy.default"
SIMPLE = Load | Const | Iota | Pointwise | View | Select
TABLE = 256
MIN_GROWTH = 1.5  # bytes of the result over bytes of its inputs; f16 from int8 has nearly 2


def nbytes(type_: TensorType) -> int | None:
    """Bytes of a tensor; None if a size is symbolic."""
    sizes = [size for size in type_.shape if isinstance(size, int)]
    return math.prod(sizes) * DTYPES[type_.dtype].bytes if len(sizes) == len(type_.shape) else None


def is_elementwise(node: Node) -> bool:
    """Whether each element that `node` computes comes from elements at known positions, or from a short list: it does
    not look anything else up, where integers are positions and not values, and reduces nothing."""
    try:
        values: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
        tensors = everything(express(node, values).values())
    except Unsupported:
        return False
    return all(isinstance(tensor, SIMPLE) or _is_lookup(tensor) for tensor in tensors)


def _is_lookup(tensor: Tensor) -> bool:
    """Whether the values of `tensor` come from a list of at most TABLE, such as those that 4 bits stand for."""
    if not isinstance(tensor, Gather) or not isinstance(tensor.source, Load) or len(tensor.source.shape) != 1:
        return False
    return 0 < (product(tensor.source.shape).number or 0) <= TABLE


def smallest(value: Value, made: Mapping[str, Node], source: Container[str]) -> dict[str, Value]:
    """The values, by name, that `value` can be computed from element by element with the least memory. Ties go to
    parameters, which are there in any case, and else to those nearest to `value`, which leave least to compute.

    Args:
        made: by value that depends on parameters alone, the node that computes it.
        source: the names of the parameters.
    """
    if value.name in source or not is_elementwise(made[value.name]):
        return {value.name: value}
    node = made[value.name]
    below = {name: one for given in node.inputs for name, one in smallest(given, made, source).items()}
    difference = sum(_span(one.type) for one in below.values()) - _span(value.type)
    tied = any(name in source for name in below) or aten.is_view(aten.overload(node.op))
    return below if difference < 0 or (difference == 0 and tied) else {value.name: value}


def storable(graph: Graph, weight_copies: bool) -> Callable[[Value], bool]:
    """A function that says of a value whether recipes may store it, or what it is computed from, in another form or
    beside others: where they store it in memory of its own anyway, or where copies of parameters are allowed."""
    if weight_copies:
        return lambda value: True
    source = {weight.value.name for weight in graph.weights if weight.recipe is None}
    fixed = from_weights(graph)
    recipes = (weight.recipe.nodes for weight in graph.weights if weight.recipe is not None)
    nodes = (*graph.nodes, *(node for recipe in recipes for node in recipe))
    made = {value.name: node for node in nodes for value in node.results}

    def is_own(value: Value) -> bool:
        return value.name in fixed and source.isdisjoint(smallest(value, made, source))

    return is_own


def _span(type_: object) -> int:
    """Bytes from the first to the last element: what lies between rows that are not next to each other is read, too."""
    assert isinstance(type_, TensorType)
    return aten.extent(type_.shape, type_.strides) * aten.DTYPES[type_.dtype].itemsize  # type: ignore[arg-type]


def widens(sources: Iterable[TensorType], result: TensorType) -> bool:
    """`result` has at least MIN_GROWTH times the bytes of its sources, at least half of which are integers or 8-bit
    floats, so that values are widened and not broadcast."""
    total = narrow = 0
    for type_ in sources:
        size, dtype = nbytes(type_), DTYPES[type_.dtype]
        if size is None:
            return False
        total += size
        narrow += size if dtype.kind == INT or dtype.bits == 8 else 0
    size = nbytes(result)
    return size is not None and MIN_GROWTH * total <= size and total <= 2 * narrow


def widened_factors(graph: Graph, views: Set[int], producer: Mapping[str, int]) -> set[int]:
    """The casts, by index, of both factors of products and convolutions from halves or float8 to float32, which nothing
    else reads. Tensor cores multiply these and sum in float32, so that such a cast is none: a product reads its factors
    as they were.

    Args:
        views: the nodes that kernels absorb.
        producer: the node that computes each value, by its name.
    """

    def cast_of(value: Attr) -> int | None:
        index = producer.get(value.name) if isinstance(value, Value) else None
        while index is not None and index in views:
            index = producer.get(graph.nodes[index].inputs[0].name)
        return index if index is not None and _widens_floats(graph.nodes[index]) else None

    found, others = set[int](), {cast_of(value) for value in attr_values(graph.outputs)}
    for at, node in enumerate(graph.nodes):
        kind = ANCHORS.get(node.op)
        names = PRODUCTS[node.op][:2] if kind == "gemm" else ("input", "weight") if kind == "conv" else ()
        factors = [node.arg(name) for name in names]
        casts = [cast_of(value) for value in factors]
        kinds = {type_of(graph.nodes[one].inputs[0]).dtype for one in casts if one is not None}
        if len(kinds) == 1 and None not in casts:
            found.update(one for one in casts if one is not None)
        elif at not in views:
            others.update(map(cast_of, node.inputs))
    return found - {one for one in others if one is not None}


def _widens_floats(node: Node) -> bool:
    """`node` casts halves or float8 to float32."""
    if node.op != CAST or len(node.inputs) != 1 or node.outputs[0] is None or set(dict(node.args)) != {"self", "dtype"}:
        return False
    before, after = type_of(node.inputs[0]).dtype, type_of(node.outputs[0]).dtype
    return DTYPES[before].kind == FLOAT and DTYPES[before].bits in (8, 16) and after == "f32"
