"""Pointwise operators: one element of each argument gives one element of the result."""

from __future__ import annotations

import math
import struct
from functools import partial

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.index import Index, from_dim
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.tensor import (
    FLOATS,
    INTS,
    REDUCTIONS,
    TRITON,
    Number,
    Scalar,
    Tensor,
    cast,
    expand,
    number,
    pointwise,
    register,
)

Operand = Tensor | Scalar
ORDER = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


def promote(*operands: Operand) -> str:
    """The dtype in which PyTorch computes with these: within bool, integers and floats, tensors with dimensions
    outweigh those without, and these outweigh Python numbers."""
    best, weight = "bool", (-1, -1, -1)
    for operand in operands:
        dtype = _dtype(operand)
        category = 2 if dtype in FLOATS else 1 if dtype in INTS else 0
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


def compute(text: str, out: Types, *operands: Operand) -> Tensor:
    """`text` in the dtype of the result."""
    dtype = out[0].dtype
    return pointwise(text, dtype, *(tensor(o, dtype) for o in operands))


def floating(out: Types) -> None:
    """Raises Unsupported unless the result is a float: such texts are wrong for integers."""
    if out[0].dtype not in FLOATS:
        raise Unsupported(f"a result of dtype {out[0].dtype}")


# ---- one float argument ----------------------------------------------------------------------------------------------

_TANH_SMALL = "{0} * (1.0 + {0} * {0} * (-0.3333333333333333 + {0} * {0} * 0.13333333333333333))"
TANH = f"tl.where(tl.abs({{0}}) < 0.04, {_TANH_SMALL}, 2.0 * tl.sigmoid(2.0 * {{0}}) - 1.0)"
_HARD = REDUCTIONS["min"][1].format(REDUCTIONS["max"][1].format("{0} + 3.0", "0.0"), "6.0")
FLOAT_TEXTS = {
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log10": f"tl.log2({{0}}) * {math.log10(2)!r}",
    # Kahan's: exact where 1 + x is rounded
    "log1p": 'tl.where((1.0 + {0} == 1.0) | ({0} == float("inf")), {0}, '
    "tl.log(1.0 + {0}) * ({0} / ((1.0 + {0}) - 1.0)))",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "sigmoid": "tl.sigmoid({0})",
    "tanh": TANH,
    "silu": "{0} * tl.sigmoid({0})",
    "reciprocal": "1.0 / {0}",
    "hardswish": f"{{0}} * {_HARD} / 6.0",
    "hardsigmoid": f"{_HARD} / 6.0",
    "deg2rad": f"{{0}} * {math.pi / 180!r}",
    "rad2deg": f"{{0}} * {180 / math.pi!r}",
}


def _float(text: str, self: Tensor, *, out: Types) -> Tensor:
    floating(out)
    return compute(text, out, self)


for _name, _text in FLOAT_TEXTS.items():
    op(f"{_name}.default")(partial(_float, _text))


# log2(erfc(a / sqrt(2)) / 2) for a from 0 to 12, highest power first: a minimax fit, weighted so that the relative
# error of a * erfc(a / sqrt(2)) is 5e-6 wherever that is a normal number in f16.
_TAIL = (3.244454e-05, -0.0007484183, 0.0079422587, -0.053051794, -0.45917046, -1.1510367, -1.0000075788)


def _short_gelu(x: Tensor, out: Types) -> Tensor:
    """x * Phi(x) = (x + |x|) / 2 - |x| * erfc(|x| / sqrt(2)) / 2, with the precision of halves, in a third of the
    instructions of `tl.erf`: those take longer than a product with 768 elements to sum. What is no number stays so."""
    half, size = compute("0.5 * {0}", out, x), compute("tl.minimum(tl.abs({0}), 12.0)", out, x)
    return compute("{0} + tl.abs({0}) - {1} * tl.exp2({2})", out, half, size, log2_tail(size, out))


def log2_tail(size: Tensor, out: Types) -> Tensor:
    """The logarithm of what a normal distribution has beyond `size`, from 0 to 12, with the precision of halves."""
    power = compute(f"{_TAIL[0]} * {{0}} + {_TAIL[1]}", out, size)
    for factor in _TAIL[2:]:
        power = compute(f"{{0}} * {{1}} + {factor}", out, power, size)
    return power


