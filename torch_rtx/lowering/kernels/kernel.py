"""The result of code generation: Triton source with what a build needs to compile it, and a launch to run it."""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx.ir import Dim
from torch_rtx.tactics import Slot


@dataclass(frozen=True)
class ForeignCode:
    """What a kernel that others wrote has in place of a source of this package.

    Attributes:
        form: of `texts`: "ttir", "ptx", or "cubin" in hexadecimal digits.
        texts: the code where every scalar is a multiple of 16 and, if it differs, the code for other scalars.
        slots: the parameters, in order.
        options: further options of Triton, by name.
        block: threads of a block along x, y and z; None: those of `num_warps`.
        shared: bytes of dynamic shared memory per block, of PTX; Triton says them itself.
    """

    form: str
    texts: tuple[str, ...]
    slots: tuple[Slot, ...]
    options: tuple[tuple[str, int | bool | str], ...] = ()
    block: tuple[int, int, int] | None = None
    shared: int = 0


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    Attributes:
        name: the function that `source` defines; equal sources have equal names.
        source: text of a Python module that imports triton alone. It has no constexpr parameters: known sizes are
            literals.
        pointers: dtype, as the IR names it, of each pointer parameter: the tensors that the region reads, in the order
            of its node's arguments, then those that it writes. A float8 that the target does not have is "u8".
        scalars: the integer parameters, which follow the pointers, as dims of the graph.
        grid: number of programs along x, y and z, as dims of the graph. Nothing is launched if one is 0.
        num_warps, num_stages: Triton's options of these names.
        wide: scalars are int64, not int32.
        trigger_early: see `insert_pdl`.
        foreign: of a kernel that others wrote; None: of a generated one.
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
    foreign: ForeignCode | None = None
