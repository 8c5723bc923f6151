"""Pointwise operators: one element of each argument gives one element of the result."""

from __future__ import annotations

import math
import struct
from functools import partial, reduce
from operator import mul as times

from torch_rtx.dtypes import DTYPES, FLOATS, INTS, ORDER, register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import (
    A,
    Apply,
    Arg,
    B,
    C,
    D,
    E,
    Expression,
    absolute,
    apply,
    cast_like,
    divide,
    eq,
    erf,
    exp,
    exp2,
    floor,
    fmin,
    fmod,
    idiv,
    irem,
    log,
    log1p,
    log2,
    maximum,
    minimum,
    ne,
    power,
    rsqrt,
    sigmoid,
    sigmoid2,
    sqrt,
    tanh,
    trunc,
    where,
    xor,
)
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, product, variable, within
from torch_rtx.lowering.kernels.kernel_ir import (
    Const,
    Iota,
    Pointwise,
    Scalar,
    Tensor,
    View,
    cast,
    expand,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.ops.registry import Types, op

Operand = Tensor | Scalar


def promote(*operands: Operand) -> str:
    """The dtype in which PyTorch computes with these: within bool, integers and floats, tensors with dimensions
    outweigh those without, and these outweigh Python numbers."""
    best, weight = "bool", (-1, -1, -1)
    for operand in operands:
        dtype = _dtype(operand)
        category = DTYPES[dtype].kind
        rank = (0 if not isinstance(operand, Tensor) else 2 if operand.shape else 1) if category else 0
        if category > weight[0] or (category == weight[0] and (rank, ORDER.index(dtype)) > weight[1:]):
            mixed = {best, dtype} in ({"f16", "bf16"}, {"u8", "i8"}) and rank == weight[1]
            best = {"f16": "f32", "bf16": "f32"}.get(dtype, "i16") if mixed else dtype
            weight = (category, rank, ORDER.index(best))
    return best


def _dtype(operand: Operand) -> str:
    if isinstance(operand, Tensor):
        return operand.dtype
    return "bool" if isinstance(operand, bool) else "f32" if isinstance(operand, float) else "i64"


def tensor(operand: Operand, dtype: str) -> Tensor:
    """`operand` as a tensor of `dtype`."""
    return cast(operand if isinstance(operand, Tensor) else number(operand, _dtype(operand)), dtype)


def compute(expression: Expression, out: Types, *operands: Operand) -> Tensor:
    """`expression` of `operands`, all in the dtype of the result."""
    dtype = out[0].dtype
    return pointwise(expression, dtype, *(tensor(o, dtype) for o in operands))


def floating(out: Types) -> None:
    """Raises Unsupported unless the result is a float: the operation is wrong for integers."""
    if out[0].dtype not in FLOATS:
        raise Unsupported(f"a result of dtype {out[0].dtype}")


# ---- one float argument ----------------------------------------------------------------------------------------------

_HARD = minimum(maximum(A + 3.0, 0.0), 6.0)
# gelu by tanh: 0.5 * (1 + tanh(u)) is sigmoid(2 * u), or sigmoid2(2 * u * log2(e))
_SLOPE = 2 * math.sqrt(2 / math.pi) * math.log2(math.e)
SOFT = sigmoid2(A * (_SLOPE + 0.044715 * _SLOPE * A * A))
NORMAL = 0.5 * (1.0 + erf(A * math.sqrt(0.5)))  # the distribution function of a normal distribution
_NAMED = ("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "erf", "sigmoid", "tanh")
FLOAT_OPS = {name: apply(name, A) for name in _NAMED} | {
    "log10": log2(A) * math.log10(2),
    "silu": A * sigmoid(A),
    "reciprocal": 1.0 / A,
    "hardswish": A * _HARD / 6.0,
    "hardsigmoid": _HARD / 6.0,
    "deg2rad": A * (math.pi / 180),
    "rad2deg": A * (180 / math.pi),
}


def _float(expression: Expression, self: Tensor, *, out: Types) -> Tensor:
    floating(out)
    return compute(expression, out, self)


for _name, _expression in FLOAT_OPS.items():
    op(f"{_name}.default")(partial(_float, _expression))


# log2(erfc(a / sqrt(2)) / 2) for a from 0 to 12, highest power first: a minimax fit, weighted so that the relative
# error of a * erfc(a / sqrt(2)) is 5e-6 wherever that is a normal number in f16.
_TAIL = (3.244454e-05, -0.0007484183, 0.0079422587, -0.053051794, -0.45917046, -1.1510367, -1.0000075788)


SIZE = fmin(absolute(A), 12.0)  # what `log2_tail` is for


def _short_gelu(x: Tensor, out: Types) -> Tensor:
    """x * Phi(x) = (x + |x|) / 2 - |x| * erfc(|x| / sqrt(2)) / 2, with the precision of halves, in a third of the
    instructions of erf: those take longer than a product with 768 elements to sum. What is no number stays so."""
    half, size = compute(0.5 * A, out, x), compute(SIZE, out, x)
    return compute(A + absolute(A) - B * exp2(C), out, half, size, log2_tail(size, out))


def log2_tail(size: Tensor, out: Types) -> Tensor:
    """The logarithm of what a normal distribution has beyond `size`, from 0 to 12, with the precision of halves."""
    power = compute(_TAIL[0] * A + _TAIL[1], out, size)
    for factor in _TAIL[2:]:
        power = compute(A * B + factor, out, power, size)
    return power


@op("gelu.default")
def gelu(self: Tensor, approximate: str = "none", *, out: Types) -> Tensor:
    """x * Phi(x), or its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    if approximate == "none" and out[0].dtype in ("f16", "bf16"):
        return _short_gelu(self, out)
    return compute(0.5 * A * (1.0 + erf(A * math.sqrt(0.5))) if approximate == "none" else A * SOFT, out, self)


@op("xlogy.Tensor", "xlogy.Scalar_Self", "xlogy.Scalar_Other")
def xlogy(self: Operand, other: Operand, *, out: Types) -> Tensor:
    """x * log(y), and 0 for an x of 0 unless y is NaN."""
    floating(out)
    return compute(where(ne(B, B), B, where(eq(A, 0), 0, A * log(B))), out, self, other)


@op("expm1.default")
def expm1(self: Tensor, *, out: Types) -> Tensor:
    """exp(x) - 1, by Kahan's method where exp(x) is near 1."""
    floating(out)
    near = where(eq(B, 1.0), A, (B - 1.0) * (A / log(B)))
    return compute(where(absolute(A) < 0.5, near, B - 1.0), out, self, compute(exp(A), out, self))


@op("relu.default")
def relu(self: Tensor, *, out: Types) -> Tensor:
    """max(x, 0); NaN stays NaN, and -0 becomes 0."""
    return compute(where(A <= 0, 0, A), out, self)


@op("relu6.default")
def relu6(self: Tensor, *, out: Types) -> Tensor:
    """min(max(x, 0), 6)."""
    return clamp(self, 0, 6, out=out)


@op("hardtanh.default")
def hardtanh(self: Tensor, min_val: Scalar = -1, max_val: Scalar = 1, *, out: Types) -> Tensor:
    """x limited to a range."""
    return clamp(self, min_val, max_val, out=out)


@op("leaky_relu.default")
def leaky_relu(self: Tensor, negative_slope: Scalar = 0.01, *, out: Types) -> Tensor:
    """x, or slope * x below 0."""
    return compute(where(A > 0, A, A * B), out, self, negative_slope)


@op("elu.default")
def elu(self: Tensor, alpha: Scalar = 1, scale: Scalar = 1, input_scale: Scalar = 1, *, out: Types) -> Tensor:
    """scale * x, or below 0 scale * alpha * (exp(input_scale * x) - 1)."""
    below = expm1(compute(A * B, out, self, input_scale), out=out)
    return compute(where(A > 0, A * C, B * D * C), out, self, below, scale, alpha)


@op("softplus.default")
def softplus(self: Tensor, beta: Scalar = 1, threshold: Scalar = 20, *, out: Types) -> Tensor:
    """log(1 + exp(beta * x)) / beta, or x above the threshold."""
    scaled = compute(A * B, out, self, beta)
    soft = compute(log1p(A), out, compute(exp(A), out, scaled))
    return compute(where(B > D, A, C / E), out, self, scaled, soft, threshold, beta)


@op("mish.default")
def mish(self: Tensor, *, out: Types) -> Tensor:
    """x * tanh(softplus(x))."""
    return compute(A * B, out, self, compute(tanh(A), out, softplus(self, out=out)))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@op("add.Tensor", "add.Scalar")
def add(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """self + alpha * other."""
    if out[0].dtype == "bool":
        return compute(A | B & C, out, self, other, bool(alpha))
    return compute(A + B, out, self, other) if alpha == 1 else compute(A + B * C, out, self, other, alpha)


@op("sub.Tensor", "sub.Scalar")
def sub(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """self - alpha * other."""
    return compute(A - B, out, self, other) if alpha == 1 else compute(A - B * C, out, self, other, alpha)


@op("rsub.Tensor", "rsub.Scalar")
def rsub(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """other - alpha * self."""
    return compute(B - A * C, out, self, other, alpha)


@op("mul.Tensor", "mul.Scalar")
def mul(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self * other."""
    return compute(A & B if out[0].dtype == "bool" else A * B, out, self, other)


@op("div.Tensor", "div.Scalar")
def div(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self / other. Elements that share a divisor, as those of a row do, are multiplied by its reciprocal, unless that
    may be infinite."""
    floating(out)
    both = isinstance(self, Tensor) and isinstance(other, Tensor) and out[0].dtype == "f32"
    shared = both and product(other.shape) != product(self.shape)  # type: ignore[union-attr]
    if shared and least(other) >= 2.0**-126:
        return compute(A * B, out, self, compute(1.0 / A, out, other))
    return compute(A / B, out, self, other)


def least(tensor: Operand) -> float:
    """A number that no element of `tensor` is known to be below, unless it is NaN."""
    match tensor:
        case View(source=source):
            return least(source)
        case Const(value=int() | float() as value):
            return value
        case Pointwise(expression=Apply(name, operands), args=(first, *others)):
            limit = least(others[0]) if others and isinstance(others[0], Const) else -math.inf
            match name, operands:
                case "where", (Apply("lt", (Arg(0), Arg(1))), Arg(1), Arg(0)):
                    return max(limit, least(first))
                case "div", (Arg(0), Arg(1)) if limit > 0:
                    return least(first) / limit
                case "cast", (Arg(0),):
                    return least(first)
    return -math.inf


def _other_sign(rest: Expression, dividend: Expression, divisor: Expression) -> Expression:
    """Whether `rest`, what a division leaves, is not 0 and the signs of dividend and divisor differ."""
    return ne(rest, 0) & ne(dividend < 0, divisor < 0)


@op("div.Tensor_mode", "div.Scalar_mode")
def div_mode(self: Tensor, other: Operand, rounding_mode: str | None, *, out: Types) -> Tensor:
    """self / other, rounded down or towards zero."""
    if rounding_mode is None:
        return div(self, other, out=out)
    if out[0].dtype in ("f16", "bf16"):
        raise Unsupported("a rounded quotient in half precision, which is rounded twice")
    if out[0].dtype in FLOATS:
        return _rounded_quotient(rounding_mode, out, self, other)
    if rounding_mode == "trunc":
        return compute(idiv(A, B), out, self, other)
    return compute(idiv(A, B) - cast_like(_other_sign(irem(A, B), A, B), A), out, self, other)


def _rounded_quotient(mode: str, out: Types, self: Tensor, other: Operand) -> Tensor:
    """By the steps of PyTorch's own kernel, which round where these do. The sign of a zero is that of the quotient."""
    dtype = out[0].dtype
    first, second, rest = _divided(out, self, other)
    over = divide(A, B) if dtype == "f32" else A / B
    quotient = compute(over, out, first, second)
    if mode == "trunc":
        return compute(trunc(A), out, quotient)
    whole = compute(over, out, compute(A - B, out, first, rest), second)
    whole = compute(A - apply("cast", _other_sign(B, B, C), dtype=dtype), out, whole, rest, second)
    nearest = compute(floor(A) + apply("cast", A - floor(A) > 0.5, dtype=dtype), out, whole)
    return compute(where(eq(B, 0), C, where(eq(A, 0), 0.0 * C, D)), out, whole, second, quotient, nearest)


def _divided(out: Types, self: Tensor, other: Operand) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of a division and what it leaves, exactly, with the sign of the first operand: by way of f64, since
    the function for f32 takes subnormal numbers for 0."""
    dtype = out[0].dtype
    if isinstance(other, float) and dtype in ("f16", "bf16") and not _exact(other, dtype):
        raise Unsupported(f"what {dtype} leaves of a division by {other!r}, which is rounded first")
    first, second = _tensors(register(dtype), self, other)
    rest = pointwise(fmod(A, B), "f64", cast(first, "f64"), cast(second, "f64"))
    return first, second, cast(rest, register(dtype))


def _tensors(dtype: str, *operands: Operand) -> list[Tensor]:
    """`operands` in `dtype`, also numbers as tensors, as functions of libdevice take them."""
    given = (tensor(one, dtype) for one in operands)
    return [pointwise(A, t.dtype, t) if isinstance(t, Const) else t for t in given]


@op("floor_divide.default", "floor_divide.Scalar")
def floor_divide(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self / other, rounded down."""
    return div_mode(self, other, "floor", out=out)


@op("fmod.Tensor", "fmod.Scalar")
def fmod_(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The remainder with the sign of self."""
    if out[0].dtype in FLOATS:
        return cast(_divided(out, self, other)[2], out[0].dtype)
    return compute(irem(A, B), out, self, other)


@op("remainder.Tensor", "remainder.Scalar")
def remainder(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The remainder with the sign of the divisor."""
    if out[0].dtype in FLOATS:
        _, second, rest = _divided(out, self, other)
        return compute(where(_other_sign(A, A, B), A + B, A), out, rest, second)
    return compute(where(_other_sign(A, A, B), A + B, A), out, compute(irem(A, B), out, self, other), other)


@op("neg.default")
def neg(self: Tensor, *, out: Types) -> Tensor:
    """-x."""
    return compute(-A if out[0].dtype in FLOATS else 0 - A, out, self)


@op("abs.default")
def absolute_(self: Tensor, *, out: Types) -> Tensor:
    """|x|."""
    return compute(absolute(A), out, self)


@op("pow.Tensor_Scalar")
def power_of_number(self: Tensor, exponent: Scalar, *, out: Types) -> Tensor:
    """x to a fixed power: by products and roots where these are exact, else by logarithms in half precision."""
    if isinstance(exponent, Index):
        raise Unsupported("a power that is a dim")
    if exponent == 0:
        return filled(1, out)
    if exponent in (1, 2, 3, 4):
        return compute(reduce(times, [A] * int(exponent)), out, self)
    floating(out)
    exact = {0.5: sqrt(A), -0.5: rsqrt(A), -1: 1.0 / A, -2: 1.0 / (A * A)}
    if exponent in exact:
        return compute(exact[exponent], out, self)
    if out[0].dtype not in ("f16", "bf16") or not math.isfinite(exponent) or float(exponent).is_integer():
        raise Unsupported(f"the power {exponent} in {out[0].dtype}")
    return compute(exp2(float(exponent) * log2(A)), out, self)


@op("pow.Scalar", "pow.Tensor_Tensor")
def power_of_tensor(self: Operand, exponent: Tensor, *, out: Types) -> Tensor:
    """self to the powers `exponent`."""
    floating(out)
    dtype = register(out[0].dtype)
    return cast(pointwise(power(A, B), dtype, *_tensors(dtype, self, exponent)), out[0].dtype)


@op("addcmul.default")
def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Scalar = 1, *, out: Types) -> Tensor:
    """self + value * tensor1 * tensor2."""
    return compute(A + D * B * C, out, self, tensor1, tensor2, value)


@op("addcdiv.default")
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Scalar = 1, *, out: Types) -> Tensor:
    """self + value * tensor1 / tensor2."""
    floating(out)
    return compute(A + D * B / C, out, self, tensor1, tensor2, value)


@op("lerp.Scalar", "lerp.Tensor")
def lerp(self: Tensor, end: Tensor, weight: Operand, *, out: Types) -> Tensor:
    """self + weight * (end - self), from the nearer end."""
    return compute(where(absolute(C) < 0.5, A + C * (B - A), B - (B - A) * (1.0 - C)), out, self, end, weight)


# ---- rounding, limits ------------------------------------------------------------------------------------------------


def _rounding(expression: Expression, self: Tensor, *, out: Types) -> Tensor:
    return compute(expression if out[0].dtype in FLOATS else A, out, self)


for _name, _op in {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint"}.items():
    op(f"{_name}.default")(partial(_rounding, apply(_op, A)))


@op("sign.default")
def sign(self: Tensor, *, out: Types) -> Tensor:
    """-1, 0 or 1."""
    found = where(A > 0, 1, where(A < 0, -1, 0))
    return compute(A if out[0].dtype == "bool" else apply("cast", found, dtype=out[0].dtype), out, self)


@op("maximum.default")
def maximum_(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The larger one, or NaN."""
    return compute(A | B if out[0].dtype == "bool" else maximum(A, B), out, self, other)


@op("minimum.default")
def minimum_(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The smaller one, or NaN."""
    return compute(A & B if out[0].dtype == "bool" else minimum(A, B), out, self, other)


@op("clamp.default", "clamp.Tensor")
def clamp(self: Tensor, min: Operand | None = None, max: Operand | None = None, *, out: Types) -> Tensor:
    """x limited from below and above; NaN stays NaN, and as a limit makes NaN. Of two zeros -0 is the smaller one."""
    if any(isinstance(limit, Tensor) or limit != limit for limit in (min, max)):
        above = self if min is None else maximum_(self, min, out=out)
        return above if max is None else minimum_(above, max, out=out)
    if min is not None:
        self = compute(where(A <= B if _is_zero(min, 1) else A < B, B, A), out, self, min)
    return self if max is None else compute(where(A >= B if _is_zero(max, -1) else A > B, B, A), out, self, max)


def _is_zero(number: Operand, sign: int) -> bool:
    """Whether a number is the zero of this sign."""
    return isinstance(number, int | float) and number == 0 and math.copysign(1, number) == sign


@op("clamp_min.default", "clamp_min.Tensor")
def clamp_min(self: Tensor, min: Operand, *, out: Types) -> Tensor:
    """x limited from below."""
    return clamp(self, min, out=out)


@op("clamp_max.default", "clamp_max.Tensor")
def clamp_max(self: Tensor, max: Operand, *, out: Types) -> Tensor:
    """x limited from above."""
    return clamp(self, None, max, out=out)


@op("threshold.default")
def threshold(self: Tensor, threshold: Scalar, value: Scalar, *, out: Types) -> Tensor:
    """x above the threshold, else the value."""
    return compute(where(A <= B, C, A), out, self, threshold, value)


# ---- comparison, logic -----------------------------------------------------------------------------------------------


def _exact(value: float, dtype: str) -> bool:
    """Whether half precision has this number; the other dtypes of a comparison are registers' own."""
    if dtype == "f16":
        return not math.isfinite(value) or (
            abs(value) <= 65504 and struct.unpack("e", struct.pack("e", value))[0] == value
        )
    return dtype != "bf16" or struct.pack("<f", value)[:2] == b"\0\0"


def _compare(comparison: Expression, self: Tensor, other: Operand, *, out: Types) -> Tensor:
    dtype = promote(self, other)
    if isinstance(other, float) and not _exact(other, dtype):
        raise Unsupported(f"{dtype} compared with {other!r}, which is rounded first")
    return pointwise(comparison, "bool", tensor(self, dtype), tensor(other, dtype))


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    op(f"{_name}.Tensor", f"{_name}.Scalar")(partial(_compare, apply(_name, A, B)))


def _logical(expression: Expression, self: Tensor, other: Operand = True, *, out: Types) -> Tensor:
    return pointwise(expression, "bool", tensor(self, "bool"), tensor(other, "bool"))


op("logical_and.default")(partial(_logical, A & B))
op("logical_or.default")(partial(_logical, A | B))
op("logical_xor.default")(partial(_logical, xor(A, B)))
op("logical_not.default")(partial(_logical, xor(A, B)))


def _bitwise(expression: Expression, self: Operand, other: Operand, *, out: Types) -> Tensor:
    return compute(expression, out, self, other)


for _name in ("and", "or", "xor"):
    _overloads = (f"bitwise_{_name}.{kind}" for kind in ("Tensor", "Scalar", "Scalar_Tensor"))
    op(*_overloads)(partial(_bitwise, apply(_name, A, B)))


def _shift(op: str, self: Operand, other: Operand, *, out: Types) -> Tensor:
    """A shift by a number that is negative or at least the bits there are leaves 0, or to the right the sign."""
    dtype = out[0].dtype
    if dtype not in INTS:
        raise Unsupported(f"a shift of dtype {dtype}")
    most = DTYPES[dtype].bits - DTYPES[dtype].signed
    by = tensor(other, dtype)
    if _is_below(other, DTYPES[dtype].bits):
        return compute(apply(op, A, B), out, self, by)
    if op == "shl":
        return compute(where((B < 0) | (most < B), 0, apply(op, A, where((B < 0) | (most < B), 0, B))), out, self, by)
    return compute(apply(op, A, where((B < 0) | (most < B), most, B)), out, self, by)


def _is_below(operand: Operand, limit: int) -> bool:
    """Whether all of a number or tensor is known to be at least 0 and less than `limit`."""
    if not isinstance(operand, Tensor):
        return isinstance(operand, int) and 0 <= operand < limit
    position = tuple(variable(f"A{axis}", size) for axis, size in enumerate(operand.shape))
    while isinstance(operand, View):
        position = operand.at(position)
        operand = operand.source
    return isinstance(operand, Iota) and within(operand.at(position), constant(limit))


for _name, _op in {"left": "shl", "right": "shr"}.items():
    _tensor, _scalar = (f"__{_name[0]}shift__.{kind}" for kind in ("Tensor", "Scalar"))
    op(_tensor, _scalar, *(f"bitwise_{_name}_shift.{kind}" for kind in ("Tensor", "Tensor_Scalar")))(
        partial(_shift, _op)
    )


@op("bitwise_not.default")
def bitwise_not(self: Tensor, *, out: Types) -> Tensor:
    """Every bit inverted."""
    return compute(xor(A, B), out, self, True if out[0].dtype == "bool" else -1)


@op("isnan.default")
def isnan(self: Tensor, *, out: Types) -> Tensor:
    """Whether x is no number."""
    return pointwise(ne(A, A), "bool", self)


@op("isinf.default")
def isinf(self: Tensor, *, out: Types) -> Tensor:
    """Whether x is infinite."""
    if self.dtype not in FLOATS:
        raise Unsupported("isinf of integers")
    return pointwise(eq(absolute(A), math.inf), "bool", cast(self, register(self.dtype)))


@op("where.self")
def where_(condition: Tensor, self: Operand, other: Operand, *, out: Types) -> Tensor:
    """One or the other."""
    dtype = out[0].dtype
    return pointwise(where(A, B, C), dtype, tensor(condition, "bool"), tensor(self, dtype), tensor(other, dtype))


@op("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(self: Tensor, mask: Tensor, value: Operand, *, out: Types) -> Tensor:
    """x, or the value where the mask is set."""
    return where_(mask, value, self, out=out)


def filled(value: Operand, out: Types) -> Tensor:
    """A tensor of the result's shape that holds one number."""
    shape = tuple(map(from_dim, out[0].shape))
    one = tensor(value, out[0].dtype)
    return expand(pointwise(A, one.dtype, one) if isinstance(one, Const) else one, shape)
