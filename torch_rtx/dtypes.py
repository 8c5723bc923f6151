"""Dtypes: one row per name of the IR, with all that the project knows of it. A leaf: no torch, no Triton.

Kernels hold f16, bf16 and float8 as f32 in registers and round where a value is stored or cast on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

BOOL, INT, FLOAT, COMPLEX = range(4)  # kinds, in the order of PyTorch's type promotion


@dataclass(frozen=True, slots=True)
class Packing:
    """How a float of 8 bits is made of a sign, an exponent and a mantissa.

    Attributes:
        mantissa: its number of bits.
        bias: of the exponent.
        largest: the byte of the largest finite number.
        beyond: the byte that larger numbers get: that of infinity, or of the largest number.
    """

    mantissa: int
    bias: int
    largest: int
    beyond: int

    def size(self, byte: int) -> float:
        """The number with this byte, which has no sign; for infinity, what would follow the largest number."""
        exponent, fraction = divmod(byte, 1 << self.mantissa)
        leading = 1 << self.mantissa if exponent else 0
        return float((leading + fraction) * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa))

    def nearest(self, number: float) -> float:
        """`number` rounded to the dtype: of two that are as near, to the one with the even byte."""
        if number != number:
            return number
        byte = min(range(self.beyond + 1), key=lambda byte: (abs(self.size(byte) - abs(number)), byte & 1))
        return math.copysign(self.size(byte) if byte <= self.largest else math.inf, number)


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype.

    Attributes:
        bits: size of an element in memory.
        kind: BOOL, INT, FLOAT or COMPLEX.
        torch: attribute of the `torch` module.
        safetensors: name in a safetensors file; None if it has none, so that files hold bytes.
        pointer: what Triton calls it in a kernel's signature; "" if Triton has no pointers to it.
        tl: attribute of `triton.language`; "" if Triton does not have the dtype: kernels read and write its bytes.
        register: the dtype that kernels compute in; "" if they do not have the dtype.
        tensor_rate: throughput of tensor cores relative to f16, summed in `sums`; None without such products.
        tolerance: relative error below which two results are the same for the dtype; 0 for exact comparison.
        packing: how a float of 8 bits is made of its byte.
    """

    bits: int
    kind: int
    torch: str
    safetensors: str | None
    pointer: str = ""
    tl: str = ""
    register: str = ""
    tensor_rate: float | None = None
    tolerance: float = 0.0
    packing: Packing | None = None

    @property
    def bytes(self) -> int:
        """Size of an element in memory."""
        return self.bits // 8

    @property
    def sums(self) -> str:
        """The dtype in which tensor cores sum products: exact for integers, until it overflows."""
        return "i32" if self.kind == INT else "f32"

    @property
    def signed(self) -> bool:
        """Whether an integer has a sign."""
        return self.kind == INT and not self.torch.startswith("u")


# In the order in which PyTorch promotes dtypes of one kind.
DTYPES: Mapping[str, DType] = {
    "bool": DType(8, BOOL, "bool", "BOOL", "i1", "int1", "bool"),
    "u8": DType(8, INT, "uint8", "U8", "u8", "uint8", "u8"),
    "i8": DType(8, INT, "int8", "I8", "i8", "int8", "i8", 2.0),
    "u16": DType(16, INT, "uint16", "U16", "u16"),
    "i16": DType(16, INT, "int16", "I16", "i16", "int16", "i16"),
    "u32": DType(32, INT, "uint32", "U32", "u32"),
    "i32": DType(32, INT, "int32", "I32", "i32", "int32", "i32"),
    "u64": DType(64, INT, "uint64", "U64", "u64"),
    "i64": DType(64, INT, "int64", "I64", "i64", "int64", "i64"),
    "f4e2m1fn_x2": DType(8, FLOAT, "float4_e2m1fn_x2", None, register="u8"),  # two values in a byte
    "f8e8m0fnu": DType(8, FLOAT, "float8_e8m0fnu", "F8_E8M0", register="f32"),
    "f8e5m2fnuz": DType(8, FLOAT, "float8_e5m2fnuz", "F8_E5M2FNUZ"),
    "f8e4m3fnuz": DType(8, FLOAT, "float8_e4m3fnuz", "F8_E4M3FNUZ"),
    "f8e5m2": DType(
        8, FLOAT, "float8_e5m2", "F8_E5M2", "fp8e5", "float8e5", "f32", 2.0, 0.12, Packing(2, 15, 0x7B, 0x7C)
    ),
    "f8e4m3fn": DType(
        8, FLOAT, "float8_e4m3fn", "F8_E4M3", "fp8e4nv", "float8e4nv", "f32", 2.0, 0.06, Packing(3, 7, 0x7E, 0x7E)
    ),
    "f16": DType(16, FLOAT, "float16", "F16", "fp16", "float16", "f32", 1.0, 1e-3),
    "bf16": DType(16, FLOAT, "bfloat16", "BF16", "bf16", "bfloat16", "f32", 1.0, 8e-3),
    "f32": DType(32, FLOAT, "float32", "F32", "fp32", "float32", "f32", tolerance=2e-6),
    "f64": DType(64, FLOAT, "float64", "F64", "fp64", "float64", "f64", tolerance=1e-12),
    "c32": DType(32, COMPLEX, "complex32", None),
    "c64": DType(64, COMPLEX, "complex64", "C64"),
    "c128": DType(128, COMPLEX, "complex128", None),
}
# What f32 operands of a product, f32 in memory, become where tensor cores multiply them once, or three times.
TF32 = DType(32, FLOAT, "float32", None, tensor_rate=0.5, tolerance=1e-3)
TF32X3 = DType(32, FLOAT, "float32", None, tensor_rate=0.5 / 3)
# What products multiply, by name: beside dtypes, f32 on tensor cores, and the elements of block-scaled formats, which
# are one value of 8 bits or two of 4.
OPERANDS: Mapping[str, DType] = {
    **DTYPES,
    "tf32": TF32,
    "tf32x3": TF32X3,
    **{name: DType(8, FLOAT, "", None, tensor_rate=2.0) for name in ("mxfp8", "fp4_x2")},
}
BYTES = frozenset(name for name, dtype in DTYPES.items() if dtype.register and not dtype.tl)  # as kernels see them
PACKED = "f4e2m1fn_x2"  # its elements are two values, with which nothing is computed
FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.tl and dtype.kind == FLOAT)
HALVES = frozenset(("f16", "bf16"))
INTS = tuple(name for name, dtype in DTYPES.items() if dtype.register and dtype.kind == INT)
ORDER = tuple(DTYPES)  # of promotion


def register(dtype: str) -> str:
    """The dtype that kernels compute in for a value of `dtype`."""
    return DTYPES[dtype].register


def lowest(dtype: str) -> int | float:
    """The value below all others of `dtype`."""
    return _integers(dtype)[0] if DTYPES[dtype].kind == INT else float("-inf")


def highest(dtype: str) -> int | float:
    """The value above all others of `dtype`."""
    return _integers(dtype)[1] if DTYPES[dtype].kind == INT else float("inf")


def wrapped(value: int, dtype: str) -> int:
    """`value` as an integer of `dtype`, as PyTorch makes it: what does not fit loses its higher bits."""
    least, most = _integers(dtype)
    return (value - least) % (most - least + 1) + least


def _integers(dtype: str) -> tuple[int, int]:
    """The least and the largest integer of `dtype`."""
    count, signed = 1 << DTYPES[dtype].bits, DTYPES[dtype].signed
    return (-count // 2, count // 2 - 1) if signed else (0, count - 1)
