"""Converts PyTorch's symbolic shapes (sympy expressions) to dims of the IR, and tensors to types."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as symfn
from torch.utils._sympy.numbers import int_oo

from torch_rtx.aten import dtype_name
from torch_rtx.errors import Unsupported
from torch_rtx.ir import INT64_MIN, MAIN, Dim, ScalarType, Sym, TensorType, Type, dim_expr
from torch_rtx.lowering.kernels.index import bounds

UNBOUNDED = 2**31  # PyTorch writes "no bound" in several ways; every bound from here on counts as none
EXACT = 2**20  # a number below it times a size below UNBOUNDED fits the 53 mantissa bits of a double
FUNCTIONS = {
    sympy.Add: "+",
    sympy.Mul: "*",
    sympy.Min: "min",
    sympy.Max: "max",
    symfn.FloorDiv: "//",
    symfn.Mod: "%",
    symfn.PythonMod: "%",
    symfn.CleanDiv: "//",
    symfn.Min: "min",
    symfn.Max: "max",
}


class Symbols:
    """Converts the sizes, scalars and tensors of one FX graph to dims and types.

    Args:
        main: the device of MAIN.
        ranges: the ranges that torch.export promises, by sympy symbol. Those of the ShapeEnv are narrower: tracing
            assumes sizes of at least 2, although torch.export may promise that the graph holds for 0 and 1, too.
        typical: the known typical values of symbols.
    """

    def __init__(
        self,
        main: torch.device,
        ranges: Mapping[sympy.Symbol, Any] | None = None,
        typical: Mapping[sympy.Symbol, int] | None = None,
    ) -> None:
        self.main, self._ranges, self._typical = main, ranges or {}, typical or {}
        self._dims: dict[sympy.Expr, Dim] = {}
        self._named: dict[sympy.Expr, str] = {}
        self._computed: dict[sympy.Expr, Sym] = {}

    def dim(self, size: int | torch.SymInt, opaque: bool = False) -> Dim:
        """A size as a dim.

        Args:
            opaque: replace a function that dims lack by a new symbol, whose value is the result of a fallback.

        Raises:
            Unsupported: dims lack a function, and no fallback computes it.
        """
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._dims:
            self._dims[expr] = convert(expr, lambda part: self._leaf(part, size, opaque), self._joined)
        return self._dims[expr]

    def _joined(self, expr: sympy.Expr) -> bool:
        """Whether a size does not tell the functions in it that dims lack and that no symbol stands for: two in a sum
        or a product, or one in anything else. `arange(a, b, 2)` of floats tells its length, and neither of its ends."""
        unknown: list[sympy.Expr] = []
        names = itertools.count()

        def leaf(part: sympy.Expr) -> Dim:
            if not part.is_Symbol and part not in self._named:
                unknown.append(part)
            return Sym(f"part{next(names)}", 1)

        for arg in expr.args:
            convert(arg, leaf, self._joined)
        return len(unknown) > (expr.is_Add or expr.is_Mul)

    def condition(self, value: bool | torch.SymBool) -> Dim:
        """A condition on sizes as a dim: 1 if it holds, else 0.

        Raises:
            Unsupported: dims can't express the condition.
        """
        if isinstance(value, bool):
            return int(value)
        if not all(symbol.is_integer for symbol in value.node.expr.free_symbols):
            raise Unsupported("a condition on numbers other than sizes")
        return compared(value.node.expr, lambda part: self._leaf(part, value, opaque=False))

    def _leaf(self, part: sympy.Expr, value: torch.SymInt | torch.SymBool, opaque: bool) -> Dim:
        """The dim of a symbol in `value`, or of a function that dims lack."""
        if part.is_Symbol:
            return self.sym(part, value.node.shape_env.var_to_range)
        if part in self._computed:
            return self._computed[part]
        if not opaque:
            raise Unsupported(f"the size {part}")
        return self._new(part, value)

    def define(self, size: torch.SymInt) -> None:
        """Let a new symbol stand for `size`, which a call of `host_ops` computes, unless dims can express it."""
        expr = size.node.expr
        try:
            self.dim(size)
        except Unsupported:
            self._dims[expr] = self._computed[expr] = self._new(expr, size)

    def is_computed(self, size: int | torch.SymInt) -> bool:
        """Whether `size` is a symbol of its own, see `define`."""
        return isinstance(size, torch.SymInt) and size.node.expr in self._computed

    def _new(self, part: sympy.Expr, value: torch.SymInt | torch.SymBool) -> Sym:
        """A symbol for a part of `value`. The known ranges may be too narrow: only the sign is taken from them."""
        env = value.node.shape_env
        try:
            natural = bool(env.bound_sympy(part).lower >= 0)
        except AttributeError:  # PyTorch has no bounds of conditional expressions
            natural = False
        return Sym(self._name(part), 0 if natural else INT64_MIN)

    def sym(self, symbol: sympy.Symbol, known: Mapping[sympy.Symbol, Any]) -> Sym:
        """A symbol with its range: the promised one, else that of its ShapeEnv (`known`)."""
        bounds = self._ranges.get(symbol) or known.get(symbol)
        return _sym(self._name(symbol), bounds, self._typical.get(symbol))

    def _name(self, part: sympy.Expr) -> str:
        """PyTorch's name for the size of an input (`s8`). Numbers of other origin get names of our own: PyTorch's may
        mean something else in the IR, as `u8` does."""
        if part.is_Symbol and re.fullmatch(r"s\d+", part.name):
            return str(part.name)
        return self._named.setdefault(part, f"d{len(self._named)}")

    def device(self, device: torch.device) -> str:
        """The IR's name of a device: MAIN, "cpu", or e.g. "cuda1" for another accelerator."""
        if device == self.main or (device.type == self.main.type and device.index is None):
            return MAIN
        return device.type if device.index is None else f"{device.type}{device.index}"

    def type(self, value: Any, opaque: bool = False) -> Type:
        """The type of a (fake) tensor, symbolic scalar or number; `opaque` as for `dim`.

        Raises:
            Unsupported: anything else, including quantized tensors and tensors that are not strided.
        """
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise Unsupported(f"a tensor of layout {value.layout}")
            if value.is_quantized:
                raise Unsupported("a quantized tensor")
            shape = tuple(self.dim(size, opaque) for size in value.shape)
            strides = tuple(self.dim(size, opaque) for size in value.stride())
            return TensorType(dtype_name(value.dtype), shape, strides, self.device(value.device))
        if isinstance(value, torch.SymInt) or type(value) is int:
            return ScalarType("int", self.dim(value, opaque))
        if isinstance(value, torch.SymBool | bool):
            return ScalarType("bool")
        if isinstance(value, torch.SymFloat | float):
            return ScalarType("float")
        raise Unsupported(f"a value of type {type(value).__name__}")


