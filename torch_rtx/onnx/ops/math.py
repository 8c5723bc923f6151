"""Elementwise arithmetic, comparisons, logic and bits, and products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.unsigned import LOWEST, WIDER, narrow, widen, widened
from torch_rtx.onnx.registry import op


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Quotients of integers are truncated."""
    if a.is_floating_point() or a.is_complex():
        return torch.div(a, b)
    if a.dtype is torch.uint64:
        return _divide_uint64(a, b)[0]
    return widened(torch.div)(a, b, rounding_mode="trunc")


def _divide_uint64(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and remainder by signed arithmetic: that of half the dividend, doubled, is at most one too small."""
    x, y = torch.broadcast_tensors(widen(a), widen(b))
    small = torch.div((x >> 1) & ~LOWEST, torch.where(y < 0, 1, y), rounding_mode="floor") << 1
    left = x - small * y
    small = small + ((left ^ LOWEST) >= (y ^ LOWEST))
    quotient = torch.where(y < 0, ((x ^ LOWEST) >= (y ^ LOWEST)).to(torch.int64), small)
    return quotient.view(torch.uint64), (x - quotient * y).view(torch.uint64)


BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": widened(torch.add),
    "Sub": widened(torch.sub),
    "Mul": widened(torch.mul),
    "Div": _divide,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": widened(torch.eq),
    "Less": widened(torch.lt, order=True),
    "Greater": widened(torch.gt, order=True),
    "LessOrEqual": widened(torch.le, order=True),
    "GreaterOrEqual": widened(torch.ge, order=True),
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


def lone(known: Any, x: Tensor) -> Any:
    """The number that the host knows, to be computed with `x` without a tensor; None: there is none, or it can't be."""
    depth = 0
    while isinstance(known, list) and len(known) == 1:
        known, depth = known[0], depth + 1
    kind = float if x.is_floating_point() else int if x.dtype in (torch.int32, torch.int64) else None
    return known if type(known) is kind and depth <= x.dim() else None


def _aligned(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """`b` with its first dimension at `axis` of `a`, as operators broadcast before opset 7; None: at the end."""
    if axis is None:
        return b
    return b.reshape(*b.shape, *[1] * (a.dim() - axis % max(a.dim(), 1) - b.dim()))


def _declare_binary(name: str, function: Callable[..., Tensor]) -> None:
    @op(name, since=7)
    def run(a: Tensor, b: Tensor, *, constants: Sequence[Any] = (None, None)) -> Tensor:
        number, first = lone(constants[1], a), lone(constants[0], b)
        if number is None and first is not None and name in ("Add", "Mul"):
            return function(b, first)
        return function(a, b if number is None else number)

    @op(name)
    def legacy(
        a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Any = None
    ) -> Tensor:
        return function(a, _aligned(a, b, axis if broadcast else None))


for _name, _function in BINARY.items():
    _declare_binary(_name, _function)

UNARY: dict[str, Callable[..., Tensor]] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Erf": torch.erf,
    "Ceil": torch.ceil,
    "Floor": torch.floor,
    "Round": torch.round,
    "Reciprocal": torch.reciprocal,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "Neg": torch.neg,
    "BitwiseNot": widened(torch.bitwise_not),
    "Abs": lambda x: x if x.dtype in WIDER else torch.abs(x),
    "Sign": lambda x: (x != 0).to(x.dtype) if x.dtype in WIDER else torch.sign(x),
}


def _declare_unary(name: str, function: Callable[..., Tensor]) -> None:
    @op(name)
    def run(x: Tensor, *, consumed_inputs: Any = None) -> Tensor:
        return function(x)


for _name, _function in UNARY.items():
    _declare_unary(_name, _function)


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where an element is infinite, of the signs that are asked for."""
    x = x.float() if x.dtype.itemsize == 1 else x  # few kernels take eight bits
    positive, negative = x == torch.inf, x == -torch.inf
    if not detect_negative:
        return positive if detect_positive else torch.zeros_like(positive)
    return positive | negative if detect_positive else negative


@op("Sum")
def sum_(*xs: Tensor, consumed_inputs: Any = None) -> Tensor:
    """The sum of all inputs, broadcast."""
    return reduce(BINARY["Add"], xs)


@op("Mean")
def mean(*xs: Tensor, consumed_inputs: Any = None) -> Tensor:
    """The mean of all inputs, broadcast."""
    return reduce(torch.add, xs) / len(xs)


@op("Max")
def max_(*xs: Tensor, consumed_inputs: Any = None) -> Tensor:
    """The largest of all inputs, broadcast."""
    return reduce(widened(torch.maximum, order=True), xs)


@op("Min")
def min_(*xs: Tensor, consumed_inputs: Any = None) -> Tensor:
    """The smallest of all inputs, broadcast."""
    return reduce(widened(torch.minimum, order=True), xs)


@op("Clip")
def clip_attributes(
    x: Tensor, *, min: float | None = None, max: float | None = None, consumed_inputs: Any = None
) -> Tensor:
    """`x`, limited by two numbers."""
    return x if min is None and max is None else torch.clamp(x, min, max)


@op("Clip", since=11)
def clip(x: Tensor, min: Tensor | None = None, max: Tensor | None = None, *, known: Sequence[Any] = ()) -> Tensor:
    """`x`, limited by two scalars; `max` wins."""
    low, high = (lone(value, x) for value in (*known[1:], None, None)[:2])
    if (low is None) == (min is None) and (high is None) == (max is None):
        return x if low is None and high is None else torch.clamp(x, low, high)
    if min is not None:
        x = widened(torch.maximum, order=True)(x, min)
    return x if max is None else widened(torch.minimum, order=True)(x, max)


@op("Pow", since=7)
def pow_(x: Tensor, y: Tensor, *, known: Sequence[Any] = (None, None)) -> Tensor:
    """`x ** y`, computed in the common type of both and returned in that of `x`."""
    exponent = lone(known[1], x) if x.is_floating_point() else None
    if exponent is not None:
        return torch.pow(x, exponent)
    return narrow(torch.pow(widen(x), widen(y)), x.dtype)


@op("Pow")
def pow_legacy(x: Tensor, y: Tensor, *, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """`x ** y`, with the dimensions of `y` from `axis` on."""
    return pow_(x, _aligned(x, y, axis if broadcast else None))


@op("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder with the sign of `b`; with `fmod` that of `a`."""
    if a.dtype is torch.uint64:
        return _divide_uint64(a, b)[1]
    if fmod or not a.is_floating_point():
        return widened(torch.fmod if fmod else torch.remainder)(a, b)
    # a zero has the sign of `b`
    return torch.copysign(torch.remainder(a, b).abs(), b)


@op("BitShift")
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """`x` shifted by `y` bits; nothing but the sign is left of a value that is shifted by its width or more."""
    if direction not in ("LEFT", "RIGHT"):
        raise OnnxError(f"direction is {direction!r}, not LEFT or RIGHT")
    bits = x.dtype.itemsize * 8
    if x.dtype is torch.uint64 and direction == "RIGHT":
        first = (widen(x) >> 1) & ~LOWEST  # now positive: the arithmetic shift of the rest is a logical one
        count, inside = widen(y), (widen(y) >= 0) & (widen(y) < bits)
        return narrow(
            torch.where(inside, torch.where(count == 0, widen(x), first >> (count - 1).clamp(0, 62)), 0), x.dtype
        )
    wide, count = widen(x), widen(y)
    inside = (count >= 0) & (count < bits)
    count = count.clamp(0, bits - 1)
    if direction == "LEFT":
        return narrow(torch.where(inside, torch.bitwise_left_shift(wide, count), 0), x.dtype)
    return narrow(
        torch.where(inside, torch.bitwise_right_shift(wide, count), torch.where(wide < 0, -1, 0).to(wide.dtype)),
        x.dtype,
    )


@op("Where")
def where(condition: Tensor, x: Tensor, y: Tensor, *, constants: Sequence[Any] = (None, None, None)) -> Tensor:
    """Elements of `x` or `y`, broadcast."""
    numbers = lone(constants[1], y), lone(constants[2], x)
    x, y = (
        value if number is None else torch.full(value.shape, number, dtype=value.dtype, device=value.device)
        for value, number in zip((x, y), numbers, strict=True)
    )
    return torch.where(condition, x, y)


@op("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices or of batches of them, as `torch.matmul`."""
    return widened(torch.matmul)(a, b)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    """alpha * A' @ B' + beta * C."""
    a, b = a.t() if transA else a, b.t() if transB else b
    if not a.is_floating_point():
        product = _scaled(matmul(a, b), alpha)
        return product if c is None else BINARY["Add"](product, _scaled(c, beta))
    if c is None or beta == 0:
        product = torch.mm(a, b)
        return product if alpha == 1 else product * alpha
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Integers times a number, rounded to zero."""
    return x if factor == 1 else narrow((widen(x) * factor).to(widen(x).dtype), x.dtype)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product of int32 matrices whose elements are differences of bytes.

    GPUs multiply no int32 matrices: sums of 256 such products are exact in float32. A product with one matrix has a
    form for bytes, which is found by its float64.
    """
    depth = a.shape[-1]
    if b.dim() == 2 and not (isinstance(depth, int) and depth <= 256):
        return torch.matmul(a.double(), b.double()).to(torch.int32)
    a, b = a.float(), b.float()
    if isinstance(depth, int) and depth <= 256:
        return torch.matmul(a, b).to(torch.int32)
    blocks = (depth + 255) // 256
    a = F.pad(a, (0, blocks * 256 - depth)).unflatten(-1, (blocks, 256)).movedim(-2, -3)
    b = F.pad(b, (0, 0, 0, blocks * 256 - depth)).unflatten(-2, (blocks, 256))
    return torch.matmul(a, b).to(torch.int32).sum(-3, dtype=torch.int32)


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """The int32 product of matrices of bytes less their zero points, for each row of `a` and column of `b`."""
    a, b = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        a = a - (a_zero.unsqueeze(-1) if a_zero.dim() == 1 and a_zero.numel() > 1 else a_zero).to(torch.int32)
    if b_zero is not None:
        b = b - b_zero.to(torch.int32)
    rows, columns = a.dim() == 1, b.dim() == 1
    product = exact_matmul(a[None] if rows else a, b[:, None] if columns else b)
    product = product.squeeze(-2) if rows else product
    return product.squeeze(-1) if columns else product


@op("Einsum")
def einsum(*xs: Tensor, equation: str) -> Tensor:
    """Einstein's summation, as `torch.einsum`."""
    return torch.einsum(equation, *xs)


@op("Det")
def det(x: Tensor) -> Tensor:
    """Determinants of (..., M, M)."""
    return torch.linalg.det(x)
