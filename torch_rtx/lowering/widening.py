"""Widening: a chain of operations that makes many bytes of few, such as weights in packed integers made into halves.

In front of the product that reads the result, the chain costs arithmetic and saves most of the memory traffic, and the
weights stay as small in memory as the model has them. So `hoist_weights` leaves such a chain in the graph, and fusion
makes it the prologue of the product's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.ir import TensorType

FACTOR = 1.5  # least bytes of the result for each byte that it is computed from; halves from int8 and scales have 2


def nbytes(type_: TensorType) -> int | None:
    """Bytes of a tensor; None if a size is known only at run time."""
    sizes = [size for size in type_.shape if isinstance(size, int)]
    return math.prod(sizes) * DTYPES[type_.dtype].bytes if len(sizes) == len(type_.shape) else None


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
