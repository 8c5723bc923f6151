"""Head pieces: the blocks of columns in which attention multiplies a head.

Blocks are powers of two. A head of 80 elements takes one of 64 and one of 16 columns instead of one of 128.
"""

from __future__ import annotations

from torch_rtx.lowering.kernels.source import block_of


def head_pieces(width: int, min_first: int) -> list[tuple[int, int]]:
    """(first column, block) of each piece of a head of `width` elements: two pieces where that pads less and the first
    has at least `min_first` columns, else one."""
    single = block_of(width)
    first = single // 2
    rest = block_of(width - first)
    return [(0, first), (first, rest)] if first >= min_first and first + rest < single else [(0, single)]


def padded_width(width: int, min_first: int) -> int:
    """The columns of all pieces."""
    return sum(block for _, block in head_pieces(width, min_first))
