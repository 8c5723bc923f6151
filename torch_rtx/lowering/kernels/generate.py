"""The kernel of a region, in its best configurations first; and what rival a library call is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, typical_size
from torch_rtx.lowering.kernels.attention import attention_configs, attention_kernel
from torch_rtx.lowering.kernels.body_builder import argument
from torch_rtx.lowering.kernels.conv import conv_configs, conv_kernel, conv_time
from torch_rtx.lowering.kernels.gemm import after_call, gemm_configs, gemm_kernel, gemm_time
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.product import FEW
from torch_rtx.lowering.kernels.region import ANCHORS, Region, region, tensor_type
from torch_rtx.targets import Arch, Library, arch_of

# Per kind of anchor ("" for loops): the configurations for an SM version, best first, and the kernel in one of them.
Family = tuple[Callable[[Region, Arch], Sequence[Any]], Callable[[Region, str, Any], Kernel]]
FAMILIES: Mapping[str, Family] = {
    "": (lambda found, arch: loop_configs(found), loop_kernel),
    "attention": (attention_configs, attention_kernel),
    "conv": (conv_configs, conv_kernel),
    "gemm": (gemm_configs, gemm_kernel),
}

# Kernels took a tenth longer than their model says, of which this is counted: what is as fast both ways is left to the
# kernel.
KERNEL = 1.07
TYPICAL = 16  # a size that is known only at run time, and has no typical value


@lru_cache(maxsize=1024)  # asked for by `split` to see whether there is code, and again for the code
def generate(body: Graph, name: str, sm: int, which: int) -> Kernel | None:
    """The kernel that computes `body` on SM version `sm` (89), in its configuration number `which`; None if there are
    fewer.

    Raises:
        Unsupported: no kernel computes this.
    """
    found, configs = _prepared(body, sm)
    return FAMILIES[family(found)][1](found, name, configs[which]) if which < len(configs) else None


@lru_cache(maxsize=1024)  # asked for once per configuration, and for equal regions of many layers
def _prepared(body: Graph, sm: int) -> tuple[Region, Sequence[Any]]:
    found = region(body)
    return found, FAMILIES[family(found)][0](found, arch_of(sm))


def family(found: Region) -> str:
    """The kind of a region's anchor, "" for a loop."""
    return "" if found.anchor is None else ANCHORS[found.anchor.op]


def library(body: Graph, sm: int) -> str:
    """What the library call in `body` is expected to be on SM version `sm` against its kernel: "slower", "faster", or
    "none" if there is none.

    Calls of a few microseconds lose against a kernel that also does what comes before and after them. Beyond that, on
    Hopper, libraries use clusters and warp specialization, which kernels here do not have: a plain product of 3072 x
    3072 x 768 took 24 us on an H200 against 29, the call and a kernel for its gelu 33 against 33 in one; attention to
    4096 keys 147 us against 155. Where keys are hidden, it is the library that is slower: 37 us against 28 for 2048.
    Very large products, with little after them, take calls 4 to 5 % less: 185 us against 193 for 4096 x 4096 x 4096.
    Rows have to begin at multiples of 16 bytes for all that: a product of 512 x 768 x 50257 took 423 us against 95.
    Attention to 1500 keys took 159 us against 136. A convolution by a window of two dimensions took 79 against 104 for
    960 channels of 64 x 64 pixels, 23 against 20 for 256 of 14 x 14; one of sequences 110 against 86; one by windows of
    one pixel 85 against 46 for 16 images of 64 x 64 and 320 channels.
    """
    found = region(body)
    if found.anchor is None:
        return "none"
    kind, work = family(found), flops(found.anchor)
    arch = arch_of(sm)
    rates = arch.library
    if rates is None or work <= rates.large[kind] or not _is_usual(found.anchor, rates):
        return "slower"
    if kind == "attention":
        return "faster"
    call, rate = rates.call[kind]
    ours = gemm_time(found, arch) if kind == "gemm" else conv_time(found, arch)
    return "faster" if call + work / rate + after_call(found, arch) < KERNEL * ours else "slower"


def _is_usual(anchor: Node, rates: Library) -> bool:
    """Whether a call is one that libraries are made for: attention to many keys, all of them seen; a convolution of
    images that is no product, nor of few channels; a product of rows that can all begin at multiples of 16 bytes."""
    kind = ANCHORS[anchor.op]
    if kind == "attention":
        return elements(_shape(anchor, "key")[-2:-1]) > rates.many_keys and not anchor.arg("is_causal", False)
    if kind == "conv":
        _, channels, *window = _shape(anchor, "weight")
        return elements((channels,)) >= FEW and sum(size != 1 for size in window) > 1
    types = [value.type for value in (*anchor.inputs, *anchor.outputs) if value is not None]
    shapes = [type_.shape for type_ in types if isinstance(type_, TensorType) and len(type_.shape) > 1]
    return all(elements(shape[-1:]) % 8 == 0 for shape in shapes)


def _shape(anchor: Node, name: str) -> tuple[Dim, ...]:
    """The shape of an operand."""
    return tensor_type(argument(anchor, name)).shape


def flops(anchor: Node) -> float:
    """Floating-point operations of a product, convolution or attention, with `TYPICAL` for symbolic sizes."""
    operands = [value.type for value in anchor.inputs if isinstance(value.type, TensorType)]
    result = next(value.type for value in anchor.outputs if value is not None)
    assert isinstance(result, TensorType)
    if ANCHORS[anchor.op] == "attention":
        keys = operands[1].shape[-2]
        return (
            2
            * elements(result.shape)
            * elements((keys,))
            * (1 + elements(operands[0].shape[-1:]) / elements(result.shape[-1:]))
        )
    if ANCHORS[anchor.op] == "conv":
        return 2 * elements(result.shape) * elements(operands[1].shape[1:])
    first = anchor.arg("mat1") or anchor.arg("batch1") or anchor.arg("input") or anchor.arg("self")
    assert isinstance(first, Value)
    assert isinstance(first.type, TensorType)
    return 2 * elements(result.shape) * elements(first.type.shape[-1:])


def elements(shape: tuple[Dim, ...]) -> int:
    """The number of elements of a shape."""
    return math.prod(typical_size(dim, TYPICAL) for dim in shape)