def convert(
    expr: sympy.Expr, leaf: Callable[[sympy.Expr], Dim], joined: Callable[[sympy.Expr], bool] = lambda part: False
) -> Dim:
    """An integer sympy expression as a dim; `leaf` maps symbols, functions that dims lack, and what is `joined`.

    Raises:
        Unsupported: `leaf` does.
    """
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return leaf(expr)
    if isinstance(expr, sympy.Pow | symfn.PowByNatural) and expr.args[1].is_Integer and 0 < expr.args[1] <= 8:
        return dim_expr("*", *[convert(expr.args[0], leaf)] * int(expr.args[1]))
    if isinstance(expr, symfn.TruncToInt | symfn.FloorToInt):
        return _scaled(expr, leaf)
    if expr.func not in FUNCTIONS or joined(expr):
        return leaf(expr)
    return dim_expr(FUNCTIONS[expr.func], *(convert(arg, leaf, joined) for arg in expr.args))


def compared(expr: sympy.Basic, leaf: Callable[[sympy.Expr], Dim]) -> Dim:
    """A condition on integers as a dim: 1 if it holds, else 0; `leaf` as for `convert`.

    Raises:
        Unsupported: `leaf` does, or dims can't express the condition.
    """

    def at_least(a: Dim, b: Dim) -> Dim:
        return dim_expr("max", 0, dim_expr("min", 1, dim_expr("+", a, dim_expr("*", -1, b), 1)))

    if expr in (sympy.true, sympy.false):
        return int(expr is sympy.true)
    if isinstance(expr, sympy.And | sympy.Or):
        parts = (compared(arg, leaf) for arg in expr.args)
        return dim_expr("min" if isinstance(expr, sympy.And) else "max", *parts)
    if isinstance(expr, sympy.Not):
        return _negated(compared(expr.args[0], leaf))
    if not isinstance(expr, sympy.core.relational.Relational):
        raise Unsupported(f"the condition {expr}")
    left, right = (convert(arg, leaf) for arg in (expr.lhs, expr.rhs))
    above, below = at_least(left, right), at_least(right, left)
    equal = dim_expr("min", above, below)
    results = {
        sympy.Ge: above,
        sympy.Le: below,
        sympy.Gt: _negated(below),
        sympy.Lt: _negated(above),
        sympy.Eq: equal,
        sympy.Ne: _negated(equal),
    }
    return results[expr.func]


def _negated(condition: Dim) -> Dim:
    return dim_expr("+", 1, dim_expr("*", -1, condition))


def _scaled(expr: sympy.Expr, leaf: Callable[[sympy.Expr], Dim]) -> Dim:
    """trunc(c * n), the size of an interpolation by the factor c, as an integer division: 1.5 * n is 3 * n // 2.

    A factor with many digits (such as 1.7) is a leaf: floating point rounds the product, and `//` would not. So is a
    number that may be negative: `//` rounds it down, and `trunc` towards 0.
    """
    factors = sympy.Mul.make_args(expr.args[0])
    scales = [factor for factor in factors if factor.is_Float]
    sizes = [factor.args[0] for factor in factors if isinstance(factor, symfn.ToFloat)]
    above, below = float(sympy.prod(scales)).as_integer_ratio()
    if len(sizes) != 1 or len(scales) + 1 != len(factors) or not 0 < above < EXACT or below > EXACT:
        return leaf(expr)
    size = convert(sizes[0], leaf)
    if isinstance(expr, symfn.TruncToInt) and bounds(size)[0] < 0:
        return leaf(expr)
    return dim_expr("//", dim_expr("*", above, size), below)


def _sym(name: str, bounds: Any, typical: int | None) -> Sym:
    if bounds is None:
        return Sym(name)
    low = INT64_MIN if bounds.lower in (-int_oo, -sympy.oo) else max(int(bounds.lower), INT64_MIN)
    high = UNBOUNDED if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
    return Sym(name, low, high if high < UNBOUNDED else None, typical=typical)


def unbacked(value: Any) -> set[sympy.Symbol]:
    """The data-dependent symbols in a value's sizes (`u0`, from nonzero or item)."""
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    found: set[sympy.Symbol] = set()
    for size in sizes:
        if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            found |= {s for s in size.node.expr.free_symbols if str(s).startswith(("u", "zuf", "zf"))}
    return found


def main_device(values: Any) -> torch.device:
    """The device of an engine: that of the first tensor that is not on the CPU, else the CPU."""
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
