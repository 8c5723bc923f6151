"""Second operands of products that are codes with a scale and a shift, which sums over K share: these follow the sums.

    sum(x * (code - zero) * scale)  ->  scale * sum(x * code) - scale * zero * sum(x)

Codes are numbers that the product's dtype has: integers of 4 or 8 bits, float8, or what is in memory as halves. What
the calls round on the way to an element is not rounded, so that sums are more exact than theirs; where x is infinite,
they may be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx.dtypes import DTYPES, FLOAT, HALVES
from torch_rtx.lowering.kernels.emit import Axes, Emitter, Operand
from torch_rtx.lowering.kernels.expressions import operations
from torch_rtx.lowering.kernels.index import linear
from torch_rtx.lowering.kernels.kernel_ir import Const, Load, Pointwise, Position, Tensor, View, cast
from torch_rtx.lowering.kernels.matmul_template import stored_load
from torch_rtx.lowering.kernels.packed import code, is_cast

WIDE = {"f32", *HALVES}  # what is rounded to float8 was quantized


@dataclass(frozen=True)
class Scaled:
    """`codes` at `position`, and what follows: pairs of "mul", "add" or "sub" and another tensor at its position."""

    codes: Tensor
    position: Position
    steps: tuple[tuple[str, Tensor, Position], ...] = ()

    def varies(self, emitter: Emitter) -> Axes:
        """The loop variables that scales and shifts depend on."""
        return frozenset[str]().union(*(_varies(emitter, one, at) for _, one, at in self.steps))

    def is_late(self, emitter: Emitter) -> bool:
        """There are only scales, the same for all of K."""
        return all(op == "mul" for op, *_ in self.steps) and emitter.looped not in self.varies(emitter)

    def factors(self, emitter: Emitter, added: float = 0.0) -> tuple[Operand | None, Operand | None]:
        """Scale and shift in f32, None for 1 and 0: an element is `scale * (codes + added) + shift`."""
        scale, shift = None, Operand(str(-added)) if added else None
        for op, tensor, position in self.steps:
            other = emitter.value(*_unrounded(tensor, position))
            if op == "mul":
                scale = _combined(emitter, scale, "*", other)
                shift = None if shift is None else _combined(emitter, shift, "*", other)
            elif shift is None and op == "sub":
                shift = _combined(emitter, Operand("0.0"), "-", other)
            else:
                shift = _combined(emitter, shift, "+" if op == "add" else "-", other)
        return scale, shift


def _unrounded(tensor: Tensor, position: Position) -> tuple[Tensor, Position]:
    """What `tensor` at `position` is behind views and casts of floats."""
    match tensor:
        case View():
            return _unrounded(tensor.source, tensor.at(position))
        case Pointwise(args=(inner,)) if is_cast(tensor.expression) and {tensor.dtype, inner.dtype} <= WIDE:
            return _unrounded(inner, position)
    return tensor, position


def _combined(emitter: Emitter, one: Operand | None, op: str, other: Operand) -> Operand:
    return other if one is None else emitter.named(f"{one.text} {op} {other.text}", one.axes | other.axes)


def scaled(emitter: Emitter, tensor: Tensor, position: Position, k: str, dtype: str) -> Scaled | None:
    """`tensor` at `position` as codes of `dtype`, with scales and shifts that are the same for all `k` of a tile; None
    if it is not of this kind."""
    match tensor:
        case View():
            return scaled(emitter, tensor.source, tensor.at(position), k, dtype)
        case Load() if tensor.dtype == dtype and not tensor.anchor:
            return Scaled(tensor, position)
        case Pointwise(args=(inner,)) if is_cast(tensor.expression):
            if DTYPES[inner.dtype].packing:
                return Scaled(inner, position) if stored_load(inner) else None
            if {tensor.dtype, inner.dtype} <= WIDE:
                return scaled(emitter, inner, position, k, dtype)
            is_code = inner.dtype in ("i8", "u8") or code(inner, position) is not None
            return Scaled(cast(inner, dtype), position) if is_code else None
        case Pointwise(args=(first, second)) if DTYPES[tensor.dtype].kind == FLOAT:
            (op, *more) = operations(tensor.expression)
            if more or op not in ("mul", "add", "sub"):
                return None
            for inner, other in ((first, second), (second, first))[: 1 + (op != "sub")]:
                found = None if k in _varies(emitter, other, position) else scaled(emitter, inner, position, k, dtype)
                if found is not None:
                    return Scaled(found.codes, found.position, (*found.steps, (op, other, position)))
    return None


def _varies(emitter: Emitter, tensor: Tensor, position: Position) -> Axes:
    """The loop variables that `tensor` at `position` depends on."""
    match tensor:
        case Const():
            return frozenset()
        case Load(anchor=False):
            return emitter.varies(linear(position, tensor.strides))
        case View():
            return _varies(emitter, tensor.source, tensor.at(position))
        case Pointwise():
            return frozenset[str]().union(*(_varies(emitter, arg, position) for arg in tensor.args))
    return frozenset(emitter.axes)
