"""Configurations of the forward kernel of attention, in the order of trial."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_rtx import dtypes
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Sym
from torch_rtx.lowering.kernels.attention import MAX_WIDTH, Attention, attention_of
from torch_rtx.lowering.kernels.attention_pieces import padded_width
from torch_rtx.lowering.kernels.float32_dots import IEEE, TF32, TF32X3, precisions
from torch_rtx.lowering.kernels.index import from_dim
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import block_of
from torch_rtx.op_work import ATTENTION_FORWARD
from torch_rtx.targets import Arch

TARGET_PROGRAMS = 128  # about the multiprocessors of a large GPU
RESIDENT_PROGRAMS = 3  # per multiprocessor with wgmma and narrow heads: the softmax of one overlaps products of others
UNKNOWN_SIZE = 4096  # stands for a symbolic size
PADDED_ROWS = 32  # the multiple to which a library pads the numbers per row that it saves


@dataclass(frozen=True)
class AttentionConfig:
    """The tile of scores, [rows, keys], and Triton's options.

    Attributes:
        min_first: fewest columns of the first of two pieces of a head, see `head_pieces`.
        input_precision: of operands in f32, see `float32_dots`.
        overlaps: a product begins before others need its result, so that weights are computed meanwhile.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    min_first: int = 64
    input_precision: str = IEEE
    overlaps: bool = False


def attention_configs(region: Region, arch: Arch) -> list[AttentionConfig]:
    """Configurations that fit `arch`, the fastest first.

    Blocks have as many rows as registers allow for accumulators, fewer if multiprocessors would be idle. SM versions
    without wgmma share one list, and so one binary. They also divide heads of 33 to 48 elements into two pieces, which
    is faster there alone.
    """
    attn, hopper = attention_of(region), "wgmma" in arch.features
    min_first = 64 if hopper else 32
    width = max(padded_width(attn.width, min_first), padded_width(attn.value_width, min_first))
    configs = [
        config
        for precision in precisions_of(attn, arch)
        for rows, keys, warps in _shapes(width, attn.dtype if precision == IEEE else precision, arch)
        for stages in ((3, 2, 1) if "cp_async" in arch.features else (1,))
        if _shared(attn, config := AttentionConfig(rows, keys, warps, stages, min_first, precision)) <= arch.shared
        and rows % row_multiple(attn) == 0
    ]
    if not configs:
        raise Unsupported(f"attention with heads of {width} elements on sm_{arch.sm}")
    wide = width > 64
    # Full warpgroups win with far fewer programs than multiprocessors.
    wanted = TARGET_PROGRAMS if not hopper else TARGET_PROGRAMS // 2 if wide else TARGET_PROGRAMS // 8

    def order(config: AttentionConfig) -> tuple[bool, int, bool, int]:
        # A single stage does not overlap loads and products: a smaller tile is better.
        is_crowded = hopper and not wide and RESIDENT_PROGRAMS * _shared(attn, config) > arch.shared
        stages = -config.num_stages if hopper and wide else 0
        return config.num_stages == 1, _penalty(attn, config, wanted), is_crowded, stages

    found = sorted(configs, key=order)
    heads = {config.input_precision: config for config in reversed(found)}  # the best of each are tried first
    return list(dict.fromkeys([*(heads[one] for one in precisions_of(attn, arch) if one in heads), *found]))


def precisions_of(attn: Attention, arch: Arch) -> tuple[str, ...]:
    """The values of `AttentionConfig.input_precision` for attention on `arch`."""
    return precisions(arch, arch.float32.products) if attn.dtype == "f32" else (IEEE,)


def operands_of(attn: Attention, config: AttentionConfig) -> str:
    """What products multiply, see `dtypes.OPERANDS`."""
    return attn.dtype if config.input_precision == IEEE else config.input_precision


def row_multiple(attn: Attention) -> int:
    """A block has a multiple of so many rows: libraries pad the numbers per row that a forward saves, and blocks of
    fewer might not reach the end of these."""
    statistic = attn.results[1] if attn.op == ATTENTION_FORWARD else None
    return 1 if statistic is None or statistic.shape[2] == from_dim(attn.queries) else PADDED_ROWS


def _shapes(width: int, dtype: str, arch: Arch) -> list[tuple[int, int, int]]:
    """(rows, keys, warps) of tiles for heads of this padded width, the fastest first for many rows.

    With wgmma four warps multiply 64 rows. Without, a warp has 32 rows of narrow heads: with 16 its tensor cores would
    wait for K and V in shared memory. Wider heads have fewer rows and keys per tile, for registers and shared memory.
    """
    hopper = "wgmma" in arch.features
    if dtype == "f32":
        # Full-precision products run as FMAs with both operands in registers.
        return [(32, 32, 4), (16, 32, 4), (16, 16, 4)]
    if dtype in (TF32, TF32X3):
        return [(64, 32, 4), (32, 32, 4), (16, 32, 4)] if width <= 64 else [(32, 32, 4), (16, 32, 4)]
    few = [(32, 64, 4), (16, 128, 4), (16, 64, 4), (16, 32, 4)]
    if width <= 64:
        many = [(64, 64, 4), (64, 128, 4), (128, 64, 8)] if hopper else [(128, 32, 4), (128, 64, 4), (64, 64, 4)]
    elif not hopper:
        many = [(128, 64, 8) if width <= 128 else (64, 32, 8), (64, 32, 4)]
    elif width == 128:
        many = [(64, 64, 4), (128, 64, 8), (128, 128, 8)]
    elif width == MAX_WIDTH:
        many = [(64, 64, 4), (64, 32, 4), (128, 64, 8)]
    else:  # in two pieces
        many = [(128, 64, 8), (64, 64, 4), (64, 32, 4)]
    return many + few


def _shared(attn: Attention, config: AttentionConfig) -> int:
    """An upper bound of shared memory per program, in bytes."""
    size = dtypes.DTYPES[attn.dtype].bytes
    width, value_width = (padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    return size * (config.num_stages * config.keys * (width + value_width) + config.rows * max(width, value_width))


def _penalty(attn: Attention, config: AttentionConfig, wanted: int) -> int:
    """0 if the grid has `wanted` programs and no tile is mostly padding; +1 for each halving of either."""
    rows = _most(attn.rows)
    programs = math.ceil(rows / config.rows) * math.prod(map(_most, attn.groups))
    idle = max(0, math.ceil(math.log2(wanted / max(programs, 1)))) if config.rows > 16 else 0
    keys = UNKNOWN_SIZE if attn.keys.number is None else attn.keys.number
    unused = max(config.rows // block_of(rows), config.keys // block_of(keys))
    return max(idle, math.ceil(math.log2(max(unused, 1))))


def _most(dim: Dim) -> int:
    """A size; of a symbolic one its maximum, or UNKNOWN_SIZE."""
    if isinstance(dim, int):
        return dim
    return dim.max if isinstance(dim, Sym) and dim.max is not None else UNKNOWN_SIZE
