"""Index arithmetic: integer polynomials over loop variables and dims, simplified where ranges prove it.

A kernel loops over flat variables; views, broadcasts and strides turn these into addresses: a chain of divisions and
remainders. These rules undo it, so that contiguous memory is read contiguously:

    (c*q + r) // c = q                (c*q + r) % c = r                      where 0 <= r < c
    (g*q + r) // (g*c) = q // c       (g*q + r) % (g*c) = g * (q % c) + r    where 0 <= r < g
    p % (g*c) // g = p // g % c
    c * (p // c) + p % c = p          a * (p // a % c) + p % a = p % (a*c)

All values are at least 0, unless a mask discards them: Triton's `//` and `%`, which are C's, then agree with these.
Numbers that may be negative are `signed` variables, of which nothing is proven; kernels do not divide them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce

from torch_rtx.ir import Dim, Expr, Sym, dim_expr

# Entries of each memo: a model has few shapes, and fusion generates code for every step that it tries.
CACHED = 1 << 14


@dataclass(frozen=True)
class Var:
    """A variable in [0, last]; without `last` a dim, which is its own bound, or, if `signed`, any number."""

    name: str
    last: Index | None = None
    signed: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.last, self.signed))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Div:
    """`arg // by`, or with `remainder` `arg % by`, that no rule simplifies."""

    arg: Index
    by: Index
    remainder: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.arg, self.by, self.remainder))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _text(self) -> str:
        return f"({self.arg.factor} {'%' if self.remainder else '//'} {self.by.factor})"

    def __str__(self) -> str:
        return self._text


Atom = Var | Div
Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Index:
    """A polynomial in atoms with integer coefficients, in a normal form: equal polynomials compare equal."""

    terms: tuple[tuple[Monomial, int], ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _text(self) -> str:
        return " + ".join(_term(atoms, count) for atoms, count in self.terms) or "0"

    def __str__(self) -> str:
        return self._text

    @property
    def factor(self) -> str:
        """The text as a factor: in parentheses unless it is an atom or a number."""
        return self._text if self.atom is not None or self.number is not None else f"({self._text})"

    @property
    def number(self) -> int | None:
        """The value of a constant, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def atom(self) -> Atom | None:
        """The atom, if the polynomial is a single one."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            return self.terms[0][0][0]
        return None

    def variables(self) -> Iterator[Var]:
        """All variables, those inside divisions too, with repeats."""
        for monomial, _ in self.terms:
            for atom in monomial:
                if isinstance(atom, Div):
                    yield from atom.arg.variables()
                    yield from atom.by.variables()
                else:
                    yield atom

    def __add__(self, other: Index) -> Index:
        if not self.terms or not other.terms:
            return self if self.terms else other
        terms = dict(self.terms)
        for monomial, count in other.terms:
            terms[monomial] = terms.get(monomial, 0) + count
        return _index(terms)

    def __sub__(self, other: Index) -> Index:
        return self + other * constant(-1)

    def __mul__(self, other: Index) -> Index:
        for one, by in ((self, other), (other, self)):
            if not by.terms:
                return by
            if len(by.terms) == 1 and not by.terms[0][0]:
                return _scaled(one, by.terms[0][1])
        return _index(_multiplied(self, other))

    def __floordiv__(self, by: Index) -> Index:
        return _quotient(self, by)

    def __mod__(self, by: Index) -> Index:
        return _remainder(self, by)


def _multiplied(one: Index, other: Index) -> dict[Monomial, int]:
    """The terms of a product, which are not rejoined."""
    terms: dict[Monomial, int] = {}
    for atoms, count in one.terms:
        for more, times in other.terms:
            monomial = tuple(sorted(atoms + more, key=str))
            terms[monomial] = terms.get(monomial, 0) + count * times
    return terms


def _scaled(index: Index, by: int) -> Index:
    """A multiple of `index`, in the normal form as `index` is."""
    return index if by == 1 else Index(tuple([(monomial, by * count) for monomial, count in index.terms]))


@lru_cache(maxsize=CACHED)
def _quotient(index: Index, by: Index) -> Index:
    """`index // by` in the normal form."""
    if not index.terms or not by.terms:
        return constant(0)  # a dimension of size 0 has no positions; Triton refuses to divide by 0
    whole, rest = _natural_split(index, by)
    if within(rest, by):
        return whole
    atom = rest.atom
    if isinstance(atom, Div) and not atom.remainder:
        return whole + atom.arg // (atom.by * by)
    if isinstance(atom, Div):
        size, over = _split(atom.by, by)
        if not over.terms:
            return whole + atom.arg // by % size
    for _, others, outer, _ in _common(rest, by):
        return whole + outer // others
    return whole + _atom(Div(rest, by))


@lru_cache(maxsize=CACHED)
def _remainder(index: Index, by: Index) -> Index:
    """`index % by` in the normal form."""
    if not index.terms or not by.terms:
        return constant(0)  # as above
    _, rest = _natural_split(index, by)
    if within(rest, by):
        return rest
    atom = rest.atom
    if isinstance(atom, Div) and atom.remainder and not _split(atom.by, by)[1].terms:
        return atom.arg % by  # the remainder by a multiple of `by` comes first
    for common, others, outer, inner in _common(rest, by):
        return (outer % others) * common + inner
    return _atom(Div(rest, by, remainder=True))


def constant(number: int) -> Index:
    """`number` as an index."""
    return Index((((), number),)) if number else Index(())


def variable(name: str, size: Index | None = None) -> Index:
    """A variable in [0, size), or a dim."""
    return _atom(Var(name, None if size is None else size - constant(1)))


def bounds(dim: Dim) -> tuple[float, float]:
    """The smallest and the largest value of `dim` for the ranges of its symbols, each taken on its own."""
    if isinstance(dim, int):
        return dim, dim
    if isinstance(dim, Sym):
        return dim.min, math.inf if dim.max is None else dim.max
    lows, highs = zip(*map(bounds, dim.args), strict=True)
    match dim.op:
        case "+":
            return sum(lows), sum(highs)
        case "min" | "max":
            pick = min if dim.op == "min" else max
            return pick(lows), pick(highs)
        case "*":
            ends = [_corner(corner) for corner in itertools.product(*zip(lows, highs, strict=True))]
            return min(ends), max(ends)
    low = max(lows[1], 1)  # of the divisor: no call divides by 0
    if lows[1] < 0:
        return -math.inf, math.inf
    if dim.op == "%":
        return 0, highs[1] - 1 if lows[0] < 0 else min(highs[1] - 1, highs[0])
    ends = [_divided(above, below) for above in (lows[0], highs[0]) for below in (low, highs[1])]
    return min(ends), max(ends)


def multiple(dim: Dim) -> int:
    """A known divisor of `dim`; 0 if the dim is always 0."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        return dim.multiple
    if dim.op == "*":
        return math.prod(map(multiple, dim.args))
    if isinstance(dim, Expr) and dim.op in ("+", "min", "max"):
        return math.gcd(*map(multiple, dim.args))
    return 1


