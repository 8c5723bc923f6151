"""Widening: chains of operations whose result has more bytes than their inputs, such as dequantization of weights.

As the prologue of the product that reads it, such a chain costs arithmetic but saves memory traffic, and the weights
stay packed in memory. So `hoist_weights` leaves it in the graph, and fusion makes it the product's prologue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch_rtx.dtypes import DTYPES, INT
from torch_rtx.ir import TensorType

MIN_GROWTH = 1.5  # bytes of the result over bytes of its inputs; f16 from int8 has nearly 2


def nbytes(type_: TensorType) -> int | None:
    """Bytes of a tensor; None if a size is symbolic."""
    sizes = [size for size in type_.shape if isinstance(size, int)]
    return math.prod(sizes) * DTYPES[type_.dtype].bytes if len(sizes) == len(type_.shape) else None


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
