"""Widening: a chain of operations that makes many bytes of few, such as weights in packed integers made into halves.

In front of the product that reads the result, the chain costs arithmetic and saves most of the memory traffic, and the
weights stay as small in memory as the model has them. So `hoist_weights` leaves such a chain in the graph, and fusion
makes it the prologue of the product's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, TensorType
from torch_rtx.lowering.kernels.kernel_ir import Const, Load, Pointwise, Select, Tensor, View, everything, load
from torch_rtx.lowering.kernels.region import express, tensor_type

FACTOR = 1.5  # least bytes of the result for each byte that it is computed from; halves from int8 and scales have 2


def nbytes(type_: TensorType) -> int | None:
    """Bytes of a tensor; None if a size is known only at run time."""
    sizes = [size for size in type_.shape if isinstance(size, int)]
    return math.prod(sizes) * DTYPES[type_.dtype].bytes if len(sizes) == len(type_.shape) else None


def is_elementwise(node: Node) -> bool:
    """Whether each element that `node` computes comes from elements at known positions: it does not look anything up,
    where integers are positions and not values, and reduces nothing."""
    try:
        values: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
        tensors = everything(express(node, values).values())
    except Unsupported:
        return False
    return all(isinstance(tensor, Load | Const | Pointwise | View | Select) for tensor in tensors)


def widens(sources: Iterable[TensorType], result: TensorType) -> bool:
    """Whether `result` has FACTOR times the bytes of its sources or more, and most of these are integers or 8-bit
    floats: values that are made wider, not repeated."""
    total = narrow = 0
    for type_ in sources:
        size, dtype = nbytes(type_), DTYPES[type_.dtype]
        if size is None:
            return False
        total += size
        narrow += size if dtype.kind == INT or dtype.bits == 8 else 0
    size = nbytes(result)
    return size is not None and FACTOR * total <= size and total <= 2 * narrow