def _corner(factors: Sequence[float]) -> float:
    return 0 if 0 in factors else math.prod(factors)


def _divided(above: float, below: float) -> float:
    return above if math.isinf(above) else above // below


def from_dim(dim: Dim) -> Index:
    """A dim of a graph as an index; its symbols are variables of the same names."""
    if isinstance(dim, int):
        return constant(dim)
    if isinstance(dim, Sym):
        return _atom(Var(dim.name, signed=dim.min < 0))
    args = [from_dim(arg) for arg in dim.args]
    if dim.op == "%" and bounds(dim.args[0])[0] < 0 < bounds(dim.args[1])[0]:  # C's remainder has the sign of `above`
        above, by = (arg.factor for arg in args)
        return _atom(Var(f"(({above} % {by} + {by}) % {by})"))
    if dim.op in ("min", "max"):  # opaque: one number to the polynomial
        signed = any(var.signed for arg in args for var in arg.variables()) and bounds(dim)[0] < 0
        return _atom(Var(f"tl.{dim.op}imum({', '.join(map(str, args))})", signed=signed))
    return reduce(_OPS[dim.op], args)


def to_dim(index: Index, dims: Iterable[Dim]) -> Dim:
    """`index` as a dim: a polynomial in the symbols and subexpressions of `dims`."""
    named: dict[str, Dim] = {}
    left = list(dims)
    while left:
        dim = left.pop()
        if isinstance(dim, Expr):
            left += dim.args
        named[str(from_dim(dim))] = dim
    return _to_dim(index, named)


