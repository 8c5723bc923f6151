"""Scalar expressions: what a pointwise node computes from one element of each of its arguments, as named operations.

An expression says what is computed; how a language writes it is in that language's table, see `triton_ops`. Python's
operators build expressions: with A and B for the first two arguments, `A * sigmoid(B)` is `mul(A, sigmoid(B))`. Values
have the register dtypes of `dtypes`; a literal takes the dtype of what it is combined with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

UNARY = (
    "neg",  # of floats
    *("abs", "floor", "ceil", "trunc", "rint", "sqrt", "rsqrt"),
    *("exp", "exp2", "log", "log2", "log1p", "sin", "cos", "erf", "tanh", "sigmoid"),
    "sigmoid2",  # 1 / (1 + 2**-x)
    "to_bool",  # x != 0
    "cast",  # to the register dtype of `dtype`: no code where the value has it already
    "round_to",  # an f32 to the precision of `dtype`, held as f32
    *("bits", "from_bits"),  # an f32 as the i32 of the same bits, and back
    "to_e4m3",  # an f32 as the u8 of a float8, by the target's own conversion
    "from_byte",  # a u8 as the float8 `dtype` of the same bits
    *("as_int", "as_float"),  # of a number of `dtype`: the integer of the same bits, and back
    *("e8m0_byte", "from_e8m0_byte"),  # the same of float8_e8m0fnu, in u8
)
BINARY = (
    *("add", "sub", "mul", "div", "and", "or", "xor", "shl", "shr", "eq", "ne", "lt", "le", "gt", "ge"),
    "divide",  # f32, rounded once; `div` is a little less exact
    *("idiv", "irem"),  # of integers, rounded towards zero as in C; `irem` has the sign of the first operand
    "fmod",  # of floats: exact, with the sign of the first operand
    "pow",  # of floats
    *("minimum", "maximum"),  # NaN if an operand is NaN
    *("fmin", "fmax"),  # the other operand if one is NaN
    "cast_like",  # the first operand in the register dtype of the second one
)
ARITY = dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2) | {"where": 3}


def _operator(op: str) -> Callable[[Expression, Term], Expression]:
    return lambda self, other: apply(op, self, other)


def _reflected(op: str) -> Callable[[Expression, Term], Expression]:
    return lambda self, other: apply(op, other, self)


class Expression:
    """A scalar expression. `==` is identity: `eq` is the comparison as an operation."""

    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("sub"), _reflected("sub")
    __mul__, __rmul__ = _operator("mul"), _reflected("mul")
    __truediv__, __rtruediv__ = _operator("div"), _reflected("div")
    __and__, __or__ = _operator("and"), _operator("or")
    __lt__, __le__, __gt__, __ge__ = _operator("lt"), _operator("le"), _operator("gt"), _operator("ge")

    def __neg__(self) -> Expression:
        return apply("neg", self)


@dataclass(frozen=True, eq=False)
class Arg(Expression):
    """The element of argument number `index` of the node."""

    index: int


@dataclass(frozen=True, eq=False)
class Literal(Expression):
    """A number."""

    value: bool | int | float


@dataclass(frozen=True, eq=False)
class Apply(Expression):
    """The operation `op`, a key of ARITY, of `operands`; `dtype` is the target of a cast or a rounding."""

    op: str
    operands: tuple[Expression, ...]
    dtype: str = ""


Term = Expression | bool | int | float
A, B, C, D, E = map(Arg, range(5))


def apply(op: str, *operands: Term, dtype: str = "") -> Apply:
    """The operation `op` of `operands`."""
    assert len(operands) == ARITY[op], op
    return Apply(op, tuple(one if isinstance(one, Expression) else Literal(one) for one in operands), dtype)


def _functions(ops: str) -> Iterator[partial[Apply]]:
    return (partial(apply, op) for op in ops.split())


absolute, sqrt, rsqrt, exp, exp2, log, log1p, log2 = _functions("abs sqrt rsqrt exp exp2 log log1p log2")
erf, tanh, sigmoid, sigmoid2 = _functions("erf tanh sigmoid sigmoid2")
floor, trunc, to_bool, where = _functions("floor trunc to_bool where")
xor, eq, ne, divide, idiv, irem, cast_like = _functions("xor eq ne divide idiv irem cast_like")
bits, from_bits, shl, shr = _functions("bits from_bits shl shr")
minimum, maximum, fmin, fmax, fmod, power = _functions("minimum maximum fmin fmax fmod pow")


def operations(expression: Expression) -> Iterator[str]:
    """The names of all operations in `expression`."""
    if isinstance(expression, Apply):
        yield expression.op
        for operand in expression.operands:
            yield from operations(operand)


def text(expression: Expression, names: tuple[str, ...]) -> str:
    """`expression` as nested calls, with `names` for the arguments: `mul(%0, sigmoid(%1))`."""
    match expression:
        case Arg(index):
            return names[index]
        case Literal(value):
            return repr(value)
        case Apply(op, operands, dtype):
            inner = [text(operand, names) for operand in operands] + ([dtype] if dtype else [])
            return f"{op}({', '.join(inner)})"
    raise AssertionError(expression)
