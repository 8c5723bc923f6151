"""Attention as an operation of kernels: operands, masks and results of the calls that a region can be built around.

`attention_forward` has the kernel of all forward calls, `attention_backward` that of the gradients. Both multiply tiles
of a block of query rows (M) and a block of keys, which are the rows of K and V (J) and the columns of the scores (N). D
and E are the columns of Q and K, and of V; D1 and E1 those of a second piece of the head (see `attention_pieces`).
Operands and masks are kernel IR: views are address arithmetic, and a mask may be computed.

With few queries per head (decoding), the rows of heads that share keys and values are packed into one block, so that K
and V are read once per group instead of once per head. Gradients of keys and values are sums over such heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.kernels.attention_modified import Modified, modified_of
from torch_rtx.lowering.kernels.emit import Axis, Emitter
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, variable
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Position, Shape, Tensor, View, expand
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.op_work import (
    ANCHORS,
    ATTENTION,
    ATTENTION_FORWARD,
    ATTENTION_PARTIAL,
    BACKWARDS,
    FLEX,
    FLEX_GRAD_KEY_VALUE,
    FLEX_GRADS,
    FLEX_PARTIAL,
)

DTYPES = ("f16", "bf16", "f32")
MAX_WIDTH = 256  # of a head
MAX_PACKED_ROWS = 64  # of a block with several heads
GRADIENTS = (*BACKWARDS, *FLEX_GRADS)
FLEXES = (FLEX, FLEX_PARTIAL, *FLEX_GRADS)
SHARING = (ATTENTION_FORWARD, *FLEXES, *BACKWARDS)  # query heads may share keys without being told


@dataclass(frozen=True)
class Attention:
    """The region's call of attention, with all operands expanded to the same leading dimensions (batch, heads).

    Attributes:
        op: the name of the call.
        gradient: of the result, in a call that computes the gradients of the operands.
        bias: what is added to the scaled scores before the mask.
        causal: a query sees the keys up to its own position.
        fill: the score of a key that a boolean mask hides; None: its weight is 0.
        safe: a query that sees no key gets 0, else NaN.
        lead, queries: sizes of the result, [*lead, queries, value_width].
        packed: heads of the last leading dimension that share a block of rows.
        range_rows: queries in a range of `attention_backward_partial`; None in other calls.
        results: of the call, None where nothing reads one. Of `attention_partial`: the weighted sums of values, the
            largest scores and the sums of weights. Of `attention_forward`: the second is the logarithm of the sum of
            weights. Of `attention_backward`: the gradients of query, key, value and mask.
        modified: what functions make of the scores, in `flex_attention` and its gradients.
        sink: one more score of each query, [*lead, queries, 1], which has no value.
        band: query i sees no key but those from i + band[0] to i + band[1]; None: any.
    """

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float
    fill: float | None
    safe: bool
    lead: tuple[Dim, ...]
    queries: Dim
    packed: int
    range_rows: int | None
    results: tuple[Tensor | None, ...]
    modified: Modified | None = None
    sink: Tensor | None = None
    band: tuple[int, int] | None = None

    @property
    def partial(self) -> bool:
        """The keys are a range or a share of all keys; see `split_kv`."""
        return self.op in (ATTENTION_PARTIAL, FLEX_PARTIAL)

    @property
    def dtype(self) -> str:
        """The dtype of the operands."""
        return self.query.dtype

    @property
    def keys(self) -> Index:
        """The number of keys."""
        return self.key.shape[-2]

    @property
    def rows(self) -> Dim:
        """The query rows of a group: of all heads that are packed."""
        return dim_expr("*", self.queries, self.packed)

    @property
    def groups(self) -> tuple[Dim, ...]:
        """The leading dimensions, with packed heads as one."""
        return (*self.lead[:-1], dim_expr("//", self.lead[-1], self.packed)) if self.lead else ()

    @property
    def width(self) -> int:
        """Elements of a query and of a key."""
        return _static(self.query.shape[-1])

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return _static(self.value.shape[-1])

    def group(self) -> Position:
        """The leading position of a program, as variables."""
        sizes = map(from_dim, self.groups)
        return tuple(ZERO if size == ONE else variable(f"Z{axis}", size) for axis, size in enumerate(sizes))

    def place(self, group: Position, row: Index) -> tuple[Position, Index]:
        """The leading position and the query of a row."""
        queries = from_dim(self.queries)
        if self.packed == 1:
            return group, row % queries
        return (*group[:-1], group[-1] * constant(self.packed) + row // queries), row % queries


def attention_of(region: Region) -> Attention:
    """The attention of a region.

    Raises:
        Unsupported: dropout, a symbolic or too large head dimension, or a dtype that tensor cores do not multiply.
    """
    node = region.anchor
    if node is None or not ANCHORS[node.op].startswith("attention"):
        raise Unsupported("a region without attention")
    if node.arg("dropout_p", 0.0) != 0.0:
        raise Unsupported("attention with dropout", loc=node.loc)
    query, key, value = (_operand(region, node, name) for name in ("query", "key", "value"))
    _check(node, query, key, value)
    *lead, queries, _ = _result_shape(node)
    heads: Shape = tuple(map(from_dim, lead))
    # Query heads that share keys have a sum as the gradient of these.
    packed = 1
    if node.arg("enable_gqa") or (node.op in SHARING and key.shape[-3] != heads[-1]):
        if node.op in (*BACKWARDS, FLEX_GRAD_KEY_VALUE):
            packed = _static(heads[-1]) // _static(key.shape[-3])
        else:
            key, value = (_repeated(tensor, heads[-1]) for tensor in (key, value))
    shared: Shape = (*heads[:-1], heads[-1] // constant(packed)) if packed > 1 else heads
    scale = node.arg("scale")
    scores = (*heads, from_dim(queries), key.shape[-2])
    mask, bias, sink = (
        expand(_operand(region, node, name), shape) if node.arg(name) is not None else None
        for name, shape in (("attn_mask", scores), ("bias", scores), ("sink", (*scores[:-1], ONE)))
    )
    fill, band = node.arg("fill"), node.arg("band")
    for added in (one for one in (mask, bias, sink) if one is not None):
        if added.dtype not in (*DTYPES, *(["bool"] if added is mask else [])):
            raise Unsupported(f"a mask of dtype {added.dtype}", loc=node.loc)
    modified = None
    if node.op in FLEXES:
        mask, modified = modified_of(region, node, (*lead, queries), _dim_of_keys(node))
    attn = Attention(
        node.op,
        expand(query, (*heads, *query.shape[-2:])),
        expand(key, (*shared, *key.shape[-2:])),
        expand(value, (*shared, *value.shape[-2:])),
        _operand(region, node, "grad_out") if node.op in GRADIENTS else None,
        mask,
        bias,
        bool(node.arg("is_causal")),
        float(scale) if isinstance(scale, int | float) else 1 / math.sqrt(_static(query.shape[-1])),
        float(fill) if isinstance(fill, int | float) and math.isfinite(fill) else None,
        node.op != ATTENTION or (bool(band) and fill is None and bias is None and sink is None),
        tuple(lead),
        queries,
        packed,
        rows if isinstance(rows := node.arg("rows"), int) else None,
        tuple(None if value is None else region.values[value.name] for value in node.outputs),
        modified,
        sink,
        (int(band[0]), int(band[1])) if isinstance(band, tuple) and len(band) == 2 else None,  # type: ignore[arg-type]
    )
    return attn if node.op in (ATTENTION_FORWARD, *GRADIENTS) else _packed(attn)


def _check(node: Node, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises Unsupported unless kernels multiply these operands."""
    if {query.dtype, key.dtype, value.dtype} - set(DTYPES) or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise Unsupported(f"attention in {query.dtype}", loc=node.loc)
    if min(len(t.shape) for t in (query, key, value)) < 2:
        raise Unsupported("attention without queries or keys", loc=node.loc)
    for width in (query.shape[-1], value.shape[-1]):
        if not 0 < _static(width) <= MAX_WIDTH:
            raise Unsupported(f"attention with heads of {width} elements", loc=node.loc)


