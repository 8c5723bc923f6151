"""What code generation makes: Triton source, with all that is needed to compile and to launch it."""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx.ir import Dim


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    Attributes:
        name: the function that `source` defines; equal sources have equal names.
        source: the text of a Python module. It imports triton alone and has no constexpr parameters: sizes that are
            known stand in it as numbers.
        pointers: dtype, as the IR names it, of each pointer: the tensors that the region reads, in the order of its
            node's arguments, then those that it writes.
        scalars: the integer parameters that follow, as dims of the graph.
        grid: how many programs there are along x, y and z; dims of the graph. Nothing is launched where one is 0.
        num_warps, num_stages: Triton's options of these names.
        wide: the scalars are 64 bit, not 32.
        trigger_early: see `insert_pdl`.
    """

    name: str
    source: str
    pointers: tuple[str, ...]
    scalars: tuple[Dim, ...]
    grid: tuple[Dim, Dim, Dim]
    num_warps: int = 4
    num_stages: int = 1
    wide: bool = False
    trigger_early: bool = False
