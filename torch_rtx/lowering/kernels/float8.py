"""Floats of 8 bits as expressions: by integer arithmetic, which every target has and which rounds as PyTorch does.

A number is rounded to the nearest byte, of two that are as near to the even one. What is too large becomes infinity, or
in a dtype without infinities the largest number, as in PyTorch 2.12 and later.
"""

from __future__ import annotations

from torch_rtx.dtypes import DTYPES, Packing
from torch_rtx.lowering.kernels.expressions import (
    A,
    B,
    C,
    Expression,
    absolute,
    apply,
    bits,
    from_bits,
    ne,
    shl,
    shr,
    where,
)

INFINITY, BIAS, MANTISSA = 0x7F800000, 127, 23  # of f32
SIGN, NAN = 0x80, 0x7F  # of a byte
PACKINGS = {name: dtype.packing for name, dtype in DTYPES.items() if dtype.packing is not None}


def _wide_bits(packing: Packing) -> Expression:
    """The byte A with its fields where f32 has them."""
    byte = apply("cast", A, dtype="i32")
    return shl(byte & NAN, MANTISSA - packing.mantissa) | shl(byte & SIGN, 24)


def _value(packing: Packing) -> Expression:
    """The number of the byte A, from its `_wide_bits` B. The product is exact, also of subnormal numbers."""
    size = A & NAN
    return where(size > packing.largest, from_bits(B | INFINITY), from_bits(B) * 2.0 ** (BIAS - packing.bias))


def _limited(packing: Packing) -> Expression:
    """The size of A, at most that of `Packing.beyond`; this for NaN, too."""
    most = packing.size(packing.beyond)
    return where(absolute(A) <= most, absolute(A), most)


def _byte(packing: Packing) -> Expression:
    """The byte of the number A, whose size is B by `_limited` and has the bits C."""
    shift = MANTISSA - packing.mantissa
    # Half of the last place is added, and to an even number a little less. For subnormal numbers a sum does it, with a
    # number whose last place is theirs.
    normal = shr(C + ((1 << shift - 1) - 1) + (shr(C, shift) & 1), shift) - (BIAS - packing.bias << packing.mantissa)
    places = shift + 1 - packing.bias
    subnormal = bits(B + 2.0**places) - (BIAS + places << MANTISSA)
    size = where(ne(A, A), NAN, where(2.0 ** (1 - packing.bias) > B, subnormal, normal))
    return apply("cast", size | shr(bits(A), 24) & SIGN, dtype="u8")


WIDE_BITS = {name: _wide_bits(packing) for name, packing in PACKINGS.items()}
VALUE = {name: _value(packing) for name, packing in PACKINGS.items()}
LIMITED = {name: _limited(packing) for name, packing in PACKINGS.items()}
BYTE = {name: _byte(packing) for name, packing in PACKINGS.items()}
BITS = bits(A)
# Where the target has the dtype. GPUs convert to e5m2 otherwise than PyTorch: what is too large is no infinity there.
CONVERTED = {"f8e4m3fn": apply("to_e4m3", A)}
FROM_BYTE = {name: apply("from_byte", A, dtype=name) for name in PACKINGS}
