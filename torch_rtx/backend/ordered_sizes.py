"""Which of two sizes is the smaller one, where both are multiples of one number.

A view of repeated heads asks for `min(32 * n, 128 * n)` of its strides. PyTorch before 2.13 keeps such a minimum as it
is, and then refuses to export any range of `n`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
from torch.utils._sympy.functions import Min, MinMaxBase

_KNOWN_TO_PYTORCH = hasattr(MinMaxBase, "_collapse_known_multiplicative_terms")


@contextmanager
def ordered_multiples() -> Iterator[None]:
    """Inside, the minimum of `32 * n` and `128 * n` is `32 * n`, and so for a maximum, where `n` is never negative. It
    is a change for all threads: hold Dynamo's lock around it."""
    kind: Any = MinMaxBase
    before = vars(MinMaxBase).get("_find_localzeros")
    if _KNOWN_TO_PYTORCH or before is None:
        yield
        return

    def with_multiples(cls: Any, values: Any, /, **options: Any) -> set[sympy.Expr]:
        return extreme_multiple(cls, before.__func__(cls, values, **options))

    kind._find_localzeros = classmethod(with_multiples)
    try:
        yield
    finally:
        kind._find_localzeros = before


def extreme_multiple(kind: type[sympy.Expr], values: set[sympy.Expr]) -> set[sympy.Expr]:
    """Those of the arguments of `Min` or `Max` that decide: one alone, if all are multiples of the same number."""
    factors = {value: value.as_coeff_Mul() for value in values}
    terms = {term for _, term in factors.values()}
    if len(terms) != 1 or not all(term.is_nonnegative for term in terms):
        return values
    return {(min if kind is Min else max)(values, key=lambda value: factors[value][0])}
