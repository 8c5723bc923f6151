"""PyTorch's symbolic shapes, which are sympy expressions, as dims of the IR, and tensors as types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as symfn
from torch.utils._sympy.numbers import int_oo

from torch_rtx.aten import dtype_name
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Dim, ScalarType, Sym, TensorType, Type, dim_expr

UNBOUNDED = 2**31  # PyTorch writes "no bound" in several ways; a dim beyond this is none that it could have meant
FUNCTIONS = {
    sympy.Add: "+", sympy.Mul: "*", sympy.Min: "min", sympy.Max: "max",
    symfn.FloorDiv: "//", symfn.Mod: "%", symfn.PythonMod: "%", symfn.CleanDiv: "//",
    symfn.Min: "min", symfn.Max: "max",
}


class Symbols:
    """Turns the sizes, scalars and tensors of one FX graph into dims and types.

    Args:
        main: the device that MAIN stands for.
    """

    def __init__(self, main: torch.device) -> None:
        self.main = main
        self._dims: dict[sympy.Expr, Dim] = {}

    def dim(self, size: int | torch.SymInt) -> Dim:
        """A size as a dim.

        Raises:
            Unsupported: a function that dims do not have.
        """
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._dims:
            self._dims[expr] = convert(expr, lambda symbol: _sym(symbol, size.node.shape_env))
        return self._dims[expr]

    def device(self, device: torch.device) -> str:
        """The IR's name of a device: MAIN, "cpu", or such as "cuda1" for another accelerator."""
        if device == self.main or (device.type == self.main.type and device.index is None):
            return MAIN
        return device.type if device.index is None else f"{device.type}{device.index}"

    def type(self, value: Any) -> Type:
        """The type of a (fake) tensor, symbolic scalar or number.

        Raises:
            Unsupported: anything else, and tensors that are not plain and strided.
        """
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise Unsupported(f"a tensor of layout {value.layout}")
            if value.is_quantized or value.is_conj() or value.is_neg():
                raise Unsupported("a quantized, lazily conjugated or negated tensor")
            shape = tuple(map(self.dim, value.shape))
            return TensorType(dtype_name(value.dtype), shape, tuple(map(self.dim, value.stride())), self.device(value.device))
        if isinstance(value, torch.SymInt) or type(value) is int:
            return ScalarType("int", self.dim(value))
        if isinstance(value, torch.SymBool | bool):
            return ScalarType("bool")
        if isinstance(value, torch.SymFloat | float):
            return ScalarType("float")
        raise Unsupported(f"a value of type {type(value).__name__}")


def convert(expr: sympy.Expr, symbol: Callable[[sympy.Symbol], Dim]) -> Dim:
    """A sympy expression over integers as a dim; `symbol` gives the dim of a symbol.

    Raises:
        Unsupported: a function that dims do not have.
    """
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return symbol(expr)
    if isinstance(expr, sympy.Pow | symfn.PowByNatural) and expr.args[1].is_Integer and 0 < expr.args[1] <= 8:
        return dim_expr("*", *[convert(expr.args[0], symbol)] * int(expr.args[1]))
    if expr.func not in FUNCTIONS:
        raise Unsupported(f"the size {expr}")
    return dim_expr(FUNCTIONS[expr.func], *(convert(arg, symbol) for arg in expr.args))


def _sym(symbol: sympy.Symbol, env: Any) -> Sym:
    bounds = env.var_to_range.get(symbol)
    if bounds is None:
        return Sym(str(symbol))
    low = 0 if bounds.lower in (-int_oo, -sympy.oo) else int(bounds.lower)
    high = UNBOUNDED if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)
    return Sym(str(symbol), max(low, 0), high if high < UNBOUNDED else None)


def unbacked(value: Any) -> set[sympy.Symbol]:
    """The symbols in a value's sizes whose numbers only the data decides (`u0`, from nonzero or item)."""
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    found: set[sympy.Symbol] = set()
    for size in sizes:
        if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            found |= {s for s in size.node.expr.free_symbols if str(s).startswith(("u", "zuf", "zf"))}
    return found


def main_device(values: Any) -> torch.device:
    """The device an engine runs on: that of the first tensor which is not on the CPU, else the CPU."""
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