def _to_dim(index: Index, named: Mapping[str, Dim]) -> Dim:
    def of(atom: Atom) -> Dim:
        if isinstance(atom, Var):
            return named[atom.name]
        return dim_expr("%" if atom.remainder else "//", _to_dim(atom.arg, named), _to_dim(atom.by, named))

    return dim_expr("+", 0, *(dim_expr("*", count, *map(of, atoms)) for atoms, count in index.terms))


def product(sizes: Iterable[Index]) -> Index:
    """The product of `sizes`; 1 without any."""
    return reduce(Index.__mul__, sizes, constant(1))


def linear(position: Iterable[Index], strides: Iterable[Index]) -> Index:
    """The offset of `position`: the dot product with `strides`."""
    return reduce(Index.__add__, (p * s for p, s in zip(position, strides, strict=True)), constant(0))


def ravel(position: Iterable[Index], shape: Iterable[Index]) -> Index:
    """The row-major offset of `position` in a tensor of `shape`."""
    flat = constant(0)
    for at, size in zip(position, shape, strict=True):
        flat = flat * size + at
    return flat


@lru_cache(maxsize=CACHED)
def unravel(flat: Index, shape: tuple[Index, ...]) -> tuple[Index, ...]:
    """The position in a tensor of `shape` at the row-major offset `flat`: the inverse of `ravel`."""
    found = []
    for axis, size in reversed(list(enumerate(shape))):
        if size.number == 1:
            found.append(constant(0))
            continue
        outermost = all(before.number == 1 for before in shape[:axis])
        found.append(flat if outermost else flat % size)
        flat = flat // size
    return tuple(reversed(found))


def substitute(index: Index, values: Mapping[str, Index]) -> Index:
    """`index` with variables replaced by `values`, by name."""
    total = constant(0)
    for monomial, count in index.terms:
        total += product(_substituted(atom, values) for atom in monomial) * constant(count)
    return total


def _substituted(atom: Atom, values: Mapping[str, Index]) -> Index:
    if isinstance(atom, Div):
        arg, by = substitute(atom.arg, values), substitute(atom.by, values)
        return arg % by if atom.remainder else arg // by
    return values.get(atom.name, _atom(atom))


def is_natural(index: Index) -> bool:
    """Whether `index` is provably at least 0."""
    return all(count >= 0 for _, count in index.terms) and not any(var.signed for var in index.variables())


def upper(index: Index) -> Index | None:
    """An upper bound as a polynomial in dims; None if `index` may be negative."""
    if not is_natural(index):
        return None
    total = constant(0)
    for monomial, count in index.terms:
        bounds = [_last(atom) for atom in monomial]
        if any(bound is None for bound in bounds):
            return None
        total += product(bound for bound in bounds if bound is not None) * constant(count)
    return total


def _last(atom: Atom) -> Index | None:
    if isinstance(atom, Var):
        return _atom(atom) if atom.last is None else atom.last
    bound = upper(atom.arg)
    if atom.remainder:
        return atom.by - constant(1)
    return None if bound is None else bound // atom.by


def within(index: Index, size: Index) -> bool:
    """Whether `0 <= index < size` is proven."""
    bound = upper(index)
    return bound is not None and is_natural(size - constant(1) - bound)


def narrowed(index: Index, size: Index) -> Index:
    """`index` where a condition holds that says that it is below `size`: a variable alone has this as its range."""
    atom = index.atom
    if not isinstance(atom, Var) or atom.last is None or atom.signed or within(index, size):
        return index
    return _atom(replace(atom, last=size - constant(1)))


