"""Sizes, strides and other integers of a program: numbers, symbols, and expressions of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch_rtx.errors import InvalidIR

INT64_MIN = -(2**63)
DIM_OPS: dict[str, Callable[[Sequence[int]], int]] = {
    "+": sum,
    "*": math.prod,
    "min": min,
    "max": max,
    "//": lambda args: args[0] // args[1],
    "%": lambda args: args[0] % args[1],
}


@dataclass(frozen=True, slots=True)
class Sym:
    """A number known only at run time: `min <= value <= max` (None: unbounded), a multiple of `multiple`. A size is at
    least 0; other integers may be negative, down to INT64_MIN. `typical` is the value to optimize for, if known."""

    name: str
    min: int = 0
    max: int | None = None
    multiple: int = 1
    typical: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Expr:
    """`op` of DIM_OPS applied to dims. Construct it by `dim_expr`, which normalizes sums and products."""

    op: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        if self.op in ("min", "max"):
            return f"{self.op}({', '.join(map(str, self.args))})"
        return "(" + f" {self.op} ".join(map(str, self.args)) + ")"


Dim = int | Sym | Expr


def dim_expr(op: str, *args: Dim) -> Dim:
    """`op` applied to dims; folds integers, flattens and sorts sums and products.

    Raises:
        InvalidIR: unknown op, or a division by zero.
    """
    if op not in DIM_OPS or (op in ("//", "%") and (len(args) != 2 or args[1] == 0)) or not args:
        raise InvalidIR(f"no dim expression {op!r} of {', '.join(map(str, args))}")
    if all(isinstance(a, int) for a in args):
        return DIM_OPS[op]([a for a in args if isinstance(a, int)])
    if op in ("+", "*"):
        flat = [b for a in args for b in (a.args if isinstance(a, Expr) and a.op == op else (a,))]
        const = DIM_OPS[op]([a for a in flat if isinstance(a, int)])
        rest: list[Dim] = sorted((a for a in flat if not isinstance(a, int)), key=str)
        if op == "*" and const == 0:
            return 0
        if const != (op == "*"):
            rest.insert(0, const)
        return rest[0] if len(rest) == 1 else Expr(op, tuple(rest))
    if op in ("min", "max"):
        args = tuple(dict.fromkeys(sorted(args, key=str)))
        return args[0] if len(args) == 1 else Expr(op, args)
    return args[0] if op == "//" and args[1] == 1 else Expr(op, args)


def dim_syms(dim: Dim) -> Iterator[Sym]:
    """The symbols in `dim`, with repeats."""
    if isinstance(dim, Sym):
        yield dim
    for arg in dim.args if isinstance(dim, Expr) else ():
        yield from dim_syms(arg)


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """The value of `dim` for `sizes`; None if a symbol of it has no size."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        return sizes.get(dim.name)
    args = [evaluate(arg, sizes) for arg in dim.args]
    known = [arg for arg in args if arg is not None]
    return int(DIM_OPS[dim.op](known)) if len(known) == len(args) else None


def typical_size(dim: Dim, default: int) -> int:
    """The size to optimize for: the value of `dim` for the typical values of its symbols. A symbol without one counts
    as the number in its range nearest to `default`."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        nearest = max(dim.min, default if dim.max is None else min(dim.max, default))
        return nearest if dim.typical is None else dim.typical
    return DIM_OPS[dim.op]([typical_size(arg, default) for arg in dim.args])


@lru_cache(maxsize=4096)
def contiguous(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides of `shape`, in elements. As in PyTorch, a size of 0 counts as 1 for the strides to its left; a
    symbol counts as itself, since PyTorch assumes that it is at least 2."""
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.append(step)
        step = dim_expr("*", step, max(size, 1) if isinstance(size, int) else size)
    return tuple(reversed(strides))
