"""Axes that the calls of a graph treat independently: position by position, or range by range, results depend on the
same positions of operands alone. Along such an axis a graph can be run in pieces.

A rule says for a call which axes of its operands and results go together; all others are read as a whole, or made as
one. What goes together in calls that follow each other is one family of axes. A call without a rule has no such axes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_map, attr_values, contiguous
from torch_rtx.op_work import (
    ANCHORS,
    ATTENTION,
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    ATTENTION_PARTIAL,
    GROUPED_MM,
    PRODUCTS,
    SCALED_MM,
    SDPA,
)
from torch_rtx.runtime.streaming import numbers

VIEW = "aten.view.default"


@dataclass(frozen=True)
class Family:
    """Axes that are cut together.

    Attributes:
        axes: by the name of each value that has one.
        units: the largest number of equal parts that all of them have.
    """

    axes: dict[str, int]
    units: int


def families(graph: Graph, results: Iterable[Value]) -> list[Family]:
    """The families that have one axis of each of `results`, of a static graph without kernel nodes that computes
    nothing else."""
    root: dict[Axis, Axis] = {}
    whole = set[Axis]()
    sizes = {value.name: shape_of(value) for value in graph.values()}

    def find(axis: Axis) -> Axis:
        while (up := root.setdefault(axis, axis)) != axis:
            axis = up
        return axis

    for node in graph.nodes:
        call = _Call(node)
        covered = set[tuple[int, int]]()
        for together in _rule(call):
            places = [(one, axis) for one, axis in together if one.shape[axis] > 1]
            covered.update((id(one), axis) for one, axis in places)
            sizes |= {one.name: one.shape for one, _ in places}
            for (one, a), (other, b) in pairwise(places):
                root[find((one.name, a))] = find((other.name, b))
        for one in (*call.operands, *call.results):
            whole.update((one.name, axis) for axis in range(len(one.shape)) if (id(one), axis) not in covered)
    mixed, members = {find(axis) for axis in whole if sizes[axis[0]][axis[1]] > 1}, dict[Axis, list[Axis]]()
    for name, shape in sizes.items():
        for axis in range(len(shape)):
            members.setdefault(find((name, axis)), []).append((name, axis))
    found = []
    for key, axes in members.items():
        family = dict(axes)
        units = math.gcd(*(sizes[name][axis] for name, axis in axes))
        if key not in mixed and units > 1 and len(family) == len(axes) and all(one.name in family for one in results):
            found.append(Family(family, units))
    return found


Axis = tuple[str, int]  # of the value with this name


def cut(graph: Graph, family: Family, units: int) -> Graph:
    """`graph` for so many of a family's units."""

    def value(v: Value) -> Value:
        axis = family.axes.get(v.name)
        if axis is None or not isinstance(v.type, TensorType):
            return v
        shape = list(numbers(v.type.shape))
        shape[axis] = shape[axis] // family.units * units
        return replace(v, type=replace(v.type, shape=tuple(shape), strides=_dense(shape, numbers(v.type.strides))))

    def node(n: Node) -> Node:
        outputs = tuple(None if v is None else value(v) for v in n.outputs)
        args = n.map_inputs(value)
        if n.results and n.results[0].name in family.axes:
            assert outputs[0] is not None
            sizes = shape_of(outputs[0])
            args = tuple((key, sizes if _is_size(n.op, key) else attr) for key, attr in args)
            if family.axes[n.results[0].name] == 1 and isinstance(groups := n.arg("num_groups"), int):
                args = tuple((key, groups // family.units * units if key == "num_groups" else a) for key, a in args)
            if _name(n.op).startswith("squeeze"):  # which would drop an axis of one unit, too
                return replace(n, op=VIEW, args=(args[0], ("size", sizes)), outputs=outputs)
        return replace(n, args=args, outputs=outputs)

    inputs, outputs = tuple(map(value, graph.inputs)), tuple(attr_map(output, value) for output in graph.outputs)
    return replace(graph, inputs=inputs, nodes=tuple(map(node, graph.nodes)), outputs=outputs)


def _is_size(op: str, key: str) -> bool:
    """Whether an argument is the shape of the result."""
    return _name(op) in SIZED and key in ("size", "shape", "input_sizes")


def _dense(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, in the order of other ones."""
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
    dense = contiguous(tuple(shape[axis] for axis in order))
    found = dict(zip(order, numbers(dense), strict=True))
    return tuple(found[axis] for axis in range(len(shape)))


def is_constant(node: Node) -> bool:
    """Whether a call without operands makes the same number everywhere, so that any part is like all others."""
    return RULES.get(_name(node.op)) is _filled


def shape_of(value: Value) -> tuple[int, ...]:
    """The sizes of a value with a static type; none of a number."""
    return tuple(numbers(value.type.shape)) if isinstance(value.type, TensorType) else ()


# ---- rules -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Tensor:
    """An operand or result of a call; a value that is two operands is two of these."""

    name: str
    shape: tuple[int, ...]


Together = Sequence[tuple[_Tensor, int]]  # axes of one call that go together


class _Call:
    def __init__(self, node: Node) -> None:
        self.node, self.name = node, _name(node.op)
        self.given: dict[str, list[_Tensor]] = {}
        for key, attr in node.args:
            self.given[key] = [_Tensor(value.name, shape_of(value)) for value in attr_values(attr)]
        self.operands = [one for given in self.given.values() for one in given]
        self.results = [_Tensor(value.name, shape_of(value)) for value in node.results]

    def get(self, name: str) -> _Tensor | None:
        """The operand `name`."""
        return next(iter(self.given.get(name, ())), None)

    def arg(self, name: str) -> Attr:
        """The argument `name`, or its default in the schema."""
        for key, attr in self.node.args:
            if key == name:
                return attr
        arguments = aten.overload(self.node.op)._schema.arguments
        found = next((one.default_value for one in arguments if one.name == name), None)
        return tuple(found) if isinstance(found, list) else found

    def dims(self, rank: int) -> set[int]:
        """The dims that the call names; all, if none."""
        name = next((name for name in ("dim", "dims") if self.arg(name) not in (None, ())), "")
        found = self.arg(name) if name else tuple(range(rank))
        return {dim % max(rank, 1) for dim in (found if isinstance(found, tuple) else (found,)) if isinstance(dim, int)}


Rule = Callable[[_Call], Iterator[Together]]


def _aligned(result: _Tensor, axis: int, operands: Iterable[_Tensor | None]) -> list[tuple[_Tensor, int]]:
    """An axis of a result, with those of operands that are broadcast to it."""
    back, found = axis - len(result.shape), [(result, axis)]
    for one in operands:
        if one is not None and -back <= len(one.shape) and one.shape[back] == result.shape[axis]:
            found.append((one, len(one.shape) + back))
    return found


def _elementwise(call: _Call) -> Iterator[Together]:
    """Each element by itself, operands broadcast."""
    first, *others = call.results
    for axis in range(len(first.shape)):
        if all(other.shape == first.shape for other in others):
            yield [*_aligned(first, axis, call.operands), *((other, axis) for other in others)]


def _filled(call: _Call) -> Iterator[Together]:
    """Constants: an operand only says of which type."""
    for one in (*call.results, *call.operands):
        yield from ([(one, axis)] for axis in range(len(one.shape)))


def _beside(call: _Call) -> Iterator[Together]:
    """All but the dims that the call names, which results have or have not."""
    first = call.operands[0]
    rank = len(first.shape)
    dims = call.dims(rank)
    kept = [axis for axis in range(rank) if axis not in dims]
    same = [one for one in call.operands if len(one.shape) == rank]
    for place, axis in enumerate(kept):
        together = [(one, axis) for one in same]
        for one in call.results:
            together.append((one, axis if len(one.shape) == rank else place))
        ranks = {len(one.shape) for one in call.results}
        if ranks <= {rank, len(kept)} and len({one.shape[at] for one, at in together}) == 1:
            yield together


def _leading(last: int) -> Rule:
    """All but the last axes."""

    def rule(call: _Call) -> Iterator[Together]:
        tensors = (*call.operands, *call.results)
        for axis in range(len(call.operands[0].shape) - last):
            if len({one.shape[axis : axis + 1] for one in tensors}) == 1:
                yield [(one, axis) for one in tensors]

    return rule


def _padded(call: _Call) -> Iterator[Together]:
    """All that is not padded."""
    pad, rank = call.arg("pad"), len(call.operands[0].shape)
    assert isinstance(pad, tuple)
    for axis in range(rank - len(pad) // 2):
        yield [(call.operands[0], axis), (call.results[0], axis)]


def _regrouped(call: _Call) -> Iterator[Together]:
    """The same elements in the same order: the outermost of axes that become other ones."""
    old, new = call.operands[0], call.results[0]
    pairs: list[list[int]] = [[], []]
    counts = [1, 1]
    rest = [[axis for axis, size in enumerate(one.shape) if size != 1] for one in (old, new)]
    if 0 in old.shape:
        return
    while rest[0] or rest[1]:
        side = 0 if rest[0] and (counts[0] <= counts[1] or not rest[1]) else 1
        axis = rest[side].pop(0)
        pairs[side].append(axis)
        counts[side] *= (old, new)[side].shape[axis]
        if counts[0] == counts[1]:
            yield [(old, pairs[0][0]), (new, pairs[1][0])]
            pairs, counts = [[], []], [1, 1]


def _permuted(call: _Call) -> Iterator[Together]:
    given, made = call.operands[0], call.results[0]
    rank = len(given.shape)
    order = list(range(rank))
    if call.name in ("permute", "permute_copy"):
        dims = call.arg("dims")
        assert isinstance(dims, tuple)
        order = [dim % rank for dim in dims if isinstance(dim, int)]
    elif rank > 1:
        a, b = (call.arg("dim0"), call.arg("dim1")) if "transpose" in call.name else (0, 1)
        assert isinstance(a, int)
        assert isinstance(b, int)
        order[a], order[b] = order[b], order[a]
    for axis, source in enumerate(order):
        yield [(given, source), (made, axis)]


def _expanded(call: _Call) -> Iterator[Together]:
    for axis in range(len(call.results[0].shape)):
        yield _aligned(call.results[0], axis, call.operands)


def _stacked(call: _Call) -> Iterator[Together]:
    (made,) = call.results
    (dim,) = call.dims(len(made.shape))
    for axis in range(len(made.shape)):
        if axis != dim:
            yield [(made, axis), *((one, axis - (axis > dim)) for one in call.operands)]


def _looked_up(call: _Call) -> Iterator[Together]:
    """`embedding`: rows of a table."""
    table, indices, made = call.get("weight"), call.get("indices"), call.results[0]
    assert table is not None
    assert indices is not None
    yield [(made, len(made.shape) - 1), (table, 1)]
    for axis in range(len(indices.shape)):
        yield [(made, axis), (indices, axis)]


def _indexed(call: _Call) -> Iterator[Together]:
    """Advanced indexing by integers: what is not indexed, and, of new tensors, positions of the indices."""
    given, made = call.get("self"), call.results[0]
    indices = call.node.arg("indices")
    assert isinstance(indices, tuple)
    assert given is not None
    types = [one.type for one in indices if isinstance(one, Value)]
    if any(isinstance(type_, TensorType) and type_.dtype in ("bool", "u8") for type_ in types):
        return
    places = [place for place, one in enumerate(indices) if one is not None]
    listed = call.given["indices"]
    rank = max(len(one.shape) for one in listed)
    front = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    kept = [axis for axis in range(len(given.shape)) if axis not in places]
    puts = call.get("values")
    picked = len(kept) + rank  # the rank of what is read or put
    for place, axis in enumerate(kept):
        at = place if place < front else place + rank
        if puts is None:
            yield [(given, axis), (made, at)]
        elif len(puts.shape) >= picked - at and puts.shape[at - picked] == given.shape[axis]:
            yield [(given, axis), (made, axis), (puts, len(puts.shape) + at - picked)]
        elif len(puts.shape) < picked - at or puts.shape[at - picked] == 1:
            yield [(given, axis), (made, axis)]
    for axis in range(rank if puts is None else 0):
        size, back = made.shape[front + axis], axis - rank
        those = [(one, len(one.shape) + back) for one in listed if len(one.shape) >= -back and one.shape[back] == size]
        yield [(made, front + axis), *those]


def _product(call: _Call) -> Iterator[Together]:
    names, made = PRODUCTS[call.node.op], call.results[0]
    first, second, added = (call.get(name) for name in names)
    assert first is not None
    assert second is not None
    rank = len(made.shape)
    more = [added] * bool(names.added)
    if call.node.op == SCALED_MM:
        scales = [call.node.arg(name) for name in ("scale_a", "scale_b")]
        if any(not isinstance(one, Value) or not str(one.type).startswith(("f32", "f64")) for one in scales):
            return  # scales of blocks
        more += [call.get("scale_a"), call.get("scale_b")]
    if call.node.op == GROUPED_MM:
        yield [(made, rank - 1), (second, len(second.shape) - 1)]
    elif call.name == "linear":
        if len(second.shape) == 2:
            yield from (_aligned(made, axis, [first, *more]) for axis in range(rank - 1))
            yield [*_aligned(made, rank - 1, more), (second, 0)]
    elif min(len(first.shape), len(second.shape)) > 1:
        yield [*_aligned(made, rank - 1, more), (second, len(second.shape) - 1)]
        yield [*_aligned(made, rank - 2, more), (first, len(first.shape) - 2)]
        yield from (_aligned(made, axis, [first, second, *more]) for axis in range(rank - 2))


def _convolution(call: _Call) -> Iterator[Together]:
    given, weight, made = call.get("input"), call.get("weight"), call.results[0]
    assert given is not None
    assert weight is not None
    if len(given.shape) != len(weight.shape):
        return
    yield [(made, 0), (given, 0)]
    if call.arg("groups") == 1:
        bias = call.get("bias")
        yield [(made, 1), (weight, 1 if call.arg("transposed") is True else 0), *([(bias, 0)] if bias else ())]


def _attention(call: _Call) -> Iterator[Together]:
    """Batches and heads; in inference also queries, unless their positions count."""
    query, key = call.get("query"), call.get("key")
    assert query is not None
    assert key is not None
    rank = len(query.shape)
    tensors = [one for one in (*call.operands, *call.results) if math.prod(one.shape)]  # all that is asked for
    short = [*call.given.get("logsumexp", ())]  # without a last axis
    if call.node.op in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
        short += [one for one in call.results if len(one.shape) == rank - 1]
    for axis in range(rank - 2):
        # Heads of queries that share one of keys follow each other.
        sizes = {query.shape[axis], *key.shape[axis - rank : axis - rank + 1]} - {1}
        places = [(one, len(one.shape) + axis - rank + (one in short)) for one in tensors]
        widths = [one.shape[at] if at >= 0 else 1 for one, at in places]
        is_shared = [width == 1 and one in call.operands for width, one in zip(widths, tensors, strict=True)]
        if all(width in sizes or shared for width, shared in zip(widths, is_shared, strict=True)):
            yield [place for place, width in zip(places, widths, strict=True) if width in sizes]
    if call.node.op in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
        return
    if call.arg("is_causal") is not True and not call.node.arg("band"):
        masks = [one for name in ("attn_mask", "bias", "sink") for one in call.given.get(name, ())]
        masks = [one for one in masks if one.shape[-2:-1] == query.shape[-2:-1]]
        yield [(one, len(one.shape) - 2) for one in (query, *masks, *call.results)]


def _sampled(call: _Call) -> Iterator[Together]:
    """`grid_sampler`: images by a grid for each."""
    image, grid, made = call.get("input"), call.get("grid"), call.results[0]
    assert image is not None
    assert grid is not None
    yield [(made, 0), (image, 0), (grid, 0)]
    yield [(made, 1), (image, 1)]


def _normalized(call: _Call) -> Iterator[Together]:
    """`layer_norm` and the like: all but the axes that are normalized."""
    given, dims = call.operands[0], call.arg("normalized_shape")
    assert isinstance(dims, tuple)
    for axis in range(len(given.shape) - len(dims)):
        yield [(one, axis) for one in (given, *call.results)]


def _normalized_groups(call: _Call) -> Iterator[Together]:
    """`group_norm`: images, and channels by whole groups."""
    given, made, groups = call.operands[0], call.results[0], call.arg("num_groups")
    assert isinstance(groups, int)
    yield [(given, 0), (made, 0)]
    if groups > 1:
        scales = [(one, 0) for one in call.operands[1:]]
        yield [(given, 1), (made, 1), *scales, (_Tensor(f"groups of {made.name}", (groups,)), 0)]


def _names(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


SIZED = frozenset(  # calls with the shape of the result among their arguments
    ("view", "_unsafe_view", "view_copy", "reshape", "expand", "expand_copy", "full", "zeros", "ones")
) | {"new_full", "new_zeros", "new_ones", "select_backward", "slice_backward"}
RULES: dict[str, Rule] = {
    **_names("_to_copy clone alias detach lift_fresh copy fill floor_divide rsub masked_fill hardswish", _elementwise),
    **_names("elu_backward hardsigmoid_backward hardswish_backward hardtanh_backward", _elementwise),
    **_names("leaky_relu_backward log_sigmoid_backward mish_backward softplus_backward", _elementwise),
    **_names("full_like zeros_like ones_like", _elementwise),
    **_names("full new_full new_zeros new_ones zeros ones", _filled),
    **_names("sum mean amax amin argmax argmin any all prod logsumexp var std var_mean max min", _beside),
    **_names("linalg_vector_norm softmax log_softmax _softmax _log_softmax", _beside),
    **_names("_softmax_backward_data _log_softmax_backward_data", _beside),
    **_names("cumsum cumprod cummax cummin logcumsumexp select slice flip roll split split_with_sizes", _beside),
    **_names("unsafe_split unbind cat gather scatter scatter_add scatter_reduce index_select index_copy", _beside),
    **_names("index_add index_fill slice_scatter slice_backward glu sort topk", _beside),
    **_names("view _unsafe_view reshape squeeze unsqueeze", _regrouped),
    **_names("permute transpose t", _permuted),
    **_names("expand", _expanded),
    **_names("stack select_backward", _stacked),
    **_names("tril triu", _leading(2)),
    **_names("pixel_shuffle pixel_unshuffle", _leading(3)),
    **_names("constant_pad_nd", _padded),
    **_names("embedding", _looked_up),
    **_names("index _unsafe_index index_put _unsafe_index_put", _indexed),
    **_names("layer_norm rms_norm native_layer_norm", _normalized),
    **_names("group_norm", _normalized_groups),
    **_names("grid_sampler grid_sampler_2d grid_sampler_3d", _sampled),
}
SPATIAL = re.compile(
    r"(_adaptive_avg_pool|adaptive_avg_pool|avg_pool|max_pool|_upsample_nearest_exact|upsample_[a-z]+|reflection_pad"
    r"|replication_pad)(\d)d(_with_indices(_backward)?)?"
)


def _rule(call: _Call) -> Iterable[Together]:
    """Which axes of a call go together."""
    node = call.node
    is_empty = any(0 in one.shape for one in (*call.operands, *call.results[: node.op != ATTENTION_BACKWARD]))
    if node.kind == "fallback" or not call.results or is_empty:
        return ()
    overload = aten.overload(node.op)
    if aten.draws(node):
        return ()
    if node.op in PRODUCTS:
        return _product(call)
    if node.op in (SDPA, ATTENTION, ATTENTION_PARTIAL, ATTENTION_FORWARD, ATTENTION_BACKWARD):
        return _attention(call)
    if ANCHORS.get(node.op) == "conv":
        return _convolution(call)
    if spatial := SPATIAL.fullmatch(call.name):
        return _leading(int(spatial[2]))(call)
    rule = RULES.get(call.name) or RULES.get(call.name.removesuffix("_copy"))
    if rule is not None:
        return rule(call)
    return _elementwise(call) if torch.Tag.pointwise in overload.tags else ()


def _name(op: str) -> str:
    return op.split(".")[1]