def _split(index: Index, by: Index) -> tuple[Index, Index]:
    """`whole, rest` with `index = whole * by + rest`, where `whole` collects the terms that `by` divides."""
    if len(by.terms) != 1:
        return (constant(1), constant(0)) if index == by else (constant(0), index)
    divisor, size = by.terms[0]
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, count in index.terms:
        left = _without(monomial, divisor)
        times, over = divmod(count, size) if left is not None else (0, count)
        if left is None or (left and over):  # 6*x by 4: the term stays as a whole
            rest[monomial] = count
        else:
            whole[left] = times
            rest[monomial] = over
    return _index(whole), _index(rest)


def _natural_split(index: Index, by: Index) -> tuple[Index, Index]:
    """As `_split`, but for a rest that may be less than 0 although `index` is not: 7 - x is 4 + (3 - x)."""
    whole, rest = _split(index, by)
    return (whole, rest) if is_natural(rest) else (constant(0), index)


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    left = list(monomial)
    for atom in divisor:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def _common(index: Index, by: Index) -> Iterator[tuple[Index, Index, Index, Index]]:
    """`g, c, q, r` with `by = g*c` and `index = g*q + r`, where `0 <= r < g`; larger g come first."""
    if len(by.terms) != 1:
        return
    ((divisor, size),) = by.terms
    shared = {(_shared(monomial, divisor), math.gcd(count, size)) for monomial, count in index.terms if monomial}
    for atoms, count in sorted(shared - {((), 1), (divisor, size)}, key=lambda one: (-len(one[0]), -one[1], str(one))):
        common = Index(((atoms, count),))
        outer, inner = _split(index, common)
        if within(inner, common):
            yield common, Index(((_without(divisor, atoms) or (), size // count),)), outer, inner


def _shared(one: Monomial, other: Monomial) -> Monomial:
    """The greatest common divisor of two monomials."""
    left, found = list(other), []
    for atom in one:
        if atom in left:
            left.remove(atom)
            found.append(atom)
    return tuple(found)


def _index(terms: dict[Monomial, int]) -> Index:
    """The normal form of a sum: no zeros, quotients and remainders rejoined, terms in a fixed order."""
    kept: dict[Monomial, int] | None = {monomial: count for monomial, count in terms.items() if count}
    while kept is not None:
        terms, kept = kept, _joined(kept)
    return Index(tuple(sorted(terms.items(), key=_place) if len(terms) > 1 else terms.items()))


def _place(term: tuple[Monomial, int]) -> tuple[bool | str, ...]:
    monomial, _ = term
    return (not monomial, *map(str, monomial))


def _joined(terms: dict[Monomial, int]) -> dict[Monomial, int] | None:
    """`terms` after one rejoining of a quotient and its remainder; None if there is none."""
    for monomial, count in terms.items():
        for atom in monomial:
            if not isinstance(atom, Div) or not atom.remainder:
                continue
            cofactor = Index(((_without(monomial, (atom,)) or (), count),))
            whole = atom.arg // atom.by
            partners = [(whole, atom.arg)]
            for other in (a for m in terms for a in m if isinstance(a, Div) and a.remainder and a.arg == whole):
                partners.append((_atom(other), atom.arg % (atom.by * other.by)))
            for partner, together in partners:
                # Not rejoined: this would ask for the same product again.
                wanted = _multiplied(Index(tuple(_multiplied(cofactor, atom.by).items())), partner).items()
                if wanted and all(terms.get(key) == value for key, value in wanted):
                    rest = {key: value for key, value in terms.items() if key not in dict(wanted) and key != monomial}
                    for key, value in (cofactor * together).terms:
                        rest[key] = rest.get(key, 0) + value
                    return {key: value for key, value in rest.items() if value}
    return None


def _atom(atom: Atom) -> Index:
    return Index((((atom,), 1),))


def _term(atoms: Monomial, count: int) -> str:
    return " * ".join([*([str(count)] if count != 1 or not atoms else []), *map(str, atoms)])


_OPS: Mapping[str, Callable[[Index, Index], Index]] = {
    "+": Index.__add__,
    "*": Index.__mul__,
    "//": Index.__floordiv__,
    "%": Index.__mod__,
}
