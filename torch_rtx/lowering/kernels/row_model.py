"""Loops over rows in registers: which tiles they have, by what multiprocessors read again for each row.

What repeats along rows, such as the scales of columns or the weights of a norm, comes from a cache for each program.
Vectors of f32 beside a row of f16 are four times its bytes: a program of two rows reads half of that. A warp that has a
row by itself reads such vectors faster where a thread has 4 elements of a tile: of 8, two loads take each sector.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.chips import CACHED_BYTES, OVERLAP
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.loops import LoopConfig, LoopWriter, R, X
from torch_rtx.lowering.kernels.memory_model import bytes_of, streaming_us
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.rows import PERSISTENT, rows_of
from torch_rtx.targets import Arch

HELD_MOST = 64  # elements of a thread, of all tensors: more take the registers of other programs
PROGRAMS = 4  # at least, on each multiprocessor
GAIN = 0.97  # of the time of one row in a program: what promises less is not tried
WIDE, NARROW = 4, 32 * 4  # bytes of an element, and elements of a warp's tile with which a thread loads 16 at once


def ranked(found: Region, configs: list[LoopConfig], arch: Arch) -> list[LoopConfig]:
    """`configs` of a loop, the fastest first. Before the first one that has whole rows in registers comes the same with
    smaller tiles, or with two of them in a program, where that promises to be faster."""
    usual = next((config for config in configs if _is_at_once(found, config)), None)
    if usual is None:
        return configs
    several, narrow = replace(usual, sharing=2), replace(usual, elements=NARROW)
    of_warps = usual.held and usual.rows == usual.num_warps and usual.elements > NARROW
    if not of_warps and not _fits(found, several, arch):
        return configs
    try:
        own, again, widest = _read(found, usual)
    except Unsupported:
        return configs
    if of_warps:
        better = [narrow] if widest >= WIDE else []
    else:
        one, two = (_us(found, own + again / sharing, arch) for sharing in (1, 2))
        better = [several] if two < GAIN * one else []
    at = configs.index(usual)
    return [*configs[:at], *better, *configs[at:]]


def _is_at_once(found: Region, config: LoopConfig) -> bool:
    """Each program has whole rows of neighbours, without masks."""
    rows = rows_of(found)
    size, count = rows.size.number, rows.count.number
    if not found.reductions or not rows.contiguous or size is None or count is None or config.repeated:
        return False
    return (config.held or size == config.elements) and count % config.rows == 0


def _fits(found: Region, config: LoopConfig, arch: Arch) -> bool:
    """Programs are equal, and leave registers and processors busy."""
    rows = rows_of(found)
    size, count = rows.size.number, rows.count.number
    assert size is not None
    assert count is not None
    whole = sum(bytes_of(type_) // DTYPES[type_.dtype].bytes == size * count for type_ in found.read_types)
    held = config.program_rows * size
    fits = held <= PERSISTENT and held * max(whole, 1) <= HELD_MOST * 32 * config.num_warps
    return fits and count % config.program_rows == 0 and count >= PROGRAMS * arch.chip.processors * config.program_rows


def _read(found: Region, config: LoopConfig) -> tuple[int, int, int]:
    """The bytes that are read for a row: of its own, and of what repeats; and those of the largest element of this."""
    writer = LoopWriter(found, config)
    writer.write()
    sizes = [(DTYPES[one.dtype].bytes, axes) for (one, _), axes in writer.emitter.loads.items() if R in axes]
    own, again = ([size for size, axes in sizes if (X in axes) == is_own] for is_own in (True, False))
    return config.elements * sum(own), config.elements * sum(again), max(again, default=0)


def _us(found: Region, read: float, arch: Arch) -> float:
    """The time of a loop, in microseconds, that reads so many bytes for each row. Most of that is hidden behind what it
    moves, or the other way round."""
    chip, rows = arch.chip, rows_of(found).count.number
    assert rows is not None
    moved = streaming_us(found.moved_types, arch)
    cached = rows * read / (CACHED_BYTES * chip.processors * chip.clock * 1e3)
    return max(cached, moved) + (1 - OVERLAP) * min(cached, moved)
