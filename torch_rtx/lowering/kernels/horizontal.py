"""Horizontal kernels: independent loops over different tensors, or products of different matrices, in one launch.

Loops that differ in their tensors and in their number of rows alone, *parts* of one kind, share one function, and each
program selects the tensors of its part by its position in the grid:

    def copies(in0, in1, out0, out1):
        program = tl.program_id(0)
        p0, p1, first, size = in0, out0, 0, 768
        other = program >= 1
        p0, p1 = tl.where(other, in1, p0), tl.where(other, out1, p1)
        first, size = tl.where(other, 1, first), tl.where(other, 4096, size)
        part(first, size, p0, p1)

Selecting is cheap: all threads select the same, so that the compiler selects offsets of parameters. A branch for each
part would take the registers of all of them, and a copy of the code for each a second of the compiler's time.

Parts of a few kinds are short loops that would wait for a launch each. Each kind has a function and a branch:

    if program < 2:
        part0(0, 512, in0, out0)
    else:
        part1(2, 2048, in1, out1)

Products of equal sizes are parts of one kind, too: the queries, keys and values of an attention are one launch, whose
programs fill the chip where those of each would not, and no copy of their weights has to be made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, attr_values, dim_expr
from torch_rtx.lowering.kernels.emit import indent
from torch_rtx.lowering.kernels.index import from_dim
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import (
    TILE,
    LoopConfig,
    loop_configs,
    loop_function,
    repeated_configs,
)
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.lowering.kernels.source import PartFunction, assemble, next_power_of_2

TILE_BYTES = 12 << 10  # that a program should move at least: it takes longer than selecting among 64 parts
MAX_TILE = 4096  # elements
Part = tuple[PartFunction, Dim]  # with its number of rows; of a product, that of its tiles


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
def loop_of_part(body: Graph) -> PartFunction:
    """The function of the loop `body`. Loops with equal functions can be parts of one kernel.

    Raises:
        Unsupported: it is no loop.
    """
    found = region(body)
    return loop_function(found, part_configs(found)[0])[0]


def loops_configs(found: Region) -> Sequence[tuple[LoopConfig, ...]]:
    """Configurations of each part of a region of loops, the fastest first.

    Raises:
        Unsupported: a part is no loop, or one of several kinds has reductions.
    """
    first, *others = (loop_function(part, part_configs(part)[0])[0] for part in found.parts)
    if all(other == first for other in others):
        return [(config,) * len(found.parts) for config in part_configs(found.parts[0])]
    if any(part.reductions for part in found.parts):
        raise Unsupported("reductions beside other loops, in one kernel")
    each = [loop_configs(part) for part in found.parts]
    return [tuple(configs[min(which, len(configs) - 1)] for configs in each) for which in range(2)]


def loops(found: Region, configs: Sequence[LoopConfig]) -> list[Part]:
    """The parts of a region of loops, each of them in its configuration.

    Raises:
        Unsupported: a part is no loop.
    """
    return [loop_function(part, config) for part, config in zip(found.parts, configs, strict=True)]


def horizontal_kernel(found: Region, name: str, parts: Sequence[Part], trigger_early: bool = False) -> Kernel:
    """The kernel of a region with parts.

    Args:
        trigger_early: see `Kernel`.

    Raises:
        Unsupported: the parts have symbols that no tensor has, or results that nobody reads.
    """
    if any(not part.body.syms.keys() <= found.body.syms.keys() for part in found.parts):
        raise Unsupported("parts with further symbols in one kernel")
    if [value for node in found.body.nodes for value in node.outputs] != [*found.body.outputs]:
        raise Unsupported("results of parts that are not those of their kernel")
    names = {value.name: value.name for value in found.body.inputs}
    names |= {value.name: f"out{index}" for index, value in enumerate(attr_values(found.body.outputs))}
    programs = [function.programs(size) for function, size in parts]
    rows = [
        [
            str(from_dim(_first(programs, index))),
            str(from_dim(size)),
            *(names[value.name] for value in (*node.inputs, *node.results)),
        ]
        for index, (node, (_, size)) in enumerate(zip(found.body.nodes, parts, strict=True))
    ]
    kinds = [[*group] for _, group in groupby(range(len(parts)), lambda at: parts[at][0])]
    functions, lines = list[str](), ["program = tl.program_id(0)"]
    for index, kind in enumerate(kinds):
        several, last = len(kinds) > 1, index + 1 == len(kinds)
        called = f"part{index}" if several else "part"
        functions.append(parts[kind[0]][0].source.replace("\ndef part(", f"\ndef {called}("))
        if several:
            test = "else" if last else f"{'el' * (index > 0)}if program < {from_dim(_first(programs, kind[-1] + 1))}"
            lines.append(f"{test}:")
        calls = _selection([rows[at] for at in kind], [*found.parts[kind[0]].body.syms], called)
        lines += indent(calls) if several else calls
    every = dim_expr("+", 0, *programs)
    warps, stages = (max(getattr(one, name) for one, _ in parts) for name in ("num_warps", "num_stages"))
    return assemble(found, name, lines, every, warps, stages, "".join(functions), trigger_early)


def _first(programs: Sequence[Dim], index: int) -> Dim:
    """The first program of a part."""
    return dim_expr("+", 0, *programs[:index])


def _selection(rows: Sequence[Sequence[str]], symbols: Sequence[str], called: str) -> Iterator[str]:
    """Lines that call the function `called` with the arguments of the program's part.

    Args:
        rows: the arguments of each part; the first one is the part's first program.
        symbols: further arguments.
    """
    names = ["first", "size", *(f"p{index}" for index in range(len(rows[0]) - 2))]
    differing = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    yield from (f"{names[at]} = {rows[0][at]}" for at in differing)
    for row in rows[1:]:
        yield f"other = program >= {row[0]}"
        yield from (f"{names[at]} = tl.where(other, {row[at]}, {names[at]})" for at in differing)
    arguments = [names[at] if at in differing else rows[0][at] for at in range(len(names))]
    yield f"{called}({', '.join([*arguments, *symbols])})"
