"""How Triton writes the operations of `expressions`: one row per name, with what the performance model needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch_rtx.dtypes import DTYPES, register
from torch_rtx.lowering.kernels.expressions import Apply, Arg, Expression, Literal, operations

# How tightly a text holds together, as in Python; an operand that is looser than its place gets parentheses.
COMPARE, OR, XOR, AND, SHIFT, SUM, PRODUCT, ATOM = range(8)


@dataclass(frozen=True)
class Code:
    """An operation in Triton.

    Attributes:
        text: with a hole for each operand; `{held}` and `{stored}` are the register dtype and the dtype in memory,
            `{bits}` is the size of the latter.
        level: how tightly `text` holds together.
        operands: the least level of each operand.
        expensive: it takes many instructions and registers.
    """

    text: str
    level: int = ATOM
    operands: tuple[int, ...] = (ATOM,)
    expensive: bool = False


def _infix(sign: str, level: int) -> Code:
    left = level + 1 if level == COMPARE else level  # Python would chain comparisons
    return Code(f"{{0}} {sign} {{1}}", level, (left, level + 1))


def _call(name: str, arity: int = 1, more: str = "", expensive: bool = False) -> Code:
    holes = ", ".join(f"{{{hole}}}" for hole in range(arity))
    return Code(f"tl.{name}({holes}{more})", operands=(COMPARE,) * arity, expensive=expensive)


def _tanh(twice: str) -> str:
    """tanh(x) by `twice` sigmoid(2 * x), and by a series where that has no digits left."""
    return f"tl.where(tl.abs({{0}}) < 0.04, {{0}} * (1.0 + {{0}} * {{0}} * {_TANH_FACTOR}), {twice} - 1.0)"


_NAN = ", propagate_nan=tl.PropagateNan.ALL"
_TANH_FACTOR = "(-0.3333333333333333 + {0} * {0} * 0.13333333333333333)"
# By the approximate division, which takes quotients by more than 2**126 for 0, in a third of the instructions of
# Triton's. Subnormal powers of 2 do not count beside the 1.
_LOGISTIC = "libdevice.fast_dividef(1.0, 1.0 + tl.exp2({0} * %s))"
_SIGMOID, _OF_TWICE = (_LOGISTIC % (-factor * math.log2(math.e)) for factor in (1, 2))
# Kahan's: exact where 1 + x is rounded.
_LOG1P = 'tl.where((1.0 + {0} == 1.0) | ({0} == float("inf")), {0}, tl.log(1.0 + {0}) * ({0} / ((1.0 + {0}) - 1.0)))'
# Triton's own cast rounds twice on sm_89. In braces, since templates are formatted.
_TO_E4M3 = (
    'tl.inline_asm_elementwise("{{{{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; '
    'cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {{{{lo, hi}}}}; }}}}", "=r,r,r,r,r", [{0}], dtype=tl.uint8, '
    "is_pure=True, pack=4)"
)
# Rounded to the nearest exponent, ties up; 2**-127, the smallest one, is half of the smallest normal number.
_SIZE = "({0}.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)"
_E8M0_BYTE = f"tl.minimum(({_SIZE} + 0x3FFFFF + ({_SIZE} > 0x7FFFFF)) >> 23, 255).to(tl.uint8)"
_FINITE = "tl.where({0} == 0, 0x400000, {0}.to(tl.int32) << 23)"
_FROM_E8M0_BYTE = f"tl.where({{0}} == 255, 0x7FC00000, {_FINITE}).to(tl.float32, bitcast=True)"
_RINT = "libdevice.rint({0})"
CODES = {
    "add": _infix("+", SUM),
    "sub": _infix("-", SUM),
    "mul": _infix("*", PRODUCT),
    "div": _infix("/", PRODUCT),
    "divide": _call("div_rn", 2),
    "fmod": Code("libdevice.fmod({0}, {1})", operands=(COMPARE, COMPARE)),
    "pow": Code("libdevice.pow({0}, {1})", operands=(COMPARE, COMPARE), expensive=True),
    "idiv": _infix("//", PRODUCT),  # Triton's division of integers is C's
    "irem": _infix("%", PRODUCT),
    "and": _infix("&", AND),
    "or": _infix("|", OR),
    "xor": _infix("^", XOR),
    "shl": _infix("<<", SHIFT),
    "shr": _infix(">>", SHIFT),
    "eq": _infix("==", COMPARE),
    "ne": _infix("!=", COMPARE),
    "lt": _infix("<", COMPARE),
    "le": _infix("<=", COMPARE),
    "gt": _infix(">", COMPARE),
    "ge": _infix(">=", COMPARE),
    "neg": Code("{0} * -1.0", PRODUCT, (PRODUCT,)),  # Triton's -x is 0 - x, so that -0 would be 0
    **{name: _call(name) for name in ("abs", "sqrt", "rsqrt", "exp", "exp2")},
    "sigmoid": Code(_SIGMOID, operands=(PRODUCT,)),
    "sigmoid2": Code(_LOGISTIC % -1.0, operands=(PRODUCT,)),
    **{name: _call(name, expensive=True) for name in ("log", "log2", "sin", "cos", "erf")},
    "log1p": Code(_LOG1P, expensive=True),
    "tanh": Code(_tanh(f"2.0 * {_OF_TWICE}")),
    "trunc": Code("tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))"),
    "rint": Code(_RINT, operands=(COMPARE,)),
    # Triton's functions take subnormal numbers for 0.
    "floor": Code(f"tl.where({_RINT} > {{0}}, {_RINT} - 1.0, {_RINT})"),
    "ceil": Code(f"tl.where({_RINT} < {{0}}, {_RINT} + 1.0, {_RINT})"),
    "minimum": _call("minimum", 2, _NAN),
    "maximum": _call("maximum", 2, _NAN),
    "fmin": _call("minimum", 2),
    "fmax": _call("maximum", 2),
    "where": _call("where", 3),
    "to_bool": Code("({0} != 0)"),
    "cast": Code("{0}.to(tl.{held})"),
    "round_to": Code("{0}.to(tl.{stored}).to(tl.{held})"),
    "bits": Code("{0}.to(tl.int32, bitcast=True)"),
    "from_bits": Code("{0}.to(tl.float32, bitcast=True)"),
    "to_e4m3": Code(_TO_E4M3, operands=(COMPARE,)),
    "from_byte": Code("{0}.to(tl.{stored}, bitcast=True)"),
    "as_int": Code("{0}.to(tl.{stored}).to(tl.int{bits}, bitcast=True)"),
    "as_float": Code("{0}.to(tl.int{bits}).to(tl.{stored}, bitcast=True).to(tl.{held})"),
    "e8m0_byte": Code(_E8M0_BYTE),
    "from_e8m0_byte": Code(_FROM_E8M0_BYTE),
    "cast_like": Code("{0}.to({1}.dtype)", operands=(ATOM, ATOM)),
}
OF_F64 = {
    "sigmoid": _call("sigmoid"),
    "sigmoid2": Code("1.0 / (1.0 + tl.exp2({0} * -1.0))", PRODUCT, (PRODUCT,)),
    "tanh": Code(_tanh("2.0 * tl.sigmoid(2.0 * {0})")),
}


def template(expression: Expression, dtypes: Sequence[str] = ()) -> str:
    """`expression` with a hole `{0}`, `{1}`, ... for each argument; `dtypes` are those of the arguments."""
    return _written(expression, dtypes)[0]


def _written(expression: Expression, dtypes: Sequence[str]) -> tuple[str, int]:
    """The text of an expression, and how tightly it holds together."""
    match expression:
        case Arg(index):
            return f"{{{index}}}", ATOM
        case Literal(value):
            return literal(value), ATOM
        case Apply("cast", (Arg(index) as inner,), dtype) if register(dtypes[index]) == register(dtype):
            return _written(inner, dtypes)
        case Apply(op, operands, dtype):
            code = (OF_F64.get(op) if "f64" in dtypes else None) or CODES[op]
            written = zip((_written(one, dtypes) for one in operands), code.operands, strict=True)
            texts = [text if level >= least else f"({text})" for (text, level), least in written]
            if not dtype:
                return code.text.format(*texts), code.level
            held, stored = (DTYPES[name].tl for name in (register(dtype), dtype))
            return code.text.format(*texts, held=held, stored=stored, bits=DTYPES[dtype].bits), code.level
    raise AssertionError(expression)


def literal(value: float) -> str:
    """A Python number as Triton reads it; of zeros it reads no sign."""
    if str(value) == "-0.0":
        return "(-1.0 * tl.full((), 0.0, tl.float32))"
    return str(value) if abs(value) < float("inf") else f'float("{value}")'


def tl_dtype(dtype: str) -> str:
    """A dtype in the text of a kernel."""
    return f"tl.{DTYPES[dtype].tl}"


def is_expensive(expression: Expression) -> bool:
    """Whether an operation in `expression` takes many instructions and registers."""
    return any(CODES[op].expensive for op in operations(expression))