@op("gelu.default")
def gelu(self: Tensor, approximate: str = "none", *, out: Types) -> Tensor:
    """x * Phi(x), or its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    if approximate == "none" and out[0].dtype in ("f16", "bf16"):
        return _short_gelu(self, out)
    if approximate == "none":
        return compute(f"0.5 * {{0}} * (1.0 + tl.erf({{0}} * {math.sqrt(0.5)!r}))", out, self)
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
    scale = 2 * math.sqrt(2 / math.pi)
    return compute(f"{{0}} * tl.sigmoid({scale!r} * {{0}} * (1.0 + 0.044715 * {{0}} * {{0}}))", out, self)


@op("expm1.default")
def expm1(self: Tensor, *, out: Types) -> Tensor:
    """exp(x) - 1, by Kahan's method where exp(x) is near 1."""
    floating(out)
    power = compute("tl.exp({0})", out, self)
    near = "tl.where({1} == 1.0, {0}, ({1} - 1.0) * ({0} / tl.log({1})))"
    return compute(f"tl.where(tl.abs({{0}}) < 0.5, {near}, {{1}} - 1.0)", out, self, power)


@op("relu.default")
def relu(self: Tensor, *, out: Types) -> Tensor:
    """max(x, 0); NaN stays NaN."""
    return compute("tl.where({0} < 0, 0, {0})", out, self)


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
    return compute("tl.where({0} > 0, {0}, {0} * {1})", out, self, negative_slope)


@op("elu.default")
def elu(self: Tensor, alpha: Scalar = 1, scale: Scalar = 1, input_scale: Scalar = 1, *, out: Types) -> Tensor:
    """scale * x, or below 0 scale * alpha * (exp(input_scale * x) - 1)."""
    below = expm1(compute("{0} * {1}", out, self, input_scale), out=out)
    return compute("tl.where({0} > 0, {0} * {2}, {1} * {3} * {2})", out, self, below, scale, alpha)


@op("softplus.default")
def softplus(self: Tensor, beta: Scalar = 1, threshold: Scalar = 20, *, out: Types) -> Tensor:
    """log(1 + exp(beta * x)) / beta, or x above the threshold."""
    scaled = compute("{0} * {1}", out, self, beta)
    soft = compute(FLOAT_TEXTS["log1p"], out, compute("tl.exp({0})", out, scaled))
    return compute("tl.where({1} > {3}, {0}, {2} / {4})", out, self, scaled, soft, threshold, beta)


@op("mish.default")
def mish(self: Tensor, *, out: Types) -> Tensor:
    """x * tanh(softplus(x))."""
    return compute("{0} * {1}", out, self, compute(TANH, out, softplus(self, out=out)))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@op("add.Tensor", "add.Scalar")
