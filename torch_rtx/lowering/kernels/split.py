"""Split forms: a body as two kernels, for results that are too small to fill a chip.

The first kernel computes partial results in f32: of a product or a convolution over ranges of its depth, of attention
over ranges of its keys. The second adds them up, in order, and does all that follows; so every run gives the same bits,
which atomic additions would not. Both are written down as ATen calls, like any other body. Loops have a form of three
kernels, or two for each reduction: see `split_reduction`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.attention import attention_of
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, argument, kernel, needed, type_of
from torch_rtx.lowering.kernels.conv import conv_product, is_depthwise
from torch_rtx.lowering.kernels.cost import CLEAR, best_parts
from torch_rtx.lowering.kernels.gemm import OPERANDS, gemm_product
from torch_rtx.lowering.kernels.generate import family, generate
from torch_rtx.lowering.kernels.region import ANCHORS, Region, region
from torch_rtx.lowering.kernels.split_kv import best_kv_splits, combine_attention, split_attention
from torch_rtx.lowering.kernels.split_reduction import best_chunks, split_reductions
from torch_rtx.targets import Arch, arch_of


def split(body: Graph, name: str, sm: int, gain: float = CLEAR) -> Graph | None:
    """The split form of the body of kernel `name` on SM version `sm` (89); None where it has none, or is not expected
    to be faster by the factor `gain`."""
    try:
        parts = _parts(region(body), arch_of(sm), gain)
        if parts == 1:
            return None
        graph = split_in(body, name, parts)
        for node in graph.nodes:
            assert node.body is not None
            generate(node.body, node.op, sm, 0)
    except Unsupported:
        return None
    return graph


def _parts(found: Region, arch: Arch, gain: float) -> int:
    """In how many parts a region is best cut; 1: in none."""
    match family(found):
        case "gemm":
            return best_parts(found, gemm_product(found), arch, gain)
        case "conv":
            of = conv_product(found)
            return 1 if of.batch != 1 or is_depthwise(of) else best_parts(found, of, arch, gain)
        case "attention":
            assert found.anchor is not None
            return best_kv_splits(attention_of(found), type_of(argument(found.anchor, "key")).shape[-2], arch, gain)
    return best_chunks(found, arch, gain)


def split_in(body: Graph, name: str, parts: int) -> Graph:
    """`body`, of the kernel `name`, with its anchor cut in `parts`, which must divide what is cut; without an anchor,
    with the rows that it reduces cut in about so many.

    Raises:
        Unsupported: it has nothing that can be cut.
    """
    anchor = next((node for node in body.nodes if ANCHORS.get(node.op) in FORMS), None)
    if anchor is None:
        return split_reductions(body, name, parts)
    partial, finish = FORMS[ANCHORS[anchor.op]]
    operands = tuple(attr for name, attr in anchor.args if name != _last(anchor))
    taken = {value.name for value in body.values()} | body.syms.keys()
    first = BodyBuilder(taken, needed(body.nodes, operands))
    results = partial(first, anchor, parts)
    second = BodyBuilder(taken)
    others = [node for node in body.nodes if node is not anchor]
    kept = needed(others, (*body.outputs, anchor.arg(_last(anchor))))
    for node in body.nodes:
        if node is anchor:
            _rounded(second, finish(second, anchor, results), anchor)
        elif node in kept:
            second.nodes.append(node)
    outputs = tuple(value for value in body.outputs if isinstance(value, Value))
    nodes = (
        kernel(f"{name}_parts{parts}", body.inputs, first.nodes, results),
        kernel(f"{name}_sum{parts}", (*results, *body.inputs), second.nodes, outputs),
    )
    return Graph("import", body.inputs, nodes=nodes, outputs=body.outputs)


def _last(anchor: Node) -> str:
    """The argument of an anchor that is added in the end, if there is one."""
    return OPERANDS[anchor.op][2] if anchor.op in OPERANDS else "bias"


def _added(calls: BodyBuilder, parts: tuple[Value, ...], strides: tuple[Dim, ...]) -> Value:
    """The sum of partial results, in order; it lies in memory as `strides` say."""
    total, *rest = parts
    for part in rest:
        old = type_of(part)
        total = calls.call("add.Tensor", TensorType("f32", old.shape, strides), self=total, other=part)
    return total


def _rounded(calls: BodyBuilder, total: Value, anchor: Node) -> None:
    """The result of `anchor`, from that in f32."""
    (result,) = anchor.outputs
    assert result is not None
    if type_of(result).dtype != "f32":
        calls.call("_to_copy.default", type_of(result), self=total, dtype=type_of(result).dtype)
    calls.name_last(result)


# ---- matrix products -------------------------------------------------------------------------------------------------


def _merged(a: Value, b: Value) -> bool:
    """Whether all batches have one second operand, so that they are rows of one product."""
    return len(type_of(b).shape) == 2 and len(type_of(a).shape) != 2


def _product(calls: BodyBuilder, anchor: Node, parts: int) -> tuple[Value, ...]:
    """[parts, *batch, rows, columns]: a product of [parts, *batch, rows, depth / parts] and the like."""
    a, b = (argument(anchor, name) for name in OPERANDS[anchor.op][:2])
    if anchor.op == "aten.linear.default":
        b = calls.permute(b, (1, 0))
    if _merged(a, b):
        *lead, depth = type_of(a).shape
        a = calls.reshape(a, (dim_expr("*", 1, *lead), depth))
    rank = max(len(type_of(a).shape), len(type_of(b).shape))
    shape = _broadcast(type_of(a).shape[:-2], type_of(b).shape[:-2])
    shape = (parts, *shape, type_of(a).shape[-2], type_of(b).shape[-1])
    sides = []
    for side, axis in ((a, -1), (b, -2)):
        own = len(type_of(side).shape)
        side = calls.move_to_front(calls.split_dim(side, own + axis, parts), own + axis)
        for _ in range(rank - own):
            side = calls.unsqueeze(side, 1)
        sides.append(calls.cast(side, "f32"))
    return (calls.call("matmul.default", TensorType("f32", shape, contiguous(shape)), self=sides[0], other=sides[1]),)


def _broadcast(one: tuple[Dim, ...], two: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rank = max(len(one), len(two))
    pairs = zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(two)) + two, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)


def _product_sum(calls: BodyBuilder, anchor: Node, partials: tuple[Value, ...]) -> Value:
    (result,) = anchor.outputs
    assert result is not None
    parts = calls.unbind(partials[0], 0)
    total = _added(calls, parts, type_of(parts[0]).strides)
    total = calls.reshape(total, type_of(result).shape)
    alpha, beta = anchor.arg("alpha", 1), anchor.arg("beta", 1)
    if alpha != 1:
        total = calls.pointwise("mul.Scalar", total, other=alpha)
    added = anchor.arg(_last(anchor))
    if isinstance(added, Value) and beta != 0:
        other = added if beta == 1 else calls.pointwise("mul.Scalar", calls.cast(added, "f32"), other=beta)
        total = calls.pointwise("add.Tensor", total, other=other)
    return total


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _convolution(calls: BodyBuilder, anchor: Node, parts: int) -> tuple[Value, ...]:
    """[batch, parts * filters, *places]: a convolution in groups, each of which has a range of the channels."""
    (result,) = anchor.outputs
    assert result is not None
    weight = calls.cast(argument(anchor, "weight"), "f32")
    filters, channels, *window = type_of(weight).shape
    grouped = calls.move_to_front(calls.split_dim(weight, 1, parts), 1)
    shape = (dim_expr("*", parts, filters), dim_expr("//", channels, parts), *window)
    batch, _, *places = type_of(result).shape
    given = {
        "input": calls.cast(argument(anchor, "input"), "f32"),
        "weight": calls.reshape(grouped, shape),
        **({"bias": None} if anchor.op == "aten.convolution.default" else {}),
        **{name: attr for name, attr in anchor.args if name not in ("input", "weight", "bias", "groups")},
        "groups": parts,
    }
    out = (batch, shape[0], *places)
    strides = _channels_last(out) if type_of(result).strides[1] == 1 else contiguous(out)
    return (calls.call(anchor.op.removeprefix("aten."), TensorType("f32", out, strides), **given),)


def _channels_last(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Strides of images, or the like, whose channels lie closest together."""
    order = (0, *range(2, len(shape)), 1)
    found = dict(zip(order, contiguous(tuple(shape[axis] for axis in order)), strict=True))
    return tuple(found[axis] for axis in range(len(shape)))


def _convolution_sum(calls: BodyBuilder, anchor: Node, partials: tuple[Value, ...]) -> Value:
    (result,) = anchor.outputs
    assert result is not None
    strides = type_of(result).strides
    filters, *places = type_of(result).shape[1:]
    count = dim_expr("//", type_of(partials[0]).shape[1], filters)
    assert isinstance(count, int)  # `conv_product` takes weights of static shapes alone
    total = _added(calls, calls.unbind(calls.split_dim(partials[0], 1, count), 1), strides)
    bias = anchor.arg("bias")
    if isinstance(bias, Value):
        wide = calls.reshape(bias, (filters, *(1 for _ in places)))
        total = calls.pointwise("add.Tensor", total, other=wide)
    return total


# Kind of anchor: its partial results, and from these the whole one in f32.
Partial = Callable[[BodyBuilder, Node, int], tuple[Value, ...]]
Finish = Callable[[BodyBuilder, Node, tuple[Value, ...]], Value]
FORMS: dict[str, tuple[Partial, Finish]] = {
    "gemm": (_product, _product_sum),
    "conv": (_convolution, _convolution_sum),
    "attention": (split_attention, combine_attention),
}
