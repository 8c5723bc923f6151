"""Raises attention that a model spells out, as products around a softmax, to the one call that kernels are made for.

    softmax(q k^T * scale + mask) v, with any of: masks added or filled in, a cast to f32 around the softmax, leading
    dimensions merged by views for `bmm`

What comes out is rounded less often. A row that sees no key at all becomes 0 where the model, with minus infinity in
its mask, has NaN. A number that is filled in, of -1e4 or less, leaves nothing of a key, and it matters which one it is
only where a row sees no key: such a row stays a mean over all keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, Attr, Dim, Graph, Node, TensorType, Value, contiguous
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.simplify_masks import ATTENTION, seen
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

PRODUCTS = {
    "aten.matmul.default": ("self", "other"),
    "aten.bmm.default": ("self", "mat2"),
    "aten.baddbmm.default": ("batch1", "batch2"),
}
SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
COPIES = ("aten._to_copy.default", "aten.clone.default", "aten.view.default", "aten._unsafe_view.default")
HIDDEN = -1e4  # what is filled in to hide a key is at most this
LEAST = {"f32": -3.4028234663852886e38, "bf16": -3.3895313892515355e38}


@dataclass
class _Found:
    """An attention: operands, and its masks in the order in which they apply, outermost first."""

    query: Value
    key: Value  # transposed
    value: Value
    scale: float
    added: list[Value] = field(default_factory=list)
    filled: list[_Fill] = field(default_factory=list)
    lead: tuple[Dim, ...] | None = None  # leading dimensions where masks apply


@dataclass(frozen=True)
class _Fill:
    """Scores replaced by `number` where the mask is (or, with `keeps`, is not) set."""

    mask: Value
    keeps: bool
    number: float


def raise_attention(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Weights that anyone else reads, as models return them, stay."""
    matcher = _Matcher(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        found = matcher.match(node)
        if found is None:
            return False
        before = len(rewriter.nodes)
        try:
            rewriter.replace(node.outputs[0], _emit(found, node, matcher.constants, rewriter))
        except Unsupported:
            del rewriter.nodes[before:]
            return False
        return True

    return rewrite(graph, infer, visit)


class _Matcher:
    """Finds the operands of attention behind its last product."""

    def __init__(self, graph: Graph) -> None:
        self.constants = Constants(graph)
        self.users, self.returned = users(graph), returned(graph)

    def producer(self, value: Attr) -> Node | None:
        """The node that computes `value` for one reader alone."""
        if not isinstance(value, Value) or value.name in self.returned or len(self.users.get(value.name, ())) != 1:
            return None
        node = self.constants.producer.get(value.name)
        return node if node is not None and node.kind == "op" else None

    def match(self, last: Node) -> _Found | None:
        """The attention that ends in the product `last`."""
        if last.op not in ("aten.matmul.default", "aten.bmm.default"):
            return None
        weights, value = (last.arg(name) for name in PRODUCTS[last.op])
        softmax = self._behind_copies(weights)
        if softmax is None or softmax.op not in SOFTMAX or not isinstance(value, Value):
            return None
        scores = softmax.arg("self")
        if not isinstance(scores, Value) or softmax.arg("dim") not in (-1, len(_shape(scores)) - 1):
            return None
        return self._scores(scores, value)

    def _behind_copies(self, value: Attr) -> Node | None:
        """The producer of `value` apart from casts, and views that leave the last two dimensions as they are."""
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

    def _scores(self, scores: Value, value: Value) -> _Found | None:
        found = _Found(scores, scores, value, 1.0)
        current = scores
        while (node := self._behind_copies(current)) is not None:
            output = node.outputs[0]
            assert output is not None
            if node.op in PRODUCTS:
                return self._product(node, found)
            if node.op in ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"):
                other = self._number(node.arg("other"))
                if other is None or not other or not math.isfinite(other):
                    return None
                found.scale *= other if ".mul." in node.op else 1 / other
                following = node.arg("self")
            elif found.scale != 1.0:
                return None  # a mask that is scaled as well
            else:
                following = self._mask(node, found)
                if found.lead not in (None, _shape(output)[:-2]):
                    return None  # masks of different forms
                found.lead = _shape(output)[:-2]
            if not isinstance(following, Value) or _shape(following) != _shape(output):
                return None
            current = following
        return None

    def _mask(self, node: Node, found: _Found) -> Attr:
        """The scores that `node` applies a mask to, which it notes in `found`."""
        if node.op == "aten.add.Tensor" and node.arg("alpha", 1) == 1:
            first, second = node.arg("self"), node.arg("other")
            if self._leads_to_product(second):
                first, second = second, first
            if isinstance(second, Value):
                found.added.append(second)
                return first
        elif node.op in ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.where.self"):
            keeps = node.op == "aten.where.self"
            mask = node.arg("condition" if keeps else "mask")
            number = self._number(node.arg("other" if keeps else "value"))
            if isinstance(mask, Value) and number is not None and number <= HIDDEN and not found.added:
                found.filled.append(_Fill(mask, keeps, number))
                return node.arg("self")
        return None

    def _leads_to_product(self, value: Attr) -> bool:
        """Whether `value` is a product, apart from its scale."""
        node = self._behind_copies(value)
        while node is not None and node.op in (
            "aten.mul.Tensor",
            "aten.mul.Scalar",
            "aten.div.Tensor",
            "aten.div.Scalar",
        ):
            node = self._behind_copies(node.arg("self"))
        return node is not None and node.op in PRODUCTS

    def _product(self, node: Node, found: _Found) -> _Found | None:
        query, key = (node.arg(name) for name in PRODUCTS[node.op])
        if node.op == "aten.baddbmm.default":
            if found.scale != 1.0 or found.filled or node.arg("beta", 1) not in (0, 1):
                return None
            scale, bias, lead = node.arg("alpha", 1), node.arg("self"), None
            if not isinstance(scale, int | float) or not scale:
                return None
            found.scale = float(scale)
            if node.arg("beta", 1) == 1 and isinstance(bias, Value):
                lead = _shape(node.outputs[0])[:-2]
                found.added.append(bias)
            if lead is not None and found.lead not in (None, lead):
                return None
            found.lead = lead or found.lead
        if not isinstance(query, Value) or not isinstance(key, Value):
            return None
        found.query, found.key = query, key
        forms = {(_type(v).dtype, _shape(v)[:-2]) for v in (query, key, found.value)}
        return found if len(forms) == 1 and _is_float(query) and len(_shape(query)) >= 3 else None

    def _number(self, attr: Attr) -> float | None:
        if isinstance(attr, int | float):
            return float(attr)
        known = self.constants.find(attr)
        return float(known) if known is not None and known.numel() == 1 else None


def _type(value: Value | None) -> TensorType:
    if value is None or not isinstance(value.type, TensorType):
        raise Unsupported("attention of numbers")
    return value.type


def _shape(value: Value | None) -> tuple[Dim, ...]:
    return _type(value).shape


def _is_float(value: Value) -> bool:
    return _type(value).dtype in ("f64", "f32", "f16", "bf16")


def _emit(found: _Found, last: Node, constants: Constants, rewriter: Rewriter) -> Attr:
    """The call, in the form in which its masks apply, and its result in the form of the last product."""

    def emit(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", last.loc, **args)

    result = last.outputs[0]
    mask = _mask(found, constants, rewriter, last)
    key, rank = constants.producer.get(found.key.name), len(_shape(found.key))
    if key is not None and key.op == "aten.transpose.int" and _axes(key, rank) == {rank - 2, rank - 1}:
        keys = _now(key.inputs[0], rewriter)
    else:
        keys = emit("transpose.int", self=_now(found.key, rewriter), dim0=-2, dim1=-1)
    operands = [_now(found.query, rewriter), keys, _now(found.value, rewriter)]
    lead = found.lead if mask is not None else None
    if lead is not None and lead != _shape(found.query)[:-2]:
        operands = [emit("view.default", self=v, size=(*lead, *_shape(v)[-2:])) for v in operands]
    names = ("query", "key", "value", "attn_mask")
    given = dict(zip(names, [*operands, *([] if mask is None else [mask])], strict=False))
    shape = (*_shape(operands[0])[:-1], _shape(operands[2])[-1])
    type_ = TensorType(_type(found.query).dtype, shape, contiguous(shape), _type(found.query).device)
    output = rewriter.emit(ATTENTION, last.loc, (type_,), **given, scale=found.scale)
    if shape != _shape(result):
        output = emit("view.default", self=output, size=_shape(result))
    if output.type != _type(result):
        raise Unsupported("a result of another type")
    return output


def _now(value: Value, rewriter: Rewriter) -> Value:
    now = rewriter.now(value)
    assert isinstance(now, Value)
    return now


def _axes(node: Node, rank: int) -> set[int]:
    return {axis % rank for name in ("dim0", "dim1") if isinstance(axis := node.arg(name), int)}


def _mask(found: _Found, constants: Constants, rewriter: Rewriter, last: Node) -> Value | None:
    """All masks in one: a boolean one where scores are filled in and every row sees a key, else one that is added."""

    def emit(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", last.loc, **args)

    dtype = _type(found.query).dtype
    if any(_type(mask).dtype != dtype for mask in found.added) or (found.added and found.filled):
        raise Unsupported("masks of other dtypes, or of both kinds")
    total: Value | None = None
    for mask in found.added:
        part = _now(mask, rewriter)
        total = part if total is None else emit("add.Tensor", self=total, other=part)
    for fill in found.filled:
        part = _now(fill.mask, rewriter)
        known = constants.find(fill.mask)
        some = known is not None and bool((seen(known) if fill.keeps else ~seen(known)).any(-1).all())
        if math.isinf(fill.number) or (some and len(found.filled) == 1):
            part = part if fill.keeps else emit("logical_not.default", self=part)
            total = part if total is None else emit("bitwise_and.Tensor", self=total, other=part)
            continue
        if dtype not in LEAST or len(found.filled) > 1:
            raise Unsupported("a row that sees no key would not be the mean of all")
        numbers = [emit("scalar_tensor.default", s=s, dtype=dtype, device=MAIN) for s in (0.0, LEAST[dtype])]
        first, second = numbers if fill.keeps else numbers[::-1]
        total = emit("where.self", condition=part, self=first, other=second)
    return total
