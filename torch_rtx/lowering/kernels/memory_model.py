"""Memory-bound kernels: the bytes that they move, and their expected times in microseconds."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import Dim, TensorType, typical_size
from torch_rtx.lowering.kernels.index import from_dim, linear, variable
from torch_rtx.lowering.kernels.kernel_ir import Load, Pointwise, Tensor, address, everything
from torch_rtx.lowering.kernels.matmul_template import stored_load
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.targets import Arch

TYPICAL_SIZE = 1024  # stands for a symbolic size without a hint, clamped to its range


def typical(dim: Dim) -> int:
    """A typical value of a dim."""
    return typical_size(dim, TYPICAL_SIZE)


def bytes_of(type_: TensorType) -> int:
    """Bytes of a tensor in memory at typical sizes; broadcast dimensions count once."""
    sizes = (typical(size) for size, stride in zip(type_.shape, type_.strides, strict=True) if stride != 0)
    return prod(sizes) * DTYPES[type_.dtype].bytes


def streaming_us(types: Iterable[TensorType], arch: Arch) -> float:
    """The time of a memory-bound kernel that reads or writes tensors of these types once, in microseconds."""
    return arch.chip.launch + sum(map(bytes_of, types)) / (arch.chip.memory * 1e3)


def epilogue_us(region: Region, arch: Arch) -> float:
    """The time of a separate kernel for what follows the anchor, in microseconds; 0 if nothing is computed there."""
    if not any(isinstance(one, Pointwise) for one in everything(region.outputs)):
        return 0.0
    assert region.anchor is not None
    read = {one.name for one in everything(region.outputs) if isinstance(one, Load) and not one.anchor}
    moved = [value for value in region.body.inputs if value.name in read]
    moved += [value for value in region.anchor.outputs if value is not None]
    return streaming_us([*map(tensor_type, moved), *region.types], arch)


def prologue_us(region: Region, arch: Arch) -> float:
    """The time of separate kernels that compute operands of the anchor, or put them in another order, in microseconds;
    the anchor reads the results as it does other operands."""
    assert region.anchor is not None
    total = 0.0
    for value in region.anchor.inputs:
        tensor = region.values[value.name]
        if stored_load(tensor) is None or _is_moved(tensor, tensor_type(value)):
            read = {one.name for one in everything((tensor,)) if isinstance(one, Load)}
            moved = [*(one for one in region.body.inputs if one.name in read), value]
            total += streaming_us(map(tensor_type, moved), arch)
    return total


def _is_moved(tensor: Tensor, type_: TensorType) -> bool:
    """The elements of an operand of this type do not lie where `tensor` reads them: calls would have to copy them."""
    position = tuple(variable(f"A{axis}", size) for axis, size in enumerate(tensor.shape))
    found = address(tensor, position)
    return found is not None and (found - linear(position, map(from_dim, type_.strides))).number is None
