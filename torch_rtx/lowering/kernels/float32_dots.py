"""Products of float32 on tensor cores, which multiply TF32: float32 with 10 bits of its mantissa.

Three products of TF32 are nearly as exact as one of float32 (Ootomo and Yokota, 2022). A number is the sum of a TF32
number and a rest that TF32 holds as well, up to its last bit; of `a * b` only the product of both rests is left out,
about 2**-24 of it. The sums of a step, which tensor cores round towards 0, are added to the others in float32.

Tensor cores leave out the last bits of what they read, so numbers are rounded before. Rounded towards 0, products would
be too small by as much in every layer, and a deep model's result by the sum of it.

Triton's own `tf32x3` makes NaN of what overflows, and of numbers next to float32's limit. Here corrections that are not
finite count for nothing, since then the product of the larger parts isn't finite either; and a number that could round
to infinity is rounded towards 0. Infinities and NaN come out as in float32, and so do numbers below its limit; only
products between a thousandth below that limit and the limit may be infinite.
"""

from __future__ import annotations

from torch_rtx.targets import HIGH, Arch

IEEE, TF32, TF32X3 = "ieee", "tf32", "tf32x3"  # how operands are multiplied: without tensor cores, or by them

# With half of the last place of TF32 added; what is behind that place is not read.
_ROUNDED = """
@triton.jit
def tf32_of(x):
    half = tl.where(tl.abs(x) < 1.7e38, 0x1000, 0)
    return (x.to(tl.int32, bitcast=True) + half).to(tl.float32, bitcast=True)

"""
_IN_PARTS = """
@triton.jit
def big_of(x):
    return (tf32_of(x).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_tf32x3(a, b, acc):
    a_big, b_big = big_of(a), big_of(b)
    sums = tl.dot(a - a_big, b_big, input_precision="tf32")
    sums = tl.dot(a_big, b - b_big, sums, input_precision="tf32")
    sums = tl.where(tl.abs(sums) < float("inf"), sums, 0.0)
    return acc + tl.dot(a_big, b_big, sums, input_precision="tf32")

"""


def dot(first: str, second: str, total: str, precision: str) -> str:
    """The code of `total` plus a product of float32; of the product alone if `total` is empty."""
    if precision == TF32X3:
        return f"dot_tf32x3({first}, {second}, {total or '0.0'})"
    if precision == TF32:
        first, second = f"tf32_of({first})", f"tf32_of({second})"
    return f'tl.dot({first}, {second}{total and f", {total}"}, input_precision="{precision}")'


def functions(dtype: str, precision: str) -> str:
    """Source of the functions that `dot` calls for operands of a dtype."""
    if dtype != "f32" or precision == IEEE:
        return ""
    return _ROUNDED if precision == TF32 else f"{_ROUNDED}{_IN_PARTS}"


def precisions(arch: Arch, level: str) -> tuple[str, ...]:
    """How kernels for `arch` may multiply numbers of float32 where HIGHEST or HIGH is asked for, the fastest first."""
    if "tf32" not in arch.features:
        return (IEEE,)
    return (TF32, TF32X3, IEEE) if level == HIGH else (TF32X3, IEEE)
