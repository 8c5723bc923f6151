"""Stores weights of 4 and 8 bits as the kernels of products read them: one layout for all sources.

    linear(x, f(codes(w), s))  ->  linear(x, f(unpacked(words), s))        words: a recipe from w

`codes` is whatever makes integers of the parameters: bytes with the low half first or last, words of eight, blocks
between their scales. Of their dtypes and the calls that make them follows that they are at most 16 numbers, or 256, and
that is enough: the recipe packs them again, in words that hold values from several places of K, see `kernels.packed`.
What a group shares is stored by columns, as f32: kernels copy at least 4 bytes at a time ahead of use. Refit takes the
parameters as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES, HALVES, INT, highest, lowest
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, Weight, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, variable
from torch_rtx.lowering.kernels.kernel_ir import Const, Gather, Load, Pointwise, Position, Tensor, View, load
from torch_rtx.lowering.kernels.packed import HALVES_OF_WORD, RUNS, SIZES, Packing, mask_of
from torch_rtx.lowering.kernels.region import express, tensor_type
from torch_rtx.lowering.passes.hoist_weights import as_weight
from torch_rtx.lowering.rewrite import Rewriter, escaping, users
from torch_rtx.lowering.widening import nbytes, storable
from torch_rtx.op_work import ANCHORS, PRODUCTS

LINEAR = "aten.linear.default"
FEW = 8  # elements of the operand for each value that a group shares, at least
UNION = frozenset(f"aten.{name}.default" for name in ("clone", "cat", "stack", "_to_copy", "_unsafe_view"))

Plans = dict[str, Callable[[Value], Iterator[Value]]]


def pack_weights(graph: Graph, infer: Inference, weight_copies: bool = True) -> Graph:
    """Level import to level import. What depends on parameters alone in it is prologues, which `hoist_weights` left.

    Args:
        weight_copies: parameters that hold codes may be stored once more, and not codes of recipes alone.
    """
    packer = _Packer(graph, infer, weight_copies)
    for node in graph.nodes:
        if node.kind == "op" and ANCHORS.get(node.op) == "gemm":
            packer.plan(node)
    return packer.packed() if packer.plans else graph


@dataclass(frozen=True)
class _Operand:
    """The second operand of a product, and the nodes that compute it from weights."""

    value: Value
    chain: tuple[Node, ...]
    columns: int
    depth: int
    by_columns: bool  # a row of it is a column of the product

    @property
    def size(self) -> int:
        """Elements."""
        return self.columns * self.depth

    @property
    def n(self) -> Index:
        """A column."""
        return variable("n", constant(self.columns))

    @property
    def k(self) -> Index:
        """A place along K."""
        return variable("k", constant(self.depth))

    def place(self, value: Value) -> Position | None:
        """The position in `value` of what an element is computed from; None if there is not exactly one."""
        given = {one.name: one for node in self.chain for one in node.inputs} | {value.name: value}
        values: dict[str, Tensor] = {}
        for name, one in given.items():
            with suppress(Unsupported):
                values[name] = load(name, tensor_type(one))
        for node in self.chain:
            with suppress(Unsupported, KeyError):  # what reads it is not followed
                values |= {name: one for name, one in express(node, values).items() if name != value.name}
        if self.value.name not in values:
            return None
        at = (self.n, self.k) if self.by_columns else (self.k, self.n)
        found = set(_places(values[self.value.name], at, value.name))
        return found.pop() if len(found) == 1 else None

    def offset(self, value: Value) -> Index | None:
        """As `place`, in row-major order."""
        place = self.place(value)
        return None if place is None else linear(place, map(from_dim, contiguous(type_of(value).shape)))

    def is_dense(self, value: Value) -> bool | None:
        """Whether `value`, in row-major order, is [columns, K]; False if it is [K, columns], None if neither."""
        at = self.offset(value)
        if at == self.n * constant(self.depth) + self.k:
            return True
        return False if at == self.k * constant(self.columns) + self.n else None

    def shared(self) -> Iterator[tuple[Value, bool]]:
        """The floats that the elements of groups share, and whether neighbours in each are groups and not columns."""
        wide = (node for node in self.chain if any(elements(value) == self.size for value in node.results))
        for value in {value.name: value for node in wide for value in node.inputs}.values():
            few = self.columns < elements(value) <= self.size // FEW and elements(value) % self.columns == 0
            at = self.offset(value) if few and type_of(value).dtype in (*HALVES, "f32") else None
            for stride in (elements(value) // self.columns, 1) if at is not None else ():
                if at is not None and not any(one.name == "n" for one in (at - self.n * constant(stride)).variables()):
                    yield value, stride != 1
                    break


def _places(tensor: Tensor, position: Position, name: str) -> Iterator[Position]:
    """The positions in the load `name` that `tensor` at `position` is computed from."""
    match tensor:
        case Load() if tensor.name == name:
            yield position
        case View():
            yield from _places(tensor.source, tensor.at(position), name)
        case Pointwise(args=operands) | Gather(indices=operands):
            for one in operands:
                if not isinstance(one, Const):
                    yield from _places(one, position, name)


class _Packer:
    """Plans by value how it is stored: a plan gives the recipe of what is stored, and then what reads it again."""

    def __init__(self, graph: Graph, infer: Inference, weight_copies: bool) -> None:
        self.graph = graph
        self.plans: Plans = {}
        self._may_store = storable(graph, weight_copies)
        self._rewriter = Rewriter(graph, infer)
        weights = [one for one in graph.weights if one.value.name not in graph.written]
        self._source = {one.value.name: one for one in weights if one.recipe is None}
        self._stored = {one.value.name for one in weights}
        self._computed = {value.name for node in graph.nodes for value in node.results}
        recipes = (one.recipe.nodes for one in graph.weights if one.recipe is not None)
        nodes = [*graph.nodes, *(node for recipe in recipes for node in recipe)]
        self._made = {value.name: node for node in nodes for value in node.results}
        self._readers, self._escaping = users(graph), escaping(graph)

    def plan(self, product: Node) -> None:
        """Plan for the second operand of `product`."""
        operand = self._operand(product)
        if operand is None or not self._may_store(operand.value):
            return
        plans = self._of_nibbles(operand)
        plans = self._of_bytes(operand) if plans is None else plans
        if plans is not None:
            plans |= {
                one.name: partial(self._by_columns, operand, groups)
                for one, groups in operand.shared()
                if groups or type_of(one).dtype != "f32"
            }
            self.plans |= {name: plan for name, plan in plans.items() if name not in self._escaping}

    def _of_nibbles(self, operand: _Operand) -> Plans | None:
        """The plan for the integers of 4 bits nearest to the product; None without such."""
        ranges, most = integer_ranges(operand.chain), mask_of(SIZES[0])
        for codes in (value for node in reversed(operand.chain) if not _extends(node) for value in node.results):
            low, high = ranges.get(codes.name, (0, most + 1))
            is_narrow = high - low <= most and abs(low) <= most
            if is_narrow and elements(codes) == operand.size and codes.name in self._stored | self._computed:
                return self._in_words(operand, codes, SIZES[0], low)
        return None

    def _of_bytes(self, operand: _Operand) -> Plans | None:
        """The plan for integers of 8 bits: in words, if halves come of them; else without gaps, such as blocks have
        that lie between their scales."""
        stored = (weight.value for weight in self.graph.weights if weight.value.name in self._readers)
        read = {value.name for node in operand.chain for value in node.inputs}
        codes = [one for one in stored if one.name in read and type_of(one).dtype in ("i8", "u8")]
        if len(codes) != 1 or elements(codes[0]) != operand.size:
            return None
        type_ = type_of(codes[0])
        if type_of(operand.value).dtype in HALVES:
            found = self._in_words(operand, codes[0], SIZES[1], int(lowest(type_.dtype)))
            if found is not None:
                return found
        return {} if type_.strides == contiguous(type_.shape) else {codes[0].name: self._dense}

    def _in_words(self, operand: _Operand, codes: Value, bits: int, low: int) -> Plans | None:
        """The plan for integers from `low` on; None if K has no whole number of runs, or if they lie in another
        order."""
        # The shorter a run, the longer are the ranges of K that a step reads of the other operand; the tile of a step
        # has several runs only where the values of all of them have one scale.
        is_single = bits == SIZES[1] and next(operand.shared(), None) is None
        packings = (Packing(bits, run) for run in (RUNS[::-1] if is_single else RUNS))
        packing = next((one for one in packings if operand.depth % one.depth == 0), None)
        dense = None if packing is None else operand.is_dense(codes)
        if packing is None or dense is None:
            return None
        return {codes.name: partial(self._packed_codes, operand, packing, low, dense)}

    def packed(self) -> Graph:
        """The graph with the planned weights."""
        weights = list(self.graph.weights)
        for node in (None, *self.graph.nodes):
            if node is not None:
                self._rewriter.keep(node)
            values = [weight.value for weight in self.graph.weights] if node is None else node.results
            for value in values:
                if value.name in self.plans:
                    weights.append(self._store(value, self.plans[value.name](value)))
        return replace(self._rewriter.finish(), weights=tuple(weights))

    def _store(self, value: Value, steps: Iterator[Value]) -> Weight:
        """The weight that stands for `value`, which later nodes compute from it."""
        nodes = self._rewriter.nodes
        start = len(nodes)
        stored = next(steps)
        made = self._made | {one.name: node for node in nodes[start:] for one in node.results}
        del nodes[start:]
        self._rewriter.replace(value, next(steps))
        return as_weight(stored, made, self._source)

    def _operand(self, product: Node) -> _Operand | None:
        value = product.arg(PRODUCTS[product.op].second)
        if not isinstance(value, Value) or value.name not in self._computed or len(self._readers[value.name]) > 1:
            return None
        if len(type_of(value).shape) != 2:
            return None
        chain: dict[int, Node] = {}
        if not self._follow(value, chain) or nbytes(type_of(value)) is None:
            return None
        by_columns = product.op == LINEAR
        columns, depth = type_of(value).shape if by_columns else type_of(value).shape[::-1]
        return _Operand(value, tuple(chain.values()), columns, depth, by_columns)  # type: ignore[arg-type]

    def _follow(self, value: Value, chain: dict[int, Node]) -> bool:
        """Add the nodes that compute `value` from weights to `chain`, in order; False if it needs something else."""
        node = self._made.get(value.name)
        if not isinstance(value.type, TensorType):
            return False
        if value.name in self._source or id(node) in chain:
            return True
        if node is None or node.kind not in ("op", "view") or not all(self._follow(one, chain) for one in node.inputs):
            return False
        chain[id(node)] = node
        return True

    # ---- plans -------------------------------------------------------------------------------------------------------

    def _packed_codes(
        self, operand: _Operand, packing: Packing, low: int, dense: bool, codes: Value
    ) -> Iterator[Value]:
        emit, dtype, (columns, depth) = self._emit, type_of(codes).dtype, (operand.columns, operand.depth)
        runs, run, width = depth // packing.depth, packing.run, HALVES_OF_WORD
        if dtype == "i8" and packing.bits == SIZES[1]:  # the difference would not fit
            found = emit("bitwise_xor.Scalar", emit("view.dtype", codes, dtype="u8"), other=-low)
        else:
            found = emit("sub.Tensor", codes, other=low) if low else codes
            found = emit("_to_copy.default", found, dtype="u8") if dtype != "u8" else found
        if not dense:
            found = self._transposed(found, (depth, columns))
        # In bytes, so that a refit takes little memory: those of 4 bits two by two, and then the four of a word.
        found, shape = self._contiguous(found), (columns, runs, 2, run, width)
        if packing.bits == SIZES[0]:
            found = emit("view.default", found, size=(columns, runs, 2, 2, run, width))
            halves = [emit("select.int", found, dim=3, index=index) for index in (0, 1)]
            upper = emit("__lshift__.Scalar", halves[1], other=packing.bits)
            found = emit("bitwise_or.Tensor", halves[0], other=upper)
        else:
            found = emit("view.default", found, size=shape)
        found = self._contiguous(emit("permute.default", found, dims=(0, 1, 3, 4, 2)))
        found = emit("view.dtype", emit("view.default", found, size=(columns, 4 * runs * run)), dtype="i32")
        yield found
        bits = emit("arange.start_step", start=0, end=32, step=packing.bits, dtype="i32", device="main")
        bits = emit("permute.default", emit("view.default", bits, size=(width, packing.parts)), dims=(1, 0))
        bits = emit("view.default", self._contiguous(bits), size=(packing.parts, 1, width))
        found = emit("view.default", found, size=(columns, runs, 1, run, 1))
        found = emit("bitwise_right_shift.Tensor", found, other=bits)
        found = emit("bitwise_and.Scalar", found, other=mask_of(packing.bits))
        found = emit("add.Tensor", found, other=low) if low else found
        found = emit("_to_copy.default", found, dtype=dtype) if dtype != "i32" else found
        if not dense:
            found = self._transposed(found, (columns, depth))
        yield emit("view.default", found, size=type_of(codes).shape)

    def _dense(self, codes: Value) -> Iterator[Value]:
        stored = self._contiguous(codes)
        yield stored
        yield stored

    def _by_columns(self, operand: _Operand, groups: bool, value: Value) -> Iterator[Value]:
        dtype, shape = type_of(value).dtype, type_of(value).shape
        count = elements(value) // operand.columns
        found = self._emit("_to_copy.default", value, dtype="f32") if dtype != "f32" else value
        stored = self._transposed(found, (operand.columns, count)) if groups else self._contiguous(found)
        yield stored
        found = stored
        if groups:
            found = self._emit("view.default", self._transposed(found, (count, operand.columns)), size=shape)
        yield self._emit("_to_copy.default", found, dtype=dtype) if dtype != "f32" else found

    def _transposed(self, value: Value, shape: tuple[int, int]) -> Value:
        """`value`, in row-major order a matrix of `shape`, transposed in memory."""
        value = self._contiguous(value)
        if type_of(value).shape != shape:
            value = self._emit("view.default", value, size=shape)
        return self._contiguous(self._emit("permute.default", value, dims=(1, 0)))

    def _contiguous(self, value: Value) -> Value:
        type_ = type_of(value)
        is_dense = type_.strides == contiguous(type_.shape)
        return value if is_dense else self._emit("clone.default", value, memory_format="contiguous_format")

    def _emit(self, op: str, value: Value | None = None, /, **args: Attr) -> Value:
        given: dict[str, Attr] = {} if value is None else {"self": value}
        return self._rewriter.emit(f"aten.{op}", None, None, **given, **args)


def _extends(node: Node) -> bool:
    """Whether `node` gives integers more bits."""
    types = [type_of(value) for value in (*node.inputs, *node.results)]
    dtypes = [DTYPES[type_.dtype] for type_ in types]
    return len(dtypes) == 2 and dtypes[0].kind == dtypes[1].kind == INT and dtypes[0].bits < dtypes[1].bits


# ---- numbers that integers can be ------------------------------------------------------------------------------------


def integer_ranges(chain: tuple[Node, ...]) -> dict[str, tuple[int, int]]:
    """By name, the least and the greatest number that integer tensors can hold: what `chain` reads and computes."""
    found: dict[str, tuple[int, int]] = {}
    for node in chain:
        integers = [value for value in (*node.inputs, *node.results) if DTYPES[type_of(value).dtype].kind == INT]
        for value in integers:
            if value.name not in found:
                limits = int(lowest(type_of(value).dtype)), int(highest(type_of(value).dtype))
                given = [found[one.name] for one in node.inputs if one.name in found]
                low, high = limits if value in node.inputs else _range(node, given) or limits
                found[value.name] = (low, high) if limits[0] <= low and high <= limits[1] else limits
    return found


def _range(node: Node, given: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The range of the result of `node` from those of its integer operands; None if nothing is known of it."""
    name, other, alpha = node.op.removeprefix("aten."), node.arg("other"), node.arg("alpha", 1)
    if not given:
        return None
    low, high = min(low for low, _ in given), max(high for _, high in given)
    if node.op == "aten.view.dtype":  # the same bits: numbers stay if they have no sign
        dtypes = {type_of(value).dtype for value in (*node.inputs, *node.results)}
        bits = {DTYPES[dtype].bits for dtype in dtypes}
        return (low, high) if len(bits) == 1 and (low >= 0 or len(dtypes) == 1) else None
    if node.op in UNION or aten.is_view(aten.overload(node.op)):
        return (low, high) if len(given) == len(node.inputs) else None
    if name.startswith("bitwise_and"):
        mask = [(other, other)] if isinstance(other, int) else []
        positive = [most for least, most in (*given, *mask) if least >= 0]
        return (0, min(positive)) if positive else None
    if name.startswith(("__rshift__", "bitwise_right_shift")):
        by = other if isinstance(other, int) else 0
        return (given[0][0] >> by, given[0][1] >> by) if given[0][0] >= 0 else None
    if name in ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar") and isinstance(other, int) and alpha == 1:
        by = other if name.startswith("add") else -other
        return low + by, high + by
    return None


def elements(value: Value) -> int:
    """How many elements a tensor has; 0 if a size is symbolic."""
    shape = type_of(value).shape
    return prod(size for size in shape if isinstance(size, int)) if all(isinstance(s, int) for s in shape) else 0
