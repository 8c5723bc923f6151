"""Horizontal kernels: independent loops over different tensors in one launch.

The loops, the *parts*, differ in their tensors and in their number of rows alone. They share one function, and each
program selects the tensors of its part by its position in the grid:

    def copies(in0, in1, out0, out1):
        program = tl.program_id(0)
        p0, p1, first, size = in0, out0, 0, 768
        other = program >= 1
        p0, p1 = tl.where(other, in1, p0), tl.where(other, out1, p1)
        first, size = tl.where(other, 1, first), tl.where(other, 4096, size)
        loop(first, size, p0, p1)

Selecting is cheap: all threads select the same, so that the compiler selects offsets of parameters. A branch for each
part would take the registers of all of them, and a copy of the code for each a second of the compiler's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, attr_values, dim_expr
from torch_rtx.lowering.kernels.index import from_dim
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import (
    TILE,
    LoopConfig,
    LoopFunction,
    loop_configs,
    loop_function,
    repeated_configs,
)
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.lowering.kernels.source import assemble, blocks, next_power_of_2

TILE_BYTES = 12 << 10  # that a program should move at least: it takes longer than selecting among 64 parts
MAX_TILE = 4096  # elements


def part_configs(part: Region) -> list[LoopConfig]:
    """Configurations of a part, the fastest first; not by its number of rows, which others may not share.

    Raises:
        Unsupported: it is no loop.
    """
    configs = loop_configs(part)
    if part.reductions:
        return configs
    if repeated := repeated_configs(part):
        return repeated
    per_element = sum(DTYPES[type_.dtype].bytes for type_ in part.memory_types)
    elements = min(max(next_power_of_2(TILE_BYTES // per_element), TILE), MAX_TILE)
    return [LoopConfig(elements, 1, 4), LoopConfig(elements // 2, 1, 4)]


@lru_cache(maxsize=1024)  # layers of a model have equal loops
def part_function(body: Graph) -> LoopFunction:
    """The function of the loop `body`. Loops with equal functions can be parts of one kernel.

    Raises:
        Unsupported: it is no loop.
    """
    found = region(body)
    return loop_function(found, part_configs(found)[0])[0]


def horizontal_kernel(found: Region, name: str, config: LoopConfig) -> Kernel:
    """The kernel of a region with parts.

    Raises:
        Unsupported: the parts have different functions, symbols that no tensor has, or results that nobody reads.
    """
    loops = [loop_function(part, config) for part in found.parts]
    function, symbols = loops[0][0], found.parts[0].body.syms
    if any(other != function for other, _ in loops) or not symbols.keys() <= found.body.syms.keys():
        raise Unsupported("parts of different code, or with further symbols, in one kernel")
    if [value for node in found.body.nodes for value in node.outputs] != [*found.body.outputs]:
        raise Unsupported("results of parts that are not those of their kernel")
    names = {value.name: value.name for value in found.body.inputs}
    names |= {value.name: f"out{index}" for index, value in enumerate(attr_values(found.body.outputs))}
    programs = [dim_expr("*", function.blocks, blocks(count, config.rows)) for _, count in loops]
    rows = [
        [
            str(from_dim(dim_expr("+", 0, *programs[:index]))),
            str(from_dim(count)),
            *(names[value.name] for value in (*node.inputs, *node.results)),
        ]
        for index, (node, (_, count)) in enumerate(zip(found.body.nodes, loops, strict=True))
    ]
    lines = _selection(rows, [*symbols])
    every = dim_expr("+", 0, *programs)
    return assemble(found, name, lines, every, config.num_warps, function.num_stages, function.source)


def _selection(rows: Sequence[Sequence[str]], symbols: Sequence[str]) -> Iterator[str]:
    """Lines that call `loop` with the arguments of the program's part.

    Args:
        rows: the arguments of each part; the first one is the part's first program.
        symbols: further arguments.
    """
    names = ["first", "size", *(f"p{index}" for index in range(len(rows[0]) - 2))]
    differing = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    yield "program = tl.program_id(0)"
    yield from (f"{names[at]} = {rows[0][at]}" for at in differing)
    for row in rows[1:]:
        yield f"other = program >= {row[0]}"
        yield from (f"{names[at]} = tl.where(other, {row[at]}, {names[at]})" for at in differing)
    arguments = [names[at] if at in differing else rows[0][at] for at in range(len(names))]
    yield f"loop({', '.join([*arguments, *symbols])})"
