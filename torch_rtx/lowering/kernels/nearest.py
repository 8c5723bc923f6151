"""Numbers of f32 as the nearest integers of 8 bits, by a sum: x + 1.5 * 2**23 has the bits of the integer as its last.

Of two integers that are as near, the sum has the even one, as `round` has. Instructions that round and convert would
take longer than all else that quantizes an element: GPUs have a quarter or an eighth as many units for them.
"""

from __future__ import annotations

from torch_rtx.dtypes import highest, lowest, register
from torch_rtx.lowering.kernels.expressions import A, Apply, Arg, B, apply, bits, where
from torch_rtx.lowering.kernels.kernel_ir import Const, Pointwise, Tensor, number, pointwise

SUM = bits(A + 1.5 * 2**23)
IN_BYTE = {dtype: apply("cast", SUM, dtype=dtype) for dtype in ("i8", "u8")}
MOVED = {dtype: apply("cast", SUM + B, dtype=dtype) for dtype in IN_BYTE}


def nearest(tensor: Tensor, dtype: str) -> Tensor | None:
    """`tensor` in `dtype`; None if it is not a rounded number, plus an integer or not, that is limited to integers of
    `dtype`. NaN, which is no integer, becomes some integer."""
    if dtype not in IN_BYTE or register(tensor.dtype) != "f32":
        return None
    limits: dict[str, int] = {}
    while (found := _limit(tensor)) is not None and found[0] not in limits:
        way, limits[way], tensor = found
    low, high = limits.get("lt"), limits.get("gt")
    if low is None or high is None or not lowest(dtype) <= low <= high <= highest(dtype):
        return None
    start = 0
    match tensor:
        case Pointwise(expression=Apply("add", (Arg(0), Arg(1))), args=(inner, Const(value=int() | float() as added))):
            if added != int(added) or abs(added) > highest("u8"):
                return None
            tensor, start = inner, int(added)
    match tensor:
        case Pointwise(expression=Apply("rint", (Arg(0),)), args=(value,)):
            for compared, limit in ((A < B, low - start), (A > B, high - start)):
                value = pointwise(where(compared, B, A), "f32", value, number(float(limit), "f32"))
            if not start:
                return pointwise(IN_BYTE[dtype], dtype, value)
            return pointwise(MOVED[dtype], dtype, value, number(start, "i32"))
    return None


def _limit(tensor: Tensor) -> tuple[str, int, Tensor] | None:
    """Whether a whole number limits `tensor` from below (`lt`) or from above (`gt`); the number, and what it limits."""
    match tensor:
        case Pointwise(
            expression=Apply("where", (Apply("lt" | "le" | "gt" | "ge" as way, (Arg(0), Arg(1))), Arg(1), Arg(0))),
            args=(inner, Const(value=int() | float() as limit)),
        ) if limit == limit // 1:
            return ("lt" if way in ("lt", "le") else "gt"), int(limit), inner
    return None
