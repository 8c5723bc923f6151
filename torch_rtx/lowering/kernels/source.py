"""From the lines of a body to a `Kernel`: signature, grid and index width, the same for all families."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch_rtx.ir import Dim, Expr, TensorType, attr_dims, dim_expr, type_dims
from torch_rtx.lowering.kernels.emit import indent
from torch_rtx.lowering.kernels.index import bounds
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Region

MIN_BLOCK = 16  # of a dimension of `tl.dot`
HEADER = "import triton\nimport triton.language as tl\n"
LIBDEVICE = "from triton.language.extra import libdevice\n"  # NVIDIA's mathematical functions


@dataclass(frozen=True)
class PartFunction:
    """The code of a part of a horizontal kernel as a function, which parts that differ in their tensors and in their
    number of rows alone share.

    Attributes:
        source: of the function `part`. Its parameters are the part's first program (`first`), its rows (`size`), and
            those that a kernel of the part has.
        pointers, num_warps, num_stages: see `Kernel`.
        rows, blocks: of a tile, and how many programs there are for each tile of rows.
        aligned: the mask of a tile lets its elements be loaded as vectors.
    """

    source: str
    pointers: tuple[str, ...]
    num_warps: int
    num_stages: int
    rows: int = 1
    blocks: int = 1
    aligned: bool = True

    def programs(self, size: Dim) -> Dim:
        """How many programs a part of `size` rows has."""
        return dim_expr("*", self.blocks, blocks(size, self.rows))


PROGRAM = "(tl.program_id(0) - first)"  # the position of a program in its part


def part_source(region: Region, lines: Iterable[str], functions: str) -> str:
    """The source of a function, see `PartFunction`, whose body are `lines`."""
    head = f"\n\n@triton.jit\ndef part(first, size, {', '.join(parameters(region))}):\n"
    return functions + head + "\n".join(indent(lines)) + "\n"


def assemble(
    region: Region,
    name: str,
    lines: Iterable[str],
    programs: Dim,
    num_warps: int,
    num_stages: int,
    functions: str = "",
    trigger_early: bool = False,
) -> Kernel:
    """The kernel whose body are `lines`. Its parameters are the inputs of the region by name, `out0`, `out1`, ...
    for its outputs, and the body's symbols.

    Args:
        programs: size of the one-dimensional grid.
        functions: source of the helper functions that the lines call.
        trigger_early: see `Kernel`.
    """
    body = region.body
    head = f"\n\n@triton.jit\ndef {name}({', '.join(parameters(region))}):\n"
    types = [value.type for value in body.inputs] + list(region.types)
    text = functions + head + "\n".join(indent(lines)) + "\n"
    return Kernel(
        name,
        HEADER + (LIBDEVICE if "libdevice." in text else "") + text,
        tuple(
            "u8" if type_.dtype in region.as_bytes else type_.dtype for type_ in types if isinstance(type_, TensorType)
        ),
        tuple(body.syms.values()),
        (programs, 1, 1),
        num_warps,
        num_stages,
        needs_int64(region),
        trigger_early,
    )


def parameters(region: Region) -> list[str]:
    """The names of the parameters of a kernel: its inputs, outputs and symbols."""
    body = region.body
    return [*(value.name for value in body.inputs), *(f"out{i}" for i in range(len(region.outputs))), *body.syms]


def blocks(count: Dim, block: int) -> Dim:
    """`count` divided by `block`, rounded up."""
    return dim_expr("//", dim_expr("+", count, block - 1), block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def block_of(size: int) -> int:
    """The smallest block of a matrix product that holds `size` elements."""
    return max(MIN_BLOCK, next_power_of_2(size))


def needs_int64(region: Region) -> bool:
    """Some element offset, or a number that the kernel computes with, may exceed int32, so that both must be int64."""
    types = [value.type for value in region.body.values() if isinstance(value.type, TensorType)]
    numbers = [dim for node in region.body.nodes for _, attr in node.args for dim in attr_dims(attr)]
    numbers += [dim for type_ in types for dim in type_dims(type_)]
    return any(_reach(type_) >= 2**31 for type_ in types) or any(map(_is_far, numbers))


def _is_far(dim: Dim) -> bool:
    low, high = bounds(dim)
    return low < -(2**31) or high >= 2**31 or (isinstance(dim, Expr) and any(map(_is_far, dim.args)))


def _reach(type_: TensorType) -> float:
    """How many elements a tensor has, or how far it reaches in memory."""
    ends = zip(type_.shape, type_.strides, strict=True)
    return max(sum(_largest(size, stride) for size, stride in ends), _largest(*type_.shape))


def _largest(*factors: Dim) -> float:
    """The largest value of a product: 0 times a size without a bound is 0."""
    found = [bounds(factor)[1] for factor in factors]
    return 0 if 0 in found else prod(found)
