"""Widening: chains of operations whose result has more bytes than their inputs, such as dequantization of weights.

As the prologue of the product that reads it, such a chain costs arithmetic but saves memory traffic, and the weights
stay packed in memory. So `hoist_weights` leaves it in the graph, and fusion makes it the product's prologue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, TensorType
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
