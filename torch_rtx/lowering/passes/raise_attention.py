"""Raises attention written as matmuls around a softmax to one call, which has kernels.

    softmax(q k^T * scale + mask) v, with any of: masks that are added or filled in, a cast to f32 around the softmax,
    leading dimensions merged by views for `bmm`, scales of q and k, zeros in place of NaN in the softmax, a sink: one
    more score in the softmax, which has no value

The raised call rounds fewer times. It is `scaled_dot_product_attention` where that gives the same: masks hide keys, and
leave one to each query, or the zeros are there for a query that sees no key (NaN in the scores then stays NaN).
Otherwise, and with a sink, it is `torch_rtx.attention`, by which a query that sees no key is NaN, and keys that are
filled with a number still count, where a query has no higher scores.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO
from torch_rtx.lowering.positions import Positions
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users
from torch_rtx.op_work import ATTENTION, SDPA

PRODUCTS = {
    "aten.matmul.default": ("self", "other"),
    "aten.bmm.default": ("self", "mat2"),
    "aten.baddbmm.default": ("batch1", "batch2"),
}
SCALES = tuple(f"aten.{name}" for name in ("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"))
SLICE, MAXIMA = "aten.slice.Tensor", ("aten.max.dim", "aten.amax.default")
SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
# Of calls that fill: the names of the mask, of what is filled in where it is True, and of what stays elsewhere.
FILLS = {
    "aten.where.self": ("condition", "self", "other"),
    "aten.masked_fill.Scalar": ("mask", "value", "self"),
    "aten.masked_fill.Tensor": ("mask", "value", "self"),
}
COPIES = ("aten._to_copy.default", "aten.clone.default", "aten.view.default", "aten._unsafe_view.default")


@dataclass
class _Match:
    """A matched attention: its operands, and its masks, last applied first."""

    query: Value
    key: Value  # transposed
    value: Value
    scale: float
    added: list[_Added] = field(default_factory=list)
    filled: list[_Fill] = field(default_factory=list)
    factors: list[Node] = field(default_factory=list)  # what scales the scores by numbers that are not known
    zeroed: bool = False  # zeros take the place of NaN in the softmax
    lead: tuple[Dim, ...] | None = None  # leading dimensions of the scores to which the last mask applies
    sink: Value | None = None  # the score that a query has beside those of keys


@dataclass(frozen=True)
class _Added:
    """A mask that is added to the scores.

    Attributes:
        shape: the mask's, with as many leading dimensions as those scores have to which the last mask applies.
    """

    mask: Value
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class _Fill:
    """A fill of scores of `dtype` by `number` where the mask is True (with `keeps`: False)."""

    mask: Value
    keeps: bool
    number: float
    dtype: str


@dataclass(frozen=True)
class _Mask:
    """All masks of an attention as one.

    Attributes:
        fill: what a boolean mask makes of the scores that it hides; None: minus infinity.
        hides: the mask leaves a key to each query, and no visible score can be below those that are hidden.
        bias: what is added to the scores before a boolean mask.
    """

    value: Value
    fill: float | None
    hides: bool
    bias: Value | None = None


def raise_attention(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Attention stays if its weights have another reader, such as the caller."""
    matcher = _Matcher(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        found = matcher.match(node)
        if found is None:
            return False
        before = len(rewriter.nodes)
        try:
            rewriter.replace(node.outputs[0], _emit(found, node, matcher, rewriter))
        except Unsupported:
            del rewriter.nodes[before:]
            return False
        return True

    return rewrite(graph, infer, visit)


class _Matcher:
    """Matches attention backward from its last matmul."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.constants = graph, Constants(graph)
        self.users, self.returned = users(graph), returned(graph)

    def producer(self, value: Attr) -> Node | None:
        """The node that computes `value`, if it has a single reader."""
        if not isinstance(value, Value) or value.name in self.returned or len(self.users.get(value.name, ())) != 1:
            return None
        node = self.constants.producer.get(value.name)
        return node if node is not None and node.kind == "op" else None

    def match(self, last: Node) -> _Match | None:
        """The attention whose last matmul is `last`."""
        if last.op not in ("aten.matmul.default", "aten.bmm.default"):
            return None
        weights, value = (last.arg(name) for name in PRODUCTS[last.op])
        softmax = self._behind_copies(weights)
        zeroed = softmax is not None and self._zeroes_nan(softmax)
        if softmax is not None and zeroed:
            softmax = self.constants.producer.get(_kept(softmax).name)
        cut = softmax if softmax is not None and softmax.op == SLICE else None
        if cut is not None:
            softmax = self._behind_copies(cut.arg("self"))
        if softmax is None or softmax.op not in SOFTMAX or not isinstance(value, Value):
            return None
        scores, sink = softmax.arg("self"), None
        if not isinstance(scores, Value) or softmax.arg("dim") not in (-1, len(_shape(scores)) - 1):
            return None
        if cut is not None:
            scores, sink = self._without_sink(scores, cut)
            if scores is None or zeroed:
                return None
        return self._scores(scores, _Match(scores, scores, value, 1.0, zeroed=zeroed, sink=sink))

    def _without_sink(self, scores: Value, cut: Node) -> tuple[Value | None, Value | None]:
        """The scores of keys and of the sink, if `cut` leaves the weights of keys alone. What is subtracted from all
        scores changes no weight."""
        width, last = _shape(scores)[-1], len(_shape(scores)) - 1
        keys = dim_expr("+", width, -1)
        if cut.arg("dim") not in (-1, last) or cut.arg("start") not in (None, 0) or cut.arg("end") not in (-1, keys):
            return None, None
        shifted = self._behind_copies(scores)
        if shifted is not None and shifted.op == "aten.sub.Tensor" and shifted.arg("alpha", 1) == 1:
            joined, peak = shifted.arg("self"), self.producer(shifted.arg("other"))
            of_same = peak is not None and peak.op in MAXIMA and peak.arg("self") == joined
            if not of_same or not isinstance(joined, Value) or self.users[joined.name] != [peak, shifted]:
                return None, None
            node = None if joined.name in self.returned else self.constants.producer.get(joined.name)
        else:
            node = shifted
        parts = node.arg("tensors") if node is not None and node.op == "aten.cat.default" else None
        if node is None or not isinstance(parts, tuple | list) or len(parts) != 2 or node.arg("dim") not in (-1, last):
            return None, None
        mine, sink = parts
        if isinstance(mine, Value) and isinstance(sink, Value) and _shape(sink)[-1] == 1:
            return mine, sink
        return None, None

    def _zeroes_nan(self, node: Node) -> bool:
        """Whether a node puts 0 in place of NaN, and nothing else reads what it replaces."""
        if node.op not in FILLS:
            return False
        mask, zero, kept = (node.arg(name) for name in FILLS[node.op])
        check = self.producer(mask)
        if check is None or check.op != "aten.isnan.default" or self._number(zero) != 0 or check.arg("self") != kept:
            return False
        return isinstance(kept, Value) and kept.name not in self.returned and self.users[kept.name] == [check, node]

    def _behind_copies(self, value: Attr) -> Node | None:
        """The producer of `value`, skipping casts, copies, and views that preserve the last two dimensions."""
        node = self.producer(value)
        while node is not None and node.op in COPIES:
            source = node.arg("self")
            if (
                not isinstance(source, Value)
                or not isinstance(value, Value)
                or _shape(source)[-2:] != _shape(value)[-2:]
            ):
                return None
            if not _is_float(source) or _type(source).device != _type(value).device:
                return None
            value, node = source, self.producer(source)
        return node

    def _scores(self, scores: Value, found: _Match) -> _Match | None:
        current = scores
        while (node := self._behind_copies(current)) is not None:
            output = node.outputs[0]
            assert output is not None
            if node.op in PRODUCTS:
                return self._product(node, found)
            if node.op in SCALES:
                scale = self._scale(node)
                if scale is not None:
                    found.scale *= scale
                elif _scales_rows(node):
                    found.factors.append(node)
                else:
                    return None
                following = node.arg("self")
            elif found.scale != 1.0 or found.factors:
                return None  # the scale applies to the mask, too
            else:
                following = self._mask(node, found)
            if not isinstance(following, Value) or _shape(following) != _shape(output):
                return None
            current = following
        return None

    def _mask(self, node: Node, found: _Match) -> Attr:
        """The scores to which `node` applies a mask; adds the mask to `found`."""
        if node.op == "aten.add.Tensor" and node.arg("alpha", 1) == 1:
            first, second = node.arg("self"), node.arg("other")
            if self._leads_to_product(second):
                first, second = second, first
            if isinstance(second, Value) and self._adds(second, node, found):
                return first
        elif node.op in ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.where.self"):
            keeps = node.op == "aten.where.self"
            mask = node.arg("condition" if keeps else "mask")
            number, dtype = self._number(node.arg("other" if keeps else "value")), _type(node.outputs[0]).dtype
            lead = _shape(node.outputs[0])[:-2]
            if found.added or found.lead not in (None, lead):
                return None
            if isinstance(mask, Value) and number is not None and number < math.inf:
                found.lead = lead
                held = float(torch.tensor(number, dtype=torch.float64).to(aten.DTYPES[dtype]))
                found.filled.append(_Fill(mask, keeps, held, dtype))
                return node.arg("self")
        return None

    def _adds(self, mask: Value, node: Node, found: _Match) -> bool:
        """Whether `node` adds `mask` to scores; if so, it is one more mask of `found`."""
        lead = _shape(node.outputs[0])[:-2]
        found.lead = found.lead if found.lead is not None else lead
        shape = _shape(mask)
        if lead != found.lead and len(shape) > 2:
            moved = _divided(shape[:-2], lead, found.lead)
            if moved is None:
                return False
            shape = (*moved, *shape[-2:])
        found.added.append(_Added(mask, shape))
        return True

    def _leads_to_product(self, value: Attr) -> bool:
        """Whether `value` is a matmul, possibly scaled."""
        node = self._behind_copies(value)
        while node is not None and node.op in SCALES:
            node = self._behind_copies(node.arg("self"))
        return node is not None and node.op in PRODUCTS

    def _product(self, node: Node, found: _Match) -> _Match | None:
        query, key = (node.arg(name) for name in PRODUCTS[node.op])
        if node.op == "aten.baddbmm.default":
            if found.scale != 1.0 or found.filled or node.arg("beta", 1) not in (0, 1):
                return None
            scale, bias = node.arg("alpha", 1), node.arg("self")
            if not isinstance(scale, int | float) or not scale:
                return None
            found.scale = float(scale)
            if node.arg("beta", 1) == 1 and not (isinstance(bias, Value) and self._adds(bias, node, found)):
                return None
        if not isinstance(query, Value) or not isinstance(key, Value):
            return None
        if not all(_scales_queries(factor, query) for factor in found.factors):
            return None
        found.query, found.key = (self._unscaled(operand, found) for operand in (query, key))
        forms = {(_type(v).dtype, _shape(v)[:-2]) for v in (query, key, found.value)}
        return found if len(forms) == 1 and _is_float(query) and len(_shape(query)) >= 3 else None

    def _unscaled(self, operand: Value, found: _Match) -> Value:
        """An operand of the scores without its scale, which becomes one of the scores."""
        node = self.producer(operand)
        source = node.arg("self") if node is not None and node.op in SCALES else None
        if node is None or not isinstance(source, Value) or _type(source).dtype != _type(operand).dtype:
            return operand
        scale = self._scale(node) if _shape(source) == _shape(operand) else None
        if scale is None:
            return operand
        found.scale *= scale
        return source

    def _scale(self, node: Node) -> float | None:
        """The number by which a node multiplies; None: it is not known, or nothing that a scale can be."""
        other = self._number(node.arg("other"))
        if other is None or not other or not math.isfinite(other):
            return None
        return other if ".mul." in node.op else 1 / other

    def _number(self, attr: Attr) -> float | None:
        if isinstance(attr, int | float):
            return float(attr)
        known = self.constants.find(attr)
        return float(known) if known is not None and known.numel() == 1 else None

    # ---- what masks leave --------------------------------------------------------------------------------------------

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self.graph)

    def leaves_a_key(self, found: _Match) -> bool:
        """Each query provably sees a key, whatever the inputs: one that is not minus infinity."""
        known = [self._shaped(added) for added in found.added]
        known += [self.constants.find(fill.mask) for fill in found.filled]
        visible: list[torch.Tensor] = []
        for mask, fill in zip(known, (*[None] * len(found.added), *found.filled), strict=True):
            if mask is not None:
                visible.append(torch.atleast_1d(mask > -torch.inf if fill is None else mask == fill.keeps))
            elif fill is None or self._positions.row_start(fill.mask) != (ONE if fill.keeps else ZERO):
                return False
        if len(visible) < len(known):  # the others show the first key
            visible = [mask[..., :1] for mask in visible]
        return not visible or bool(reduce(operator.and_, visible).any(-1).all())

    def _shaped(self, added: _Added) -> torch.Tensor | None:
        """The elements of a mask in the shape that it is added in, if they are known."""
        mask = self.constants.find(added.mask)
        return None if mask is None else mask.reshape([size for size in added.shape if isinstance(size, int)])


def _divided(dims: tuple[Dim, ...], old: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """Dimensions that broadcast to `old` as dimensions that broadcast to `new`, the same elements divided otherwise;
    None if `dims` are 1 along a part of what is one dimension in `new`."""
    dims = (*(1,) * (len(old) - len(dims)), *dims)
    found: list[Dim] = []
    begun = ended = 0
    for end in range(1, len(old) + 1):
        ends = [at for at in range(ended, len(new) + 1) if _count(new[:at]) == _count(old[:end])]
        if not ends:
            continue
        part, to = dims[begun:end], new[ended : (ends[-1] if end == len(old) else ends[0])]
        if set(part) <= {1}:
            found += (1,) * len(to)
        elif part == old[begun:end]:
            found += to
        else:
            return None
        begun, ended = end, ended + len(to)
    return tuple(found) if (begun, ended) == (len(old), len(new)) else None


def _scales_rows(node: Node) -> bool:
    """Whether a node scales scores by a tensor with one number, or one for each matrix, which may scale queries too."""
    scores, other = node.arg("self"), node.arg("other")
    if not isinstance(scores, Value) or not isinstance(other, Value) or _type(other).dtype != _type(scores).dtype:
        return False
    return set(_shape(other)[-2:]) <= {1} and len(_shape(other)) <= len(_shape(scores))


def _scales_queries(node: Node, query: Value) -> bool:
    """Whether the factor of a node fits the queries, whose leading dimensions may be merged."""
    scores, factor = node.arg("self"), node.arg("other")
    assert isinstance(scores, Value)
    assert isinstance(factor, Value)
    same = _shape(scores)[:-2] == _shape(query)[:-2] or set(_shape(factor)) <= {1}
    return same and len(_shape(factor)) <= len(_shape(query))


def _kept(node: Node) -> Value:
    """What a fill leaves as it is where its mask is False."""
    kept = node.arg(FILLS[node.op][2])
    assert isinstance(kept, Value)
    return kept


def _type(value: Value | None) -> TensorType:
    if value is None or not isinstance(value.type, TensorType):
        raise Unsupported("attention of numbers")
    return value.type


def _shape(value: Value | None) -> tuple[Dim, ...]:
    return _type(value).shape


def _is_float(value: Value) -> bool:
    return _type(value).dtype in ("f64", "f32", "f16", "bf16")


def _emit(found: _Match, last: Node, matcher: _Matcher, rewriter: Rewriter) -> Attr:
    """Emit the call with the leading dimensions of its masks, and view its result in the shape of the last matmul."""

    def emit(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", last.loc, **args)

    result = last.outputs[0]
    mask = _mask(found, matcher, rewriter, last)
    key, rank = matcher.constants.producer.get(found.key.name), len(_shape(found.key))
    if key is not None and key.op == "aten.transpose.int" and _axes(key, rank) == {rank - 2, rank - 1}:
        keys = _current(key.inputs[0], rewriter)
    else:
        keys = emit("transpose.int", self=_current(found.key, rewriter), dim0=-2, dim1=-1)
    query = _current(found.query, rewriter)
    for node in found.factors:
        factor = node.arg("other")
        assert isinstance(factor, Value)
        query = rewriter.emit(node.op, node.loc, self=query, other=_current(factor, rewriter))
    operands = [query, keys, _current(found.value, rewriter)]
    lead = found.lead if mask is not None else None
    if lead is not None and lead != _shape(found.query)[:-2]:
        operands = [emit("view.default", self=v, size=(*lead, *_shape(v)[-2:])) for v in operands]
    names = ("query", "key", "value", "attn_mask")
    given: dict[str, Attr] = dict(zip(names, [*operands, *([] if mask is None else [mask.value])], strict=False))
    given["scale"] = found.scale
    if mask is not None and not mask.hides and mask.fill is not None:
        given["fill"] = mask.fill
    if mask is not None and mask.bias is not None:
        given["bias"] = mask.bias
    shape = (*_shape(operands[0])[:-1], _shape(operands[2])[-1])
    type_ = TensorType(_type(found.query).dtype, shape, contiguous(shape), _type(found.query).device)
    if found.sink is not None:
        if _shape(found.sink)[:-1] != shape[:-1]:
            raise Unsupported("a sink that is divided otherwise")
        given["sink"] = _current(found.sink, rewriter)
    plain = found.sink is None and (mask is None or mask.hides)
    output = rewriter.emit(SDPA if plain else ATTENTION, last.loc, (type_,), **given)
    if shape != _shape(result):
        output = emit("view.default", self=output, size=_shape(result))
    if output.type != _type(result):
        raise Unsupported("a result of another type")
    return output


def _count(shape: tuple[Dim, ...]) -> Dim:
    return dim_expr("*", 1, *shape)


def _current(value: Value, rewriter: Rewriter) -> Value:
    current = rewriter.current(value)
    assert isinstance(current, Value)
    return current


def _axes(node: Node, rank: int) -> set[int]:
    return {axis % rank for name in ("dim0", "dim1") if isinstance(axis := node.arg(name), int)}


def _mask(found: _Match, matcher: _Matcher, rewriter: Rewriter, last: Node) -> _Mask | None:
    """Combine all masks, those of fills into a boolean one."""

    def emit(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", last.loc, **args)

    dtype, numbers = _type(found.query).dtype, {fill.number for fill in found.filled}
    if any(_type(added.mask).dtype != dtype for added in found.added) or len(numbers) > 1:
        raise Unsupported("masks of other dtypes, or filled with different numbers")
    total: Value | None = None
    for added in found.added:
        term = _current(added.mask, rewriter)
        if _shape(term) != added.shape:
            term = emit("view.default", self=term, size=added.shape)
        total = term if total is None else emit("add.Tensor", self=total, other=term)
    bias = total if found.filled else None
    total = None if found.filled else total
    zeroed = found.zeroed and all(fill.number == -math.inf for fill in found.filled)
    hides = zeroed or matcher.leaves_a_key(found)
    for fill in found.filled:
        keep = _current(fill.mask, rewriter)
        keep = keep if fill.keeps else emit("logical_not.default", self=keep)
        total = keep if total is None else emit("bitwise_and.Tensor", self=total, other=keep)
        known = fill.number == -math.inf or not found.factors
        hides = hides and known and fill.number <= max(_lowest(fill.dtype), _lowest(dtype) * max(1.0, abs(found.scale)))
    if total is None:
        return None
    number = next((number for number in numbers if math.isfinite(number)), None)
    return _Mask(total, number, hides and bias is None, bias)


def _lowest(dtype: str) -> float:
    """The smallest finite number of a dtype."""
    return torch.finfo(aten.DTYPES[dtype]).min
