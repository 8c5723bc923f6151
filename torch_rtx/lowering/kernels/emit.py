"""Kernel IR to lines of Triton: each value once, masked loads, loop-invariant values hoisted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch_rtx.dtypes import DTYPES, FLOATS, register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.index import Index, Var, is_natural, linear, variable, within
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Const,
    Gather,
    Iota,
    Load,
    Pointwise,
    Position,
    Reduce,
    Scatter,
    Select,
    Tensor,
    View,
)
from torch_rtx.lowering.kernels.triton_ops import literal, template, tl_dtype

Axes = frozenset[str]
NONE: Axes = frozenset()
VECTOR = 8  # elements of 2 bytes that are stored at once
VECTOR_BITS = 128  # that a thread loads at once
LOAD = 4  # operations that take as long as a load from the L1 cache
MAX_VALUES = 2048  # of a kernel: a larger one takes a second to write, and many to compile
NAMES = re.compile(r"\w+")  # in a line
MAX_DEPTH = 150  # of values that need each other: Python's stack ends before 1000 calls


@dataclass(frozen=True)
class Operand:
    """A value of the kernel: its text, and the loop variables that it depends on."""

    text: str
    axes: Axes = NONE


@dataclass(frozen=True)
class Axis:
    """A loop variable: one dimension of every tile.

    Attributes:
        block: elements of a tile along it.
        mask: the variable that masks elements past the end; "" if the block divides the size.
    """

    name: str
    block: int
    mask: str = ""


@dataclass
class Scope:
    """Lines of one loop level, and the values that have a name in them."""

    lines: list[str] = field(default_factory=list)
    known: dict[object, Operand] = field(default_factory=dict)


class Emitter:
    """Writes the body of one kernel.

    Args:
        axes: the dimensions of a tile, outermost first.
        names: prefix of all names, so that two emitters can write one kernel.

    Attributes:
        reduced: operand and position of each reduction computed so far; see `loops`.
        anchored: the accumulator for a `Load` with `anchor` set, by position; see `matmul_template`.
        operations: how many a program executes for each element of a tile, by the axes of the tile.
        loads: the axes that each address in memory depends on, of every tensor that is read.
        spread: the axis along which loads are of whole tiles, of several rows: Triton may lay a tile of one row out in
            another way, and then moves its elements between threads.
        open: the axis along which nobody needs zeros past the end of a row: every reduction and every store has a mask.
        zeros: loads are 0 wherever a condition does not hold, as products need it, not only where results need them.
    """

    def __init__(self, axes: Sequence[Axis], names: str = "", zeros: bool = False) -> None:
        self.axes = {axis.name: axis for axis in axes}
        self.names = names
        self.reduced: dict[Tensor, tuple[Operand, Position]] = {}
        self.anchored: dict[tuple[Load, Position], Operand] = {}
        self.outer = self.scope = Scope()
        self.looped = ""  # the variable of the current loop
        self.spread, self.open, self.zeros = "", "", zeros
        self.operations: Counter[Axes] = Counter()
        self.loads: dict[tuple[Load, Index], Axes] = {}
        self._varying: dict[str, Axes] = {}
        self._count = self._values = self._depth = 0

    # ---- names -------------------------------------------------------------------------------------------------------

    def assign(self, text: str, axes: Axes, prefix: str = "t") -> Operand:
        """Assign `text` to a new name: in the current loop if it varies there, else before it."""
        name = f"{self.names}{prefix}{self._count}"
        self._count += 1
        self.operations[axes] += LOAD if text.startswith("tl.load") else 1
        self._home(axes).lines.append(f"{name} = {text}")
        return Operand(name, axes)

    def step(self, loop: str, scalars: Iterable[str]) -> None:
        """Enter a loop with the variable `loop`, in which `scalars` change."""
        self.scope, self.looped = Scope(), loop
        self._varying.update(dict.fromkeys(scalars, frozenset((loop,))))

    def along(self, axis: str, name: str) -> None:
        """Take the variable `name` for one that changes along an axis."""
        self._varying[name] = frozenset((axis,))

    def inner(self) -> list[str]:
        """Leave the loop; returns its lines."""
        lines = [] if self.scope is self.outer else self.scope.lines
        self.scope, self.looped = self.outer, ""
        return lines

    def _home(self, axes: Axes) -> Scope:
        return self.scope if self.looped in axes else self.outer

    def named(self, text: str, axes: Axes) -> Operand:
        """`text` under a name: assigned the first time."""
        return self._once(("text", text), axes, text)

    def _once(self, key: object, axes: Axes, text: str, prefix: str = "t") -> Operand:
        home = self._home(axes)
        if key not in home.known:
            home.known[key] = self.assign(text, axes, prefix)
        return home.known[key]

    def varies(self, *indices: Index) -> Axes:
        """The loop variables that `indices` depend on."""
        found: set[str] = set()
        for index in indices:
            for var in index.variables():
                if var.name in self.axes:
                    found.add(var.name)
                found |= self._varying.get(var.name, NONE)
        return frozenset(found)

    def shape(self, axes: Axes) -> str:
        """The shape of a tile that depends on `axes`, 1 along all others."""
        return "[" + ", ".join(str(a.block if a.name in axes else 1) for a in self.axes.values()) + "]"

    # ---- values ------------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor, position: Position, conditions: tuple[Operand, ...] = ()) -> Operand:
        """The elements of `tensor` at `position`; undefined where a condition does not hold.

        Raises:
            Unsupported: a reduction at another position than the program's own row; or too many values.
        """
        key = (tensor, position, conditions)
        for scope in (self.scope, self.outer):
            if key in scope.known:
                return scope.known[key]
        self._values += 1
        self._depth += 1
        if self._values > MAX_VALUES or self._depth > MAX_DEPTH:
            raise Unsupported(f"a kernel of more than {MAX_VALUES} values, or {MAX_DEPTH} that need each other")
        found = self._value(tensor, position, conditions)
        self._depth -= 1
        self._home(found.axes).known[key] = found
        return found

    def holds(self, tensor: Tensor, position: Position) -> bool:
        """Whether the elements of `tensor` at `position` have a name already."""
        return any((tensor, position, ()) in scope.known for scope in (self.scope, self.outer))

    def _value(self, tensor: Tensor, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        match tensor:
            case View():
                return self.value(tensor.source, tensor.at(position), conditions)
            case Pointwise():
                return self._pointwise(tensor, position, conditions)
            case Const():
                return Operand(_number(tensor))
            case Load():
                return self._load(tensor, position, conditions)
            case Iota():
                at = tensor.at(position)
                text = str(at) if at.number is not None else f"({at}).to({tl_dtype(tensor.dtype)})"
                return self.assign(text, self.varies(at)) if at.number is None else _full(text, tensor.dtype)
            case Select():
                return self._select(tensor, position, conditions)
            case Gather():
                return self._gather(tensor, position, conditions)
            case Reduce():
                return self._reduced(tensor, position)
        raise AssertionError(tensor)

    def _pointwise(self, tensor: Pointwise, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        same = tensor.same_register
        if isinstance(same, Const):
            return _full(_number(same), tensor.dtype)
        args = [self.value(arg, position, conditions) for arg in tensor.args]
        if same is not None:
            return args[0]
        axes = frozenset[str]().union(*(arg.axes for arg in args))
        text = template(tensor.expression, [arg.dtype for arg in tensor.args])
        return self._once((text, *args), axes, text.format(*(arg.text for arg in args)))

    def _load(self, tensor: Load, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        if tensor.anchor:
            return self._anchored(tensor, position)
        return self.memory(tensor, position, conditions, register(tensor.dtype))

    def memory(self, tensor: Load, position: Position, conditions: tuple[Operand, ...], dtype: str) -> Operand:
        """A masked load, converted to `dtype`; 0 where a condition does not hold."""
        address = linear(position, tensor.strides)
        axes = self.loads[tensor, address] = self.varies(address)
        masks = [*self._masks(axes, self._vectors(tensor, position)), *self._concerning(conditions, axes, tensor)]
        wide = frozenset(self.axes) if self.spread in axes else axes.union(*(mask.axes for mask in masks))
        place = self._pointer(tensor.name, address)
        if self.shape(wide) != self.shape(axes) or (wide and not axes):  # a pointer alone is no tile, not even of one
            place += f" + tl.zeros({self.shape(wide)}, tl.int32)"
        packed = DTYPES[tensor.dtype].packing is not None
        zero = f"tl.full((), 0, {tl_dtype(tensor.dtype)})" if packed else "0"
        masked = f", mask={' & '.join(m.text for m in masks)}, other={zero}" if masks else ""
        text = f"tl.load({place}{masked})"
        if dtype != tensor.dtype:
            # Not all casts of Triton from float8 to bf16 are exact.
            via = f".to({tl_dtype('f32')})" if packed and dtype == "bf16" else ""
            text += f"{via}.to({tl_dtype(dtype)})"
        return self._once(("load", text), wide, text)

    def _pointer(self, name: str, address: Index) -> str:
        """The pointer to an element. In a loop that moves the whole tile, the tile of base pointers is hoisted."""
        still, moving = self._divided(address)
        if not still.terms:
            return f"{name} + ({address})"
        base = self._once(("pointer", name, still), self.varies(still), f"{name} + ({still})", "p")
        return f"{base.text} + ({moving})"

    def _divided(self, index: Index) -> tuple[Index, Index]:
        """Split `index` into a tile that is invariant in the current loop (0 if there is none) and the rest."""
        moving = Index(tuple(term for term in index.terms if self.looped in self.varies(Index((term,)))))
        still = index - moving
        whole = self.looped not in self.axes and self.varies(moving) == {self.looped}
        return (still, moving) if whole and self.varies(still) else (ZERO, index)

    def _kept(self, index: Index) -> Index:
        """`index` with its invariant tile hoisted into a variable, if that contains a division."""
        still, moving = self._divided(index)
        if "//" not in str(still) and "%" not in str(still):
            return index
        tile = self._once(("index", still), self.varies(still), str(still), "i")
        self._varying[tile.text] = tile.axes
        return variable(tile.text) + moving

    def _anchored(self, tensor: Load, position: Position) -> Operand:
        if (tensor, position) not in self.anchored:
            raise Unsupported("the result of a matrix product at another position than its own")
        return self.anchored[tensor, position]

    def _masks(self, axes: Axes, wider: Mapping[str, str] = MappingProxyType({})) -> list[Operand]:
        named = [axis for axis in self.axes.values() if axis.name in axes and axis.mask]
        texts = [wider.get(axis.name, axis.mask) for axis in named]
        varying = [frozenset((axis.name,)) | self._varying.get(axis.mask, NONE) for axis in named]
        return list(map(Operand, texts, varying))

    def _concerning(self, conditions: tuple[Operand, ...], axes: Axes, tensor: Load) -> Iterable[Operand]:
        """Those of the conditions without which a load along `axes` would leave `tensor`: where others don't hold,
        nobody needs what it finds. One element for a row stays one load for the row."""
        needed = self.zeros or not all(size.number for size in tensor.shape)
        return (one for one in conditions if needed or not one.axes or one.axes & axes)

    def _vectors(self, tensor: Load, position: Position) -> dict[str, str]:
        """A mask for the open axis that holds for whole vectors: Triton loads elements one by one where a row ends
        within one. It reads past the end of a row, where the tensor has elements there and rows begin with a vector."""
        axis = self.axes.get(self.open)
        end = whole_vectors(tensor, position, self.open) if axis is not None and axis.mask else None
        return {} if end is None else {self.open: f"({self.open} < {end})"}

    def inside(self, tensor: Select, position: Position) -> tuple[Position, tuple[Operand, ...]]:
        """The position in `tensor.inner`, and the bounds checks that are not proven to hold."""
        moved = tensor.inside(position)
        tests = []
        for at, start, size in zip(position, tensor.starts, tensor.inner.shape, strict=True):
            if start != ZERO and not is_natural(at - start):
                tests.append((f"{self._kept(at)} >= {start}", self.varies(at)))
            if not within(at, start + size):
                tests.append((f"{self._kept(at)} < {start + size}", self.varies(at)))
        return moved, tuple(self._once(("within", text), axes, text, "c") for text, axes in tests)

    def _select(self, tensor: Select, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        if is_outside(tensor, position):
            return self.value(tensor.outer, position, conditions)
        moved, tests = self.inside(tensor, position)
        inner = self.value(tensor.inner, moved, (*conditions, *tests))
        if not tests:
            return inner
        all_tests = NONE.union(*(test.axes for test in tests))
        inside = " & ".join(test.text for test in tests)
        other = Operand(f"~({inside})" if len(tests) > 1 else f"~{inside}", all_tests)
        outer = self.value(tensor.outer, position, (*conditions, other))
        return self.assign(f"tl.where({inside}, {inner.text}, {outer.text})", all_tests | inner.axes | outer.axes)

    def _gather(self, tensor: Gather, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        at, safe = self.chosen(tensor, position, conditions)
        return self.value(tensor.source, at, (*conditions, *safe))

    def chosen(
        self, tensor: Gather, position: Position, conditions: tuple[Operand, ...] = ()
    ) -> tuple[Position, list[Operand]]:
        """The position in the source of a gather, and the conditions that it is in range."""
        found, safe = [], []
        for one, size in zip(tensor.indices, tensor.sizes, strict=True):
            at = self.value(one, position, conditions)
            if tensor.wrap:
                text = f"tl.where({at.text} < 0, {at.text} + {size}, {at.text})"
                at = self._once(("wrap", text), at.axes, text)
            self._varying[at.text] = at.axes
            found.append(variable(at.text, size))
            test = f"({at.text} >= 0) & ({at.text} < {size})"
            safe.append(self._once(("safe", test), at.axes, test, "c"))
        return tensor.at(position, tuple(found)), safe

    def _reduced(self, tensor: Reduce, position: Position) -> Operand:
        if tensor not in self.reduced:
            raise Unsupported("a reduction inside of another loop")
        operand, expected = self.reduced[tensor]
        if position != expected:
            raise Unsupported("a reduction of one row, needed in another")
        return operand

    # ---- stores ------------------------------------------------------------------------------------------------------

    def store(self, name: str, address: Index, value: Operand, axes: Axes) -> None:
        """Store `value` for a tile of `axes`."""
        target = self._target(name, address, self._offset(address), axes)
        self._home(axes).lines.append(f"tl.store({target}, {value.text}{self._masked(axes)})")

    def scatter(self, name: str, tensor: Scatter, position: Position, axes: Axes) -> None:
        """Add the elements of `tensor.source` at `position`, of a tile of `axes`, to memory, or put them there. Nothing
        reads the results before the kernel has ended, so that there is no order."""
        value, (at, safe) = self.value(tensor.source, position), self.chosen(tensor.target, position)
        assert isinstance(tensor.target.source, Load)
        address = linear(at, tensor.target.source.strides)
        target = self._target(name, address, f"({address})", axes)
        masked = self._masked(axes, safe)
        call, order = ("tl.atomic_add", ', sem="relaxed"') if tensor.adds else ("tl.store", "")
        self._home(axes).lines.append(f"{call}({target}, {value.text}{masked}{order})")

    def add(self, name: str, address: Index, value: Operand, safe: Iterable[Operand] = ()) -> list[str]:
        """The lines that add a tile of `value` to memory, where conditions hold."""
        target = self._target(name, address, f"({address})", value.axes)
        return [f'tl.atomic_add({target}, {value.text}{self._masked(value.axes, safe)}, sem="relaxed")']

    def _target(self, name: str, address: Index, place: str, axes: Axes) -> str:
        """The pointers to a tile of `axes`."""
        short = axes - self.varies(address)
        return f"{name} + {place}" + (f" + tl.zeros({self.shape(axes)}, tl.int32)" if short else "")

    def _masked(self, axes: Axes, conditions: Iterable[Operand] = ()) -> str:
        """The mask of a store of a tile of `axes`, as an argument."""
        masks = [*self._masks(axes), *conditions]
        return f", mask={' & '.join(mask.text for mask in masks)}" if masks else ""

    def _offset(self, address: Index) -> str:
        """The offset of a store. Rows of unequal alignment can't be stored as vectors: then row and column offsets are
        added in turn, since a sum for each element takes twice the registers."""
        parts: dict[Axes, Index] = {}
        for term in address.terms:
            axes = self.varies(Index((term,)))
            parts[axes] = parts.get(axes, ZERO) + Index((term,))
        odd = [axes for axes, part in parts.items() if axes and any(count % VECTOR for _, count in part.terms)]
        return " + ".join(f"({part})" for part in parts.values()) if len(odd) > 1 else f"({address})"


def whole_vectors(tensor: Load, position: Position, axis: str) -> int | None:
    """Where the last vector of a row of `tensor` ends, whose elements `axis` counts in `position`; None if that is the
    end of the row, if rows don't begin with a vector, or if the tensor has no elements there."""
    *rows, at = position or (ZERO,)
    *strides, step = tensor.strides or (ZERO,)
    atom, each = at.atom, VECTOR_BITS // DTYPES[tensor.dtype].bits
    if not isinstance(atom, Var) or atom.name != axis or atom.last is None or atom.last.number is None:
        return None
    size, most = atom.last.number + 1, tensor.shape[-1].number or 0
    end = -(-size // each) * each
    begins = step == ONE and all(stride.number is not None and stride.number % each == 0 for stride in strides)
    apart = all(var.name != axis for row in rows for var in row.variables())
    return end if begins and apart and size < end <= most else None


def is_outside(tensor: Select, position: Position) -> bool:
    """Whether no element of `tensor` at `position` is proven to be one of its inner tensor."""
    ends = (start + size for start, size in zip(tensor.starts, tensor.inner.shape, strict=True))
    return any(is_natural(at - end) for at, end in zip(position, ends, strict=True))


def _number(tensor: Const) -> str:
    """A number in Triton, which takes a plain float for f32."""
    value, dtype = tensor.value, register(tensor.dtype)
    if isinstance(value, Index):
        return f"({value}).to({tl_dtype(dtype)})" if value.number is None else str(value)
    if dtype in FLOATS:
        text = literal(float(value))
        return f"tl.full((), {text}, tl.float64)" if dtype == "f64" else text
    return str(value)


def _full(text: str, dtype: str) -> Operand:
    """A number where Triton needs a tensor."""
    return Operand(text if text.startswith("tl.full") else f"tl.full((), {text}, {tl_dtype(register(dtype))})")


def indent(lines: Iterable[str], by: int = 1) -> list[str]:
    """`lines` as a block of Python."""
    return ["    " * by + line for line in lines]


def loads_first(lines: Sequence[str]) -> list[str]:
    """`lines` of one level with loads that need none of the others before these, so that they wait for memory together:
    neither Triton nor the assembler moves a load across a store, or across the barrier of a reduction."""
    made = {name for line in lines for name in line.partition(" = ")[0].split(", ")}

    def is_early(line: str) -> bool:
        _, load, rest = line.partition(" = tl.load(")
        return bool(load) and not line.startswith(" ") and made.isdisjoint(NAMES.findall(rest))

    return sorted(lines, key=lambda line: not is_early(line))