def _result_shape(node: Node) -> tuple[Dim, ...]:
    """The shape of the result of attention, also of a call that gets its gradient."""
    result = node.arg("grad_out") if node.op in GRADIENTS else node.outputs[0]
    if not isinstance(result, Value) or not isinstance(result.type, TensorType):
        raise Unsupported("attention whose result nothing reads", loc=node.loc)
    return result.type.shape[node.op == FLEX_PARTIAL :]  # the first dimension of these is that of shares


def _dim_of_keys(node: Node) -> Dim:
    key = node.arg("key")
    assert isinstance(key, Value)
    assert isinstance(key.type, TensorType)
    return key.type.shape[-2]


def _static(size: Index) -> int:
    if size.number is None:
        raise Unsupported("attention with heads of an open size")
    return size.number


def _operand(region: Region, node: Node, name: str) -> Tensor:
    value = node.arg(name)
    assert isinstance(value, Value)
    return region.values[value.name]


def _repeated(tensor: Tensor, heads: Index) -> Tensor:
    """`tensor` with each head repeated for the query heads that share it."""
    times = constant(_static(heads) // _static(tensor.shape[-3]))

    def at(position: Position) -> Position:
        return (*position[:-3], position[-3] // times, *position[-2:])

    return View((*tensor.shape[:-3], heads, *tensor.shape[-2:]), tensor.dtype, tensor, at)


def _packed(attn: Attention) -> Attention:
    """`attn` with as many heads per block of rows as share keys and values and fit."""
    heads = attn.lead[-1] if attn.lead else 1
    if not isinstance(attn.queries, int) or not isinstance(heads, int) or not attn.queries:
        return attn
    if attn.modified is not None and not attn.modified.is_one_block(attn.queries):
        return attn
    for count in range(min(heads, MAX_PACKED_ROWS // attn.queries), 1, -1):
        packed = replace(attn, packed=count)
        if heads % count == 0 and not any(_varies(packed, tensor) for tensor in (attn.key, attn.value)):
            return packed
    return attn


def _varies(attn: Attention, tensor: Tensor) -> bool:
    """The packed rows read different elements of `tensor`."""
    lead, _ = attn.place(attn.group(), variable("M", from_dim(attn.rows)))
    return depends_on_row(tensor, (*lead, variable("J", tensor.shape[-2]), variable("D", tensor.shape[-1])))


def depends_on_row(tensor: Tensor, position: Position) -> bool:
    """The element of `tensor` at `position` depends on the row M."""
    return bool(Emitter([Axis("M", 1)]).value(tensor, position).axes)


__all__ = ["Attention", "attention_of", "depends_on_row"]