def add(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """self + alpha * other."""
    if out[0].dtype == "bool":
        return compute("{0} | {1} & {2}", out, self, other, bool(alpha))
    return compute("{0} + {1}", out, self, other) if alpha == 1 else compute("{0} + {1} * {2}", out, self, other, alpha)


@op("sub.Tensor", "sub.Scalar")
def sub(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """self - alpha * other."""
    return compute("{0} - {1}", out, self, other) if alpha == 1 else compute("{0} - {1} * {2}", out, self, other, alpha)


@op("rsub.Tensor", "rsub.Scalar")
def rsub(self: Tensor, other: Operand, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """other - alpha * self."""
    return compute("{1} - {0} * {2}", out, self, other, alpha)


@op("mul.Tensor", "mul.Scalar")
def mul(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self * other."""
    return compute("{0} & {1}" if out[0].dtype == "bool" else "{0} * {1}", out, self, other)


@op("div.Tensor", "div.Scalar")
def div(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self / other."""
    floating(out)
    return compute("{0} / {1}", out, self, other)


# Whether what is left of a division, {2}, has another sign than the divisor, {1}.
_OTHER = "(({2} != 0) & (({2} < 0) != ({1} < 0)))"


@op("div.Tensor_mode", "div.Scalar_mode")
def div_mode(self: Tensor, other: Operand, rounding_mode: str | None, *, out: Types) -> Tensor:
    """self / other, rounded down or towards zero."""
    if rounding_mode is None:
        return div(self, other, out=out)
    if out[0].dtype in ("f16", "bf16"):
        raise Unsupported("a rounded quotient in half precision, which is rounded twice")
    if out[0].dtype in FLOATS:
        text = "tl.where({1} == 0, {0} / {1}, ({0} - {2}) / {1} - " + _OTHER + ".to(tl.float64))"
        if rounding_mode == "trunc":  # of a quotient that is rounded, as PyTorch does
            text = _TRUNC.replace("{0}", f"({{0}} / {{1}}).to({TRITON[out[0].dtype]})")
        return cast(pointwise(text, "f64", *_wide(out, self, other)), out[0].dtype)
    if rounding_mode == "trunc":
        return compute("{0} // {1}", out, self, other)  # Triton's division is C's
    return compute("{0} // {1} - (({0} % {1} != 0) & (({0} < 0) != ({1} < 0))).to({0}.dtype)", out, self, other)


def _wide(out: Types, self: Tensor, other: Operand) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of a rounded quotient and what is left of it, of the sign of the first one: in f64, where it is
    exact for all floats of 32 bits whose quotient has less than 29. In f32, 5 / 0.1 is 50, with nothing left."""
    if out[0].dtype == "f64":
        raise Unsupported("a rounded quotient in f64, of which nothing wider says what is left")
    if isinstance(other, float) and out[0].dtype in ("f16", "bf16") and not _exact(other, out[0].dtype):
        raise Unsupported(f"what {out[0].dtype} leaves of a division by {other!r}, which is rounded first")
    given = (tensor(one, register(out[0].dtype)) for one in (self, other))
    first, second = (cast(pointwise("{0}", t.dtype, t) if isinstance(t, Number) else t, "f64") for t in given)
    whole = f"{{0}} - {_TRUNC.replace('{0}', '({0} / {1})')} * {{1}}"
    rest = f"tl.where(tl.abs({{0}}) < tl.abs({{1}}), {{0}}, {whole})"  # a finite number, divided by an infinite one
    return first, second, pointwise(rest, "f64", first, second)


@op("floor_divide.default")
def floor_divide(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """self / other, rounded down."""
    return div_mode(self, other, "floor", out=out)


@op("remainder.Tensor", "remainder.Scalar")
def remainder(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The remainder with the sign of the divisor."""
    if out[0].dtype in FLOATS:
        found = pointwise(f"tl.where({_OTHER}, {{2}} + {{1}}, {{2}})", "f64", *_wide(out, self, other))
        return cast(found, out[0].dtype)
    rest = compute("{0} % {1}", out, self, other)
    return compute("tl.where(({0} != 0) & (({0} < 0) != ({1} < 0)), {0} + {1}, {0})", out, rest, other)


@op("neg.default")
def neg(self: Tensor, *, out: Types) -> Tensor:
    """-x."""
    return compute("-{0}", out, self)


@op("abs.default")
def absolute(self: Tensor, *, out: Types) -> Tensor:
    """|x|."""
    return compute("tl.abs({0})", out, self)


@op("pow.Tensor_Scalar")
def power(self: Tensor, exponent: Scalar, *, out: Types) -> Tensor:
    """x to a fixed power: by products and roots where these are exact, else by logarithms in half precision."""
    if isinstance(exponent, Index):
        raise Unsupported("a power that is a dim")
    if exponent == 0:
        return filled(1, out)
    if exponent in (1, 2, 3, 4):
        return compute(" * ".join(["{0}"] * int(exponent)), out, self)
    floating(out)
    exact = {0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", -1: "1.0 / {0}", -2: "1.0 / ({0} * {0})"}
    if exponent in exact:
        return compute(exact[exponent], out, self)
    if out[0].dtype not in ("f16", "bf16") or not math.isfinite(exponent) or float(exponent).is_integer():
        raise Unsupported(f"the power {exponent} in {out[0].dtype}")
    return compute(f"tl.exp2({float(exponent)!r} * tl.log2({{0}}))", out, self)


@op("addcmul.default")
def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Scalar = 1, *, out: Types) -> Tensor:
    """self + value * tensor1 * tensor2."""
    return compute("{0} + {3} * {1} * {2}", out, self, tensor1, tensor2, value)


@op("addcdiv.default")
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Scalar = 1, *, out: Types) -> Tensor:
    """self + value * tensor1 / tensor2."""
    floating(out)
    return compute("{0} + {3} * {1} / {2}", out, self, tensor1, tensor2, value)


@op("lerp.Scalar", "lerp.Tensor")
def lerp(self: Tensor, end: Tensor, weight: Operand, *, out: Types) -> Tensor:
    """self + weight * (end - self), from the nearer end."""
    text = "tl.where(tl.abs({2}) < 0.5, {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1.0 - {2}))"
    return compute(text, out, self, end, weight)


# ---- rounding, limits ------------------------------------------------------------------------------------------------

_TRUNC = "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))"
# Half to even. x + 0.5 may be rounded to another integer; x - floor(x) never is to the other side of one half.
_UP = "({0} - tl.floor({0}) > 0.5) | (({0} - tl.floor({0}) == 0.5) & (tl.floor({0}) != 2.0 * tl.floor(0.5 * {0})))"
_ROUND = f"tl.floor({{0}}) + tl.where({_UP}, 1.0, 0.0)"


def _rounding(text: str, self: Tensor, *, out: Types) -> Tensor:
    return compute(text if out[0].dtype in FLOATS else "{0}", out, self)


for _name, _text in {"floor": "tl.floor({0})", "ceil": "tl.ceil({0})", "trunc": _TRUNC, "round": _ROUND}.items():
    op(f"{_name}.default")(partial(_rounding, _text))


@op("sign.default")
def sign(self: Tensor, *, out: Types) -> Tensor:
    """-1, 0 or 1."""
    if out[0].dtype == "bool":
        return compute("{0}", out, self)
    held = TRITON[register(out[0].dtype)]
    return compute(f"tl.where({{0}} > 0, 1, tl.where({{0}} < 0, -1, 0)).to({held})", out, self)


@op("maximum.default")
def maximum(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The larger one, or NaN."""
    return compute("{0} | {1}" if out[0].dtype == "bool" else REDUCTIONS["max"][1], out, self, other)


@op("minimum.default")
def minimum(self: Tensor, other: Operand, *, out: Types) -> Tensor:
    """The smaller one, or NaN."""
    return compute("{0} & {1}" if out[0].dtype == "bool" else REDUCTIONS["min"][1], out, self, other)


@op("clamp.default", "clamp.Tensor")
def clamp(self: Tensor, min: Operand | None = None, max: Operand | None = None, *, out: Types) -> Tensor:
    """x limited from below and above; NaN stays NaN, and as a limit makes NaN."""
    if any(isinstance(limit, Tensor) or limit != limit for limit in (min, max)):
        above = self if min is None else maximum(self, min, out=out)
        return above if max is None else minimum(above, max, out=out)
    if min is not None:
        self = compute("tl.where({0} < {1}, {1}, {0})", out, self, min)
    return self if max is None else compute("tl.where({0} > {1}, {1}, {0})", out, self, max)


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
    return compute("tl.where({0} <= {1}, {2}, {0})", out, self, threshold, value)


# ---- comparison, logic -----------------------------------------------------------------------------------------------


def _exact(value: float, dtype: str) -> bool:
    """Whether half precision has this number; the other dtypes of a comparison are registers' own."""
    if dtype == "f16":
        return not math.isfinite(value) or (
            abs(value) <= 65504 and struct.unpack("e", struct.pack("e", value))[0] == value
        )
    return dtype != "bf16" or struct.pack("<f", value)[:2] == b"\0\0"


def _compare(sign: str, self: Tensor, other: Operand, *, out: Types) -> Tensor:
    dtype = promote(self, other)
    if isinstance(other, float) and not _exact(other, dtype):
        raise Unsupported(f"{dtype} compared with {other!r}, which is rounded first")
    return pointwise(f"{{0}} {sign} {{1}}", "bool", tensor(self, dtype), tensor(other, dtype))


for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    op(f"{_name}.Tensor", f"{_name}.Scalar")(partial(_compare, _sign))


def _logical(text: str, self: Tensor, other: Operand = True, *, out: Types) -> Tensor:
    return pointwise(text, "bool", tensor(self, "bool"), tensor(other, "bool"))


op("logical_and.default")(partial(_logical, "{0} & {1}"))
op("logical_or.default")(partial(_logical, "{0} | {1}"))
op("logical_xor.default")(partial(_logical, "{0} ^ {1}"))
op("logical_not.default")(partial(_logical, "{0} ^ {1}"))


def _bitwise(text: str, self: Tensor, other: Operand, *, out: Types) -> Tensor:
    return compute(text, out, self, other)


for _name, _sign in {"and": "&", "or": "|", "xor": "^"}.items():
    op(f"bitwise_{_name}.Tensor", f"bitwise_{_name}.Scalar")(partial(_bitwise, f"{{0}} {_sign} {{1}}"))


def _shift(text: str, self: Tensor, other: Operand, *, out: Types) -> Tensor:
    dtype = out[0].dtype
    if not isinstance(other, int) or dtype not in INTS or not 0 <= other < int(dtype[1:]):
        raise Unsupported("a shift by a number that is not known, or that shifts everything out")
    return compute(text, out, self, other)


for _name, _sign in {"left": "<<", "right": ">>"}.items():
    op(f"bitwise_{_name}_shift.Tensor_Scalar", f"__{_name[0]}shift__.Scalar")(partial(_shift, f"{{0}} {_sign} {{1}}"))


@op("bitwise_not.default")
def bitwise_not(self: Tensor, *, out: Types) -> Tensor:
    """Every bit inverted."""
    return compute("{0} ^ {1}", out, self, True if out[0].dtype == "bool" else -1)


@op("isnan.default")
def isnan(self: Tensor, *, out: Types) -> Tensor:
    """Whether x is no number."""
    return pointwise("{0} != {0}", "bool", self)


@op("isinf.default")
def isinf(self: Tensor, *, out: Types) -> Tensor:
    """Whether x is infinite."""
    if self.dtype not in FLOATS:
        raise Unsupported("isinf of integers")
    return pointwise('tl.abs({0}) == float("inf")', "bool", cast(self, register(self.dtype)))


@op("where.self")
def where(condition: Tensor, self: Operand, other: Operand, *, out: Types) -> Tensor:
    """One or the other."""
    dtype = out[0].dtype
    return pointwise(
        "tl.where({0}, {1}, {2})", dtype, tensor(condition, "bool"), tensor(self, dtype), tensor(other, dtype)
    )


@op("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(self: Tensor, mask: Tensor, value: Operand, *, out: Types) -> Tensor:
    """x, or the value where the mask is set."""
    return where(mask, value, self, out=out)


# ---- copies and factories --------------------------------------------------------------------------------------------


@op("_to_copy.default")
def to_copy(
    self: Tensor,
    dtype: str | None = None,
    layout: str | None = None,
    device: str | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: str | None = None,
    *,
    out: Types,
) -> Tensor:
    """A cast: it rounds even where no memory is involved."""
    target = out[0].dtype
    if self.dtype in FLOATS and target == "u8":
        raise Unsupported("floats as bytes: what is out of range is undefined")
    return cast(self, target, rounded=True)


@op("clone.default", "alias_copy.default", "lift_fresh_copy.default")
def clone(self: Tensor, memory_format: str | None = None, *, out: Types) -> Tensor:
    """x."""
    return self


@op("copy.default")
def copy(self: Tensor, src: Tensor, non_blocking: bool = False, *, out: Types) -> Tensor:
    """src, broadcast and cast to what self is."""
    return expand(cast(src, out[0].dtype, rounded=True), self.shape)


def filled(value: Operand, out: Types) -> Tensor:
    """A tensor of the result's shape that holds one number."""
    shape = tuple(map(from_dim, out[0].shape))
    one = tensor(value, out[0].dtype)
    return expand(pointwise("{0}", one.dtype, one) if isinstance(one, Number) else one, shape)


def _constant(value: Scalar, *, out: Types, **_: object) -> Tensor:
    return filled(value, out)


for _name, _value in {"zeros": 0, "ones": 1}.items():
    op(f"{_name}.default", f"{_name}_like.default", f"new_{_name}.default")(partial(_constant, _value))


@op("full.default", "full_like.default", "new_full.default")
def full(fill_value: Scalar, *, out: Types, **_: object) -> Tensor:
    """One number everywhere."""
    return filled(fill_value, out)


@op("fill.Scalar", "fill.Tensor")
def fill(self: Tensor, value: Operand, *, out: Types) -> Tensor:
    """One number everywhere."""
    return filled(value, out)


@op("scalar_tensor.default")
def scalar_tensor(s: Scalar, *, out: Types, **_: object) -> Tensor:
    """One number."""
    return filled(s, out)
