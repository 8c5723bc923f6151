"""Chains of views and copies as what they do to the axes of the tensor that they begin with.

view(clone(permute(x))) reads the elements of x in another order; whichever way it takes, one view, one permute and
one more view read them in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch_rtx.ir import Dim, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.rewrite import Rewriter

RESHAPES = frozenset(
    f"aten.{name}"
    for name in ("view.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims")
)
PERMUTES = frozenset(("aten.permute.default", "aten.transpose.int", "aten.t.default"))
CLONE = "aten.clone.default"


@dataclass(frozen=True)
class Arrangement:
    """The elements of `root`, as the value `view(root, atoms).permute(...)` has them.

    Attributes:
        atoms: sizes of the axes of `root`, some split; none is 1.
        axes: for each axis of the value, the atoms that it consists of, in order.
    """

    root: Value
    atoms: tuple[Dim, ...]
    axes: tuple[tuple[int, ...], ...]

    def reshaped(self, shape: tuple[Dim, ...]) -> Arrangement | None:
        """The same elements in another shape; None if an axis of it holds a part of a symbolic size, or no element."""
        left = [(atom, self.atoms[atom]) for axis in self.axes for atom in axis]
        pieces: dict[int, list[Dim]] = {atom: [] for atom, _ in left}  # what each atom is split into
        axes: list[list[tuple[int, int]]] = []
        for size in shape:
            axis: list[tuple[int, int]] = []
            covered: Dim = 1
            while covered != size:
                piece, rest = _split(covered, left[0][1], size) if left else (None, 1)
                if piece is None:
                    return None
                atom, _ = left.pop(0)
                if rest != 1:
                    left.insert(0, (atom, rest))
                axis.append((atom, len(pieces[atom])))
                pieces[atom].append(piece)
                covered = dim_expr("*", covered, piece)
            axes.append(axis)
        if left:
            return None
        atoms = [piece for atom in range(len(self.atoms)) for piece in pieces[atom]]
        first = [sum(len(pieces[before]) for before in range(atom)) for atom in range(len(self.atoms))]
        return Arrangement(self.root, tuple(atoms), tuple(tuple(first[a] + n for a, n in axis) for axis in axes))


def arrangement(value: Value, producer: Mapping[str, Node]) -> Arrangement:
    """How a value arranges the elements of the first tensor of its chain.

    Args:
        producer: the node of each value that a node computes, by its name.
    """
    node = producer.get(value.name)
    source = node.arg("self") if node is not None and node.kind == "op" else None
    if node is not None and isinstance(source, Value) and isinstance(value.type, TensorType):
        found: Arrangement | None = None
        if node.op == CLONE:
            found = arrangement(source, producer)
        elif node.op in PERMUTES:
            before = arrangement(source, producer)
            found = Arrangement(before.root, before.atoms, tuple(before.axes[axis] for axis in _order(node)))
        elif node.op in RESHAPES:
            found = arrangement(source, producer).reshaped(value.type.shape)
        if found is not None:
            return found
    return in_order(value)


def in_order(value: Value) -> Arrangement:
    """A tensor as it is."""
    assert isinstance(value.type, TensorType)
    atoms = tuple(size for size in value.type.shape if size != 1)
    numbers = iter(range(len(atoms)))
    return Arrangement(value, atoms, tuple(() if size == 1 else (next(numbers),) for size in value.type.shape))


def _order(node: Node) -> tuple[int, ...]:
    """Which axis of its source each axis of a permuted tensor is."""
    source = node.arg("self")
    assert isinstance(source, Value)
    assert isinstance(source.type, TensorType)
    rank = len(source.type.shape)
    dims = node.arg("dims")
    if isinstance(dims, tuple):
        return tuple(dim % rank for dim in dims if isinstance(dim, int))
    order = list(range(rank))
    first, second = (node.arg(name, default) for name, default in (("dim0", 0), ("dim1", rank - 1)))
    assert isinstance(first, int)
    assert isinstance(second, int)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _split(covered: Dim, atom: Dim, size: Dim) -> tuple[Dim | None, Dim]:
    """The part of an atom that goes into an axis of `size`, of which others cover `covered`, and the rest of it."""
    if size == 0 or atom == 0:
        return None, 1
    if isinstance(covered, int) and isinstance(atom, int) and isinstance(size, int):
        if covered * atom <= size:
            return (atom, 1) if size % (covered * atom) == 0 else (None, 1)
        piece, over = divmod(size, covered)
        return (piece, atom // piece) if over == 0 and piece > 1 and atom % piece == 0 else (None, 1)
    return atom, 1


def emit(found: Arrangement, rewriter: Rewriter) -> Value:
    """Add views that arrange the root so.

    Raises:
        Unsupported: the root's strides do not allow it.
    """
    current = rewriter.current(found.root)
    assert isinstance(current, Value)

    def viewed(value: Value, shape: tuple[Dim, ...]) -> Value:
        assert isinstance(value.type, TensorType)
        return value if value.type.shape == shape else rewriter.emit("aten.view.default", self=value, size=shape)

    order = tuple(atom for axis in found.axes for atom in axis)
    current = viewed(current, found.atoms)
    if order != tuple(range(len(order))):
        current = rewriter.emit("aten.permute.default", self=current, dims=order)
    return viewed(current, tuple(dim_expr("*", 1, *(found.atoms[atom] for atom in axis)) for axis in found.axes))
