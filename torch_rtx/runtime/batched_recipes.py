"""Recipes of one form, such as those of equal layers, as one graph over stacked parameters.

A recipe of quantized weights makes a dozen small calls, and each layer has such recipes. The host takes longer to
launch these calls than a GPU takes to run them. `batched` gives each value of a recipe one more dimension, the first:
the members. Each member gets the bits that its recipe gives alone, since every call is one of these:

- one exact or correctly rounded operation per element, so that a compiler has nothing to contract, and the remainder of
  a vector is rounded as the vector is. `exp` is not among them, and neither is `add` with a factor.
- a reduction whose result does not depend on the order: the extremes of magnitudes, and extremes and sums of integers.
  Of floats with signs, zeros of both signs can be the extreme.
- a call that only moves elements.

Of several NaNs with different bits, PyTorch may choose any one, for one recipe as for many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_rtx import aten
from torch_rtx.dtypes import COMPLEX, DTYPES, FLOAT
from torch_rtx.ir import MAIN, Attr, Graph, Node, Sym, TensorType, Value, attr_values, contiguous
from torch_rtx.runtime.joint_recipes import is_separate

_CAST, _PAD, _VIEW = "aten._to_copy.default", "aten.constant_pad_nd.default", "aten.view.default"
_CLONE, _PERMUTE, _T = "aten.clone.default", "aten.permute.default", "aten.t.default"
_ABS, _LEAST, _MOST, _SUM = "aten.abs.default", "aten.amin.default", "aten.amax.default", "aten.sum.dim_IntList"
POINTWISE = frozenset((_ABS, _CAST)) | {
    f"aten.{name}"
    for name in (
        *("neg.default", "reciprocal.default", "rsqrt.default", "where.self"),
        *("ceil.default", "clamp.default", "floor.default", "round.default", "trunc.default"),
        *(f"{name}.{kind}" for name in ("add", "div", "mul", "sub") for kind in ("Scalar", "Tensor")),
        *(f"{name}.{kind}" for name in ("eq", "ge", "gt", "le", "lt", "ne") for kind in ("Scalar", "Tensor")),
        *(f"bitwise_{name}.{kind}" for name in ("and", "or", "xor") for kind in ("Scalar", "Tensor")),
        *(f"__{name}__.{kind}" for name in ("lshift", "rshift") for kind in ("Scalar", "Tensor")),
        *("bitwise_not.default", "logical_and.default", "logical_not.default", "logical_or.default"),
    )
}
# Ops whose arguments number dimensions: these arguments, and their defaults.
_AXES: dict[str, dict[str, Attr]] = {
    **{op: {"dim": ()} for op in (_LEAST, _MOST, _SUM)},
    **{f"aten.{name}": {"dim": 0} for name in ("cat.default", "select.int", "slice.Tensor", "stack.default")},
    "aten.flip.default": {"dims": ()},
    "aten.transpose.int": {"dim0": 0, "dim1": 0},
    "aten.unsqueeze.default": {"dim": 0},
}
_SIZED = frozenset(f"aten.{name}.default" for name in ("_unsafe_view", "expand", "reshape", "view"))
# Moves that keep every element as it is.
_MOVES = (_AXES.keys() - {_SUM}) | _SIZED | {_CLONE, _PERMUTE, _T, "aten.alias.default"}
_KNOWN = POINTWISE | _MOVES | {_SUM, _PAD, "aten.view.dtype"}


def batched(recipe: Graph) -> Graph | None:
    """The graph that makes of stacked inputs the stacked results of `recipe`. A symbol stands for the number of
    members. None: some call is not known to give each member the bits that it has alone, or a result lies in the memory
    of a parameter."""
    values = list(recipe.values())
    if not is_separate(recipe) or not all(map(_is_plain, values)) or not all(map(_is_dense, recipe.inputs)):
        return None
    prefix = "batch"
    while any(value.name.startswith(prefix) for value in values):
        prefix += "_"
    batch = _Batch(prefix, Sym(prefix))
    batch.now |= {value.name: Value(value.name, batch.type_of(value)) for value in recipe.inputs}
    inputs, outputs = tuple(batch.now.values()), list(attr_values(recipe.outputs))
    if not all(map(batch.add, recipe.nodes)) or not all(value.name in batch.now for value in outputs):
        return None
    made = tuple(batch.now[value.name] for value in outputs)
    return Graph(recipe.level, inputs, nodes=tuple(batch.nodes), outputs=made)


def _is_plain(value: Value) -> bool:
    """A tensor of a fixed shape on the device of the graph. A product of complex numbers is no single operation."""
    type_ = value.type
    if not isinstance(type_, TensorType) or type_.device != MAIN or DTYPES[type_.dtype].kind == COMPLEX:
        return False
    return all(isinstance(dim, int) for dim in (*type_.shape, *type_.strides))


def _is_dense(value: Value) -> bool:
    """Every element has memory of its own, so that a stack can be written."""
    type_ = _tensor(value)
    return aten.extent(type_.shape, type_.strides) == math.prod(type_.shape)  # type: ignore[arg-type]


@dataclass
class _Batch:
    """The graph so far.

    Attributes:
        prefix: what new names begin with.
        size: the number of members.
        now: by its name in the recipe, a value of all members; other values are the same for all.
        magnitudes: names of values in the recipe whose elements have no sign.
    """

    prefix: str
    size: Sym
    nodes: list[Node] = field(default_factory=list)
    now: dict[str, Value] = field(default_factory=dict)
    magnitudes: set[str] = field(default_factory=set)

    def add(self, node: Node) -> bool:
        """Write the call of all members; False if it may give other bits."""
        if node.kind != "op" or node.body is not None or node.writes or len(node.outputs) != 1 or not node.results:
            return False
        (out,) = node.results
        if not any(value.name in self.now for value in node.inputs):
            self.nodes.append(node)  # the same for all, such as a number
            return not aten.is_random(aten.overload(node.op))
        if node.op not in _KNOWN or not (self.computes(node) if node.op in POINTWISE else self.moves(node)):
            return False
        keeps = node.op in _MOVES or node.op == _CAST
        if node.op == _ABS or (keeps and all(value.name in self.magnitudes for value in node.inputs)):
            self.magnitudes.add(out.name)
        write = self.channels_last if _is_channels_last(node) else self.call
        self.now[out.name] = write(node, out)
        return True

    def computes(self, node: Node) -> bool:
        """Whether a pointwise call computes in the same way: with the dtypes that it has for one member, and no
        factor. PyTorch looks for the dtype among operands with dimensions first, and a number gets one here."""
        if node.arg("alpha", 1) != 1 or (node.op == _CAST and {name for name, _ in node.args} != {"self", "dtype"}):
            return False
        operands = [value for name, attr in node.args if name != "condition" for value in attr_values(attr)]
        numbers = any(value.name in self.now and not _tensor(value).shape for value in operands)
        return not numbers or len({_tensor(value).dtype for value in operands}) == 1

    def moves(self, node: Node) -> bool:
        """Whether another call gives the same bits: it reads members alone, and a reduction does not round."""
        first, dtypes = node.inputs[0], {_tensor(value).dtype for value in node.inputs}
        if len(dtypes) != 1 or not all(value.name in self.now for value in node.inputs):
            return False
        if node.op in (_LEAST, _MOST, _SUM):
            exact = all(DTYPES[_tensor(value).dtype].kind != FLOAT for value in (first, *node.results))
            return bool(_tensor(first).shape) and (exact or (node.op != _SUM and first.name in self.magnitudes))
        return node.op != _T or len(_tensor(first).shape) == 2

    def call(self, node: Node, out: Value) -> Value:
        """The result of the call of all members."""
        shape = _tensor(out).shape
        broadcasts = node.op in POINTWISE or node.op == "aten.expand.default"
        args = dict(node.map_inputs(lambda value: self.lifted(value, len(shape) if broadcasts else 0)))
        lead = self.now[node.inputs[0].name] if aten.may_alias(node) else None
        type_, rank = self.type_of(out, lead), len(_tensor(node.inputs[0]).shape)
        if node.op == _T:
            return self.emit("aten.transpose.int", type_, args | {"dim0": 1, "dim1": 2})
        if node.op == _PERMUTE:
            dims = [dim % rank + 1 for dim in node.arg("dims", ())]  # type: ignore[operator, union-attr]
            args |= {"dims": (0, *dims)}
        elif node.op in _SIZED:
            args |= {"size": type_.shape}
        elif node.op in (_LEAST, _MOST, _SUM) and node.arg("dim", ()) in ((), None):
            args |= {"dim": tuple(range(1, rank + 1))}
        else:
            args |= {name: _behind(node.arg(name, default)) for name, default in _AXES.get(node.op, {}).items()}
        return self.emit(node.op, type_, args)

    def channels_last(self, node: Node, out: Value) -> Value:
        """A copy whose members have this order of memory, which PyTorch knows for one of them alone."""
        last = len(_tensor(out).shape)
        there, back = (0, 1, *range(3, last + 1), 2), (0, 1, last, *range(2, last))
        moved = self.moved(self.now[node.inputs[0].name], there)
        dense = TensorType(_tensor(out).dtype, _tensor(moved).shape, contiguous(_tensor(moved).shape))
        return self.moved(self.emit(_CLONE, dense, {"self": moved, "memory_format": "contiguous_format"}), back)

    def moved(self, value: Value, dims: tuple[int, ...]) -> Value:
        """`value` with its dimensions in another order."""
        type_ = _tensor(value)
        shape, strides = (tuple(of[dim] for dim in dims) for of in (type_.shape, type_.strides))
        return self.emit(_PERMUTE, TensorType(type_.dtype, shape, strides), {"self": value, "dims": dims})

    def lifted(self, value: Value, rank: int) -> Value:
        """`value` of all members, as it broadcasts with results of `rank` dimensions: with ones behind the members."""
        own = self.now.get(value.name, value)
        type_, ones = _tensor(own), (1,) * (rank - len(_tensor(value).shape))
        if own is value or not ones:
            return own
        shape, strides = (self.size, *ones, *type_.shape[1:]), (type_.strides[0], *ones, *type_.strides[1:])
        return self.emit(_VIEW, TensorType(type_.dtype, shape, strides), {"self": own, "size": shape})

    def type_of(self, value: Value, lead: Value | None = None) -> TensorType:
        """The type of `value` of all members. `lead`: it is a view of this one, whose members lie as far apart."""
        type_ = _tensor(value)
        step = aten.extent(type_.shape, type_.strides)  # type: ignore[arg-type]
        if lead is not None:
            given = _tensor(lead)
            step = given.strides[0] * DTYPES[given.dtype].bytes // DTYPES[type_.dtype].bytes  # type: ignore[operator]
        return TensorType(type_.dtype, (self.size, *type_.shape), (step, *type_.strides))

    def emit(self, op: str, type_: TensorType, args: dict[str, Attr]) -> Value:
        """The result of a call."""
        value = Value(f"{self.prefix}{len(self.nodes)}", type_)
        order = list(aten.schema(aten.overload(op)))
        known = sorted(args.keys() & order, key=order.index)
        ordered = tuple((name, args[name]) for name in (*known, *(args.keys() - known)))  # others are an error later
        self.nodes.append(Node("op", op, ordered, (value,)))
        return value


def _is_channels_last(node: Node) -> bool:
    return node.op == _CLONE and str(node.arg("memory_format")).startswith("channels_last")


def _behind(dim: Attr) -> Attr:
    """The number of a dimension, or several, behind another one. Negative ones count from the last dimension."""
    if isinstance(dim, tuple):
        return tuple(map(_behind, dim))
    return dim + 1 if isinstance(dim, int) and dim >= 0 else dim


def _tensor(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
