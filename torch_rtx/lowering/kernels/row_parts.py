"""Split forms of reductions: rows that are too few to fill a chip, and long, are reduced in parts.

One kernel reduces each part by itself, a small one makes the whole of these, and a third computes what needs whole rows
for every element: as calls, a reduction is partial statistics, their total, and operations between tensors. Parts have
equal sizes, so that the mean of means is the mean, and the mean variance of the parts plus the variance of their means
is the variance (Chan, Golub and LeVeque, 1979): nothing is lost where the mean is large.

A row is cut where it is longest in memory. A group of channels of channels-last images is reduced over ranges of
positions, for each channel by itself, so that neighbouring threads read neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import ceil, prod
from typing import NamedTuple

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.kernels.calls import Calls, kernel, needed, type_of
from torch_rtx.lowering.kernels.cost import LATENCY, LAUNCH, bytes_of, chip, typical
from torch_rtx.lowering.kernels.loops import loop_configs
from torch_rtx.lowering.kernels.product import argument
from torch_rtx.lowering.kernels.region import ANCHORS, Region, express, reductions_of, tensor_type
from torch_rtx.lowering.kernels.tensor import Reduce, Tensor, children, everything, load, register

Dims = tuple[int, ...]
PART, SHORT_PART = (512, 4096), (64, 512)  # elements of a part; where threads read neighbours of a row, and where not
TOTAL = 4096  # partial results that one program makes the whole of, if parts need not be too long for that
NEIGHBOURS = 64  # elements in a run of memory that are read at full speed
STEP, SCATTERED = 2048, 4  # elements that take so many times longer to read where runs are shorter
RESIDENT = 6  # programs that a processor holds


# ---- where rows are cut ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the rows of an operand are cut.

    Attributes:
        order: its dimensions as they lie in memory, the outermost first.
        whole: dimensions that every part has all of.
        divided: the dimension that is cut, in ranges of `size`; None: parts are positions of others.
    """

    order: Dims
    whole: Dims
    divided: int | None
    size: int

    def length(self, type_: TensorType) -> int:
        """Elements of a part."""
        return prod(typical(type_.shape[axis]) for axis in self.whole) * self.size


def _longest(type_: TensorType, axes: Dims) -> tuple[Dims, Dims]:
    """The dimensions of an operand as they lie in memory, and those among them that are the longest piece of a row."""
    order = sorted(range(len(type_.shape)), key=lambda axis: typical(type_.strides[axis]), reverse=True)
    present = [axis for axis in order if type_.shape[axis] != 1]
    runs = [tuple(run) for reduced, run in groupby(present, key=lambda axis: axis in axes) if reduced]
    if not runs:
        raise Unsupported("rows of one element in parts")
    return tuple(order), max(runs, key=lambda run: _elements(type_, run))


def _elements(type_: TensorType, axes: Iterable[int]) -> int:
    return prod(typical(type_.shape[axis]) for axis in axes)


def _place(type_: TensorType, axes: Dims, parts: int) -> Place:
    """Where to cut, in about `parts` parts or more: sizes have to be known and to divide."""
    order, run = _longest(type_, axes)
    limit = _elements(type_, run) // parts
    whole: list[int] = []
    length = 1
    for axis in reversed(run):
        size = type_.shape[axis]
        if not isinstance(size, int):
            break
        fits = max((d for d in range(1, limit // length + 1) if size % d == 0), default=1)
        if fits != size:
            return Place(order, tuple(whole), axis if fits > 1 else None, fits)
        whole.append(axis)
        length *= size
    return Place(order, tuple(whole), None, 1)


@dataclass(frozen=True)
class Cut:
    """An operand whose rows are in parts.

    Attributes:
        value: it, as it lies in memory, with one more dimension where one is cut.
        chunk: the dimensions that a part has.
        rest: those that are reduced after these.
        back: the permutation that undoes the order in memory.
        shape: that of a result: 1 in the place of what is reduced.
    """

    value: Value
    chunk: Dims
    rest: Dims
    back: Dims
    shape: tuple[Dim, ...]

    def finished(self, calls: Calls, total: Value) -> Value:
        """What `total`, reduced over everything, is in the order of the operand's dimensions."""
        return calls.reshaped(calls.permuted(total, self.back), self.shape)


def _cut(calls: Calls, operand: Value, axes: Dims, parts: int) -> Cut:
    type_ = type_of(operand)
    at = _place(type_, axes, parts)
    value, origin = operand, list(range(len(type_.shape)))
    if at.divided is not None:
        size = type_.shape[at.divided]
        assert isinstance(size, int)
        value = calls.divided(operand, at.divided, size // at.size)
        origin.insert(at.divided, at.divided)
    rank = {axis: place for place, axis in enumerate(at.order)}
    order = sorted(range(len(origin)), key=lambda dim: (rank[origin[dim]], dim))
    inner = {dim for dim in order if origin[dim] in at.whole}
    if at.divided is not None:
        inner.add(at.divided + 1)
    chunk = tuple(place for place, dim in enumerate(order) if dim in inner)
    rest = tuple(place for place, dim in enumerate(order) if origin[dim] in axes and dim not in inner)
    if not chunk or not rest:
        raise Unsupported("rows that have no equal parts")
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(type_.shape))
    return Cut(calls.permuted(value, order), chunk, rest, tuple(map(order.index, range(len(order)))), shape)


# ---- statistics: of a part, and of all parts -------------------------------------------------------------------------

Values = tuple[Value, ...]


class Statistic(NamedTuple):
    """What is known of a row: of each part of it, and of the whole of these. Dimensions that are reduced stay, with
    size 1."""

    partial: Callable[[Calls, Value, Dims], Values]
    total: Callable[[Calls, Values, Dims, int], Values]  # the last argument: the elements of a part


def _reduced(calls: Calls, op: str, value: Value, dims: Dims, dtype: str = "", **args: Attr) -> Value:
    return calls.call(op, _without(value, dims, dtype), **{"self": value, **args, "dim": dims, "keepdim": True})


def _without(value: Value, dims: Dims, dtype: str = "") -> TensorType:
    old = type_of(value)
    shape = tuple(1 if axis in dims else size for axis, size in enumerate(old.shape))
    return TensorType(dtype or old.dtype, shape, contiguous(shape))


def _again(op: str, **args: Attr) -> Statistic:
    """Of a reduction that parts can be put together by."""
    dtype = "bool" if op[:3] in ("any", "all") else ""

    def once(calls: Calls, value: Value, dims: Dims) -> Value:
        return _reduced(calls, op, value, dims, dtype, **args)

    return Statistic(
        lambda calls, value, dims: (once(calls, value, dims),),
        lambda calls, parts, dims, length: (once(calls, parts[0], dims),),
    )


def _variance_mean(calls: Calls, value: Value, dims: Dims) -> Values:
    types = [_without(value, dims)] * 2
    return calls.calls("var_mean.correction", types, self=value, dim=dims, correction=0, keepdim=True)


def _moments(calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    """Variance and mean of rows, from those of their parts."""
    variance, mean = parts
    between, whole = _variance_mean(calls, mean, dims)
    within = _reduced(calls, "mean.dim", variance, dims)
    return calls.same("add.Tensor", within, other=between), whole


def _exponentials(calls: Calls, value: Value, dims: Dims) -> Values:
    """The maximum, and the sum of exponentials of what is less than it. It is finite at least, so that parts that are
    minus infinity are 0."""
    least = -1.7976931348623157e308 if type_of(value).dtype == "f64" else -3.4028234663852886e38
    largest = calls.same("clamp.default", _reduced(calls, "amax.default", value, dims), min=least)
    power = calls.same("exp.default", calls.same("sub.Tensor", value, other=largest))
    return largest, _reduced(calls, "sum.dim_IntList", power, dims)


def _sum_of_exponentials(calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    largest, total = parts
    whole = _reduced(calls, "amax.default", largest, dims)
    scale = calls.same("exp.default", calls.same("sub.Tensor", largest, other=whole))
    return whole, _reduced(calls, "sum.dim_IntList", calls.same("mul.Tensor", total, other=scale), dims)


def _extreme(op: str, calls: Calls, value: Value, dims: Dims) -> Values:
    """The extreme and where it is, along one dimension."""
    types = _without(value, dims), _without(value, dims, "i64")
    return calls.calls(op, types, self=value, dim=dims[0], keepdim=True)


def _extreme_of_parts(op: str, calls: Calls, parts: Values, dims: Dims, length: int) -> Values:
    found, which = _extreme(op, calls, parts[0], dims)
    inside = calls.call("gather.default", type_of(which), self=parts[1], dim=dims[0], index=which)
    return found, calls.same("add.Tensor", calls.same("mul.Scalar", which, other=length), other=inside)


MOMENTS = Statistic(_variance_mean, _moments)
EXPONENTIALS = Statistic(_exponentials, _sum_of_exponentials)
EXTREMES = {
    kind: Statistic(partial(_extreme, f"{kind}.dim"), partial(_extreme_of_parts, f"{kind}.dim"))
    for kind in ("max", "min")
}


# ---- operators as statistics and what is made of these ---------------------------------------------------------------


class Rule(NamedTuple):
    """An operator as a statistic of its rows.

    Attributes:
        operand: what is reduced, in the dtype of registers, and over which dimensions.
        statistic: of the rows.
        finish: calls that compute the node's results of the operand and the whole statistic.
    """

    operand: Callable[[Calls, Node], tuple[Value, Dims]]
    statistic: Callable[[Node], Statistic]
    finish: Callable[[Calls, Node, Value, Values], None]


def _wide(calls: Calls, node: Node, name: str = "self") -> tuple[Value, Dims]:
    """An operand, and the dimensions `dim` of it; all, if there are none."""
    value, dim = argument(node, name), node.arg("dim")
    (result, *_) = (type_of(value) for value in node.outputs if value is not None)
    rank = len(type_of(value).shape)
    axes = (dim,) if isinstance(dim, int) else dim if isinstance(dim, tuple) else ()
    known = tuple(axis % rank for axis in axes if isinstance(axis, int)) or tuple(range(rank))
    kept = result.dtype == "bool" or node.op in POSITIONS
    return (value if kept else calls.cast(value, register(result.dtype))), known


def _results(calls: Calls, node: Node, found: Iterable[Value]) -> None:
    """Gives the results of `node`, as far as anyone needs them, what was found."""
    for result, value in zip(node.outputs, found, strict=True):
        if result is not None:
            type_ = type_of(result)
            shaped = calls.reshaped(value, type_.shape) if type_of(value).shape != type_.shape else value
            op, args = ("_to_copy", {"dtype": type_.dtype}) if type_of(value).dtype != type_.dtype else ("clone", {})
            calls.call(f"{op}.default", type_, self=shaped, **args)
            calls.ends_in(result)


def _plain(op: str, **names: Attr) -> Rule:
    def statistic(node: Node) -> Statistic:
        return _again(op, **{name: node.arg(name, default) for name, default in names.items()})

    return Rule(_wide, statistic, lambda calls, node, _, stats: _results(calls, node, stats))


def _variance(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    variance, mean = stats
    shape, axes = type_of(operand).shape, _wide(Calls(set()), node)[1]
    count = dim_expr("*", 1, *(shape[axis] for axis in axes))
    correction = node.arg("correction")
    correction = 1 if correction is None else correction
    if not isinstance(count, int) or not isinstance(correction, int | float) or count <= correction:
        raise Unsupported(f"the variance of {count} elements in parts")
    variance = calls.same("mul.Scalar", variance, other=count / max(count - correction, 1e-300))
    if node.op.startswith("aten.std"):
        variance = calls.same("sqrt.default", variance)
    _results(calls, node, (variance, mean)[: len(node.outputs)])


def _softmax(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    largest, total = stats
    value = calls.same("sub.Tensor", operand, other=largest)
    if "log" in node.op:
        found = calls.same("sub.Tensor", value, other=calls.same("log.default", total))
    else:
        found = calls.same("div.Tensor", calls.same("exp.default", value), other=total)
    _results(calls, node, (found,))


def _along(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """The operand of a search along one dimension."""
    operand, axes = _wide(calls, node)
    if len(axes) != 1:
        raise Unsupported("the place of an extreme in several dimensions")
    return operand, axes


def _place_of_extreme(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    _results(calls, node, stats[2 - len(node.outputs) :])


def _trailing(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """The operand of a norm over the last dimensions."""
    value, sizes = argument(node, "input"), node.arg("normalized_shape")
    assert isinstance(sizes, tuple)
    rank = len(type_of(value).shape)
    return calls.cast(value, register(type_of(value).dtype)), tuple(range(rank - len(sizes), rank))


def _grouped(calls: Calls, node: Node) -> tuple[Value, Dims]:
    """Images, or the like, with groups of channels in the place of channels: [batch, groups, channels, ...]."""
    value, groups = argument(node, "input"), node.arg("num_groups")
    assert isinstance(groups, int)
    grouped = calls.divided(value, 1, groups)
    rank = len(type_of(grouped).shape)
    return calls.cast(grouped, register(type_of(value).dtype)), tuple(range(2, rank))


def _scale(calls: Calls, node: Node, variance: Value, least: float) -> Value:
    eps = node.arg("eps", least)
    return calls.same("rsqrt.default", calls.same("add.Scalar", variance, other=least if eps is None else eps))


def _affine(calls: Calls, node: Node, value: Value, trailing: int = 0) -> Value:
    """`value` times the weight plus the bias of a norm, which lie before `trailing` dimensions."""
    for name, op in (("weight", "mul.Tensor"), ("bias", "add.Tensor")):
        factor = node.arg(name)
        if isinstance(factor, Value):
            wide = calls.cast(factor, type_of(value).dtype)
            value = calls.same(op, value, other=calls.reshaped(wide, (*type_of(wide).shape, *[1] * trailing)))
    return value


def _standardized(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    """Layer norms and group norms, and, for those that have them as results, the mean and the scale."""
    variance, mean = stats
    scale = _scale(calls, node, variance, 1e-5)
    value = calls.same("mul.Tensor", calls.same("sub.Tensor", operand, other=mean), other=scale)
    trailing = 0
    if node.op == GROUP_NORM:
        value = calls.reshaped(value, type_of(argument(node, "input")).shape)
        trailing = len(type_of(value).shape) - 2
    _results(calls, node, (_affine(calls, node, value, trailing), mean, scale)[: len(node.outputs)])


def _squares(node: Node) -> Statistic:
    """The mean of squares."""
    mean = _again("mean.dim")
    return mean._replace(
        partial=lambda calls, value, dims: mean.partial(calls, calls.same("mul.Tensor", value, other=value), dims)
    )


def _rms(calls: Calls, node: Node, operand: Value, stats: Values) -> None:
    least = 2.220446049250313e-16 if type_of(operand).dtype == "f64" else 1.1920928955078125e-07
    scale = _scale(calls, node, stats[0], least)
    value = calls.same("mul.Tensor", operand, other=scale)
    _results(calls, node, (_affine(calls, node, value), scale)[: len(node.outputs)])


GROUP_NORM = "aten.group_norm.default"
POSITIONS = {"aten.argmax.default": "max", "aten.max.dim": "max", "aten.argmin.default": "min", "aten.min.dim": "min"}
AGAIN = {
    **dict.fromkeys(("aten.sum.default", "aten.sum.dim_IntList"), _plain("sum.dim_IntList")),
    **dict.fromkeys(("aten.mean.default", "aten.mean.dim"), _plain("mean.dim")),
    **dict.fromkeys(("aten.amax.default", "aten.max.default"), _plain("amax.default")),
    **dict.fromkeys(("aten.amin.default", "aten.min.default"), _plain("amin.default")),
    **dict.fromkeys((f"aten.any.{which}" for which in ("default", "dim", "dims")), _plain("any.dims")),
    **dict.fromkeys((f"aten.all.{which}" for which in ("default", "dim", "dims")), _plain("all.dims")),
    "aten.linalg_vector_norm.default": _plain("linalg_vector_norm.default", ord=2),
    "aten.logsumexp.default": _plain("logsumexp.default"),
}
SOFTMAX = Rule(_wide, lambda node: EXPONENTIALS, _softmax)
RULES: Mapping[str, Rule] = {
    **AGAIN,
    **{f"aten.{name}.correction": Rule(_wide, lambda node: MOMENTS, _variance) for name in ("var", "std", "var_mean")},
    **{f"aten.{name}": SOFTMAX for name in ("softmax.int", "_softmax.default")},
    **{f"aten.{name}": SOFTMAX for name in ("log_softmax.int", "_log_softmax.default")},
    **{op: Rule(_along, lambda node: EXTREMES[POSITIONS[node.op]], _place_of_extreme) for op in POSITIONS},
    **dict.fromkeys(
        ("aten.layer_norm.default", "aten.native_layer_norm.default"),
        Rule(_trailing, lambda node: MOMENTS, _standardized),
    ),
    **dict.fromkeys(("aten.rms_norm.default", "aten._fused_rms_norm.default"), Rule(_trailing, _squares, _rms)),
    GROUP_NORM: Rule(_grouped, lambda node: MOMENTS, _standardized),
}


# ---- the form --------------------------------------------------------------------------------------------------------


def rows_in_parts(body: Graph, name: str, parts: int) -> Graph:
    """`body`, of the kernel `name`, with the rows that it reduces in about `parts` parts.

    Raises:
        Unsupported: a reduction that has no such form, or rows that have no equal parts.
    """
    return _Form(body, name, parts).graph()


class _Begun(NamedTuple):
    """A reduction of which there are partial results."""

    node: Node
    operand: Value
    cut: Cut
    results: Values


class _Form:
    """The kernels of a split body.

    Attributes:
        pool: nodes whose results are in no memory yet.
        memory: the values that kernels can read.
        open: the reductions that have no kernels yet.
    """

    def __init__(self, body: Graph, name: str, parts: int) -> None:
        self.body, self.name, self.parts = body, name, parts
        self.taken = {value.name for value in body.values()} | body.syms.keys()
        self.pool, self.memory = list(body.nodes), list(body.inputs)
        self.open = [node for node in self.pool if reduces(node)]
        self.kernels: list[Node] = []

    def graph(self) -> Graph:
        """The split body."""
        while ready := [node for node in self.open if not self._is_late(node.inputs)]:
            self.open = [node for node in self.open if node not in ready]
            self._level(ready)
        if not self.kernels:
            raise Unsupported("a split form without an anchor or rows")
        if left := self._left():
            self._kernel("rest", left)
        return Graph("import", self.body.inputs, nodes=tuple(self.kernels), outputs=self.body.outputs)

    def _left(self) -> list[Value]:
        """The outputs that are in no memory yet."""
        outputs = {value.name: value for value in attr_values(self.body.outputs)}
        return [value for value in outputs.values() if value not in self.memory]

    def _is_late(self, values: Iterable[Value]) -> bool:
        """Whether a reduction that is open comes before `values`."""
        return any(node in self.open for node in needed(self.pool, values))

    def _level(self, ready: list[Node]) -> None:
        """The two kernels of reductions that do not need each other."""
        begun = [self._begin(node) for node in ready]
        results = [value for one in begun for value in one.results]
        before = needed(self.pool, results)
        whole = _elements_of(begun[0].operand)
        stored = [value for value in self._left() if _elements_of(value) == whole]
        stored = [value for value in stored if all(node in before for node in needed(self.pool, [value]))]
        self._kernel("parts", [*results, *stored])
        totals = [value for one in begun for value in self._finish(one)]
        rows = _elements_of(totals[0])
        ends = [value for value in self._left() if _elements_of(value) == rows and not self._is_late([value])]
        kept = {value.name for value in ends}
        after = needed(self.pool, [value for value in self._left() if value.name not in kept])
        read = {value.name for node in after for value in node.inputs}
        self._kernel("sum", [*(value for value in totals if value.name in read), *ends])

    def _begin(self, node: Node) -> _Begun:
        """Puts the calls of partial results before `node`."""
        if node.op not in RULES:
            raise Unsupported(f"{node.op} in parts", loc=node.loc)
        rule, calls = RULES[node.op], Calls(self.taken)
        operand, axes = rule.operand(calls, node)
        cut = _cut(calls, operand, axes, self.parts)
        results = rule.statistic(node).partial(calls, cut.value, cut.chunk)
        at = self._position(node)
        self.pool[at:at] = calls.nodes
        return _Begun(node, operand, cut, results)

    def _finish(self, begun: _Begun) -> Values:
        """Puts the calls of what is made of partial results in the place of their node; returns the totals."""
        node, cut = begun.node, begun.cut
        rule, calls = RULES[node.op], Calls(self.taken)
        length = prod(size for size in (type_of(cut.value).shape[axis] for axis in cut.chunk) if isinstance(size, int))
        found = rule.statistic(node).total(calls, begun.results, cut.rest, length)
        totals = tuple(cut.finished(calls, total) for total in found)
        rule.finish(calls, node, begun.operand, totals)
        at = self._position(node)
        self.pool[at : at + 1] = calls.nodes
        return totals

    def _position(self, node: Node) -> int:
        return next(place for place, other in enumerate(self.pool) if other is node)

    def _kernel(self, kind: str, results: list[Value]) -> None:
        """A kernel that computes `results`, which are in memory from then on."""
        level = "" if len(self.kernels) < 2 or kind == "rest" else f"_{len(self.kernels) // 2}"
        name = f"{self.name}_{kind}{self.parts}{level}"
        self.kernels.append(kernel(name, self.memory, needed(self.pool, results), tuple(results)))
        self.memory += results
        names = {value.name for value in self.memory}
        outputs = [tuple(None if v is None or v.name in names else v for v in node.outputs) for node in self.pool]
        pairs = zip(self.pool, outputs, strict=True)
        self.pool = [node if left == node.outputs else replace(node, outputs=left) for node, left in pairs if any(left)]


def _elements_of(value: Value) -> Dim:
    return dim_expr("*", 1, *type_of(value).shape)


def reduces(node: Node) -> bool:
    """Whether `node` reduces rows, or runs along them."""
    if node.body is not None or node.op in ANCHORS:
        return False
    given: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    return any(isinstance(tensor, Reduce) for tensor in everything(express(node, given).values()))


# ---- where it is better ----------------------------------------------------------------------------------------------


def best_row_parts(found: Region, target: int, gain: float) -> int:
    """In about how many parts the rows that a region reduces are best cut; 1: in none, which is also the answer where
    the gain is less than `gain`."""
    node = next(filter(reduces, found.body.nodes), None)
    if not reductions_of(found.outputs) or node is None or node.op not in RULES:
        return 1
    operand, axes = RULES[node.op].operand(Calls(set()), node)
    type_, on = type_of(operand), chip(target)
    order, run = _longest(type_, axes)
    size, length = _elements(type_, axes), _elements(type_, run)
    every = _elements(type_, order)
    neighbours = run[-1] == [axis for axis in order if type_.shape[axis] != 1][-1]
    lengths = _powers(PART)[::-1] if neighbours else _powers(SHORT_PART)
    enough = [each for each in lengths if (every >= 2 * each * on.processors if neighbours else size <= each * TOTAL)]
    wanted = enough[0] if enough else lengths[-1]
    parts = max(ceil(length / (2 * wanted - 1)), 2)
    if 2 * _place(type_, axes, parts).length(type_) < wanted:
        return 1
    scattered = SCATTERED if not neighbours or length < NEIGHBOURS else 1
    whole, split = _times(found, every // size, size, scattered, target)
    return parts if split * gain <= whole else 1


def _powers(bounds: tuple[int, int]) -> list[int]:
    low, high = bounds
    return [low << more for more in range((high // low).bit_length())]


def _times(found: Region, rows: int, size: int, scattered: int, target: int) -> tuple[float, float]:
    """What one kernel takes, and what those of parts do: few programs wait for memory in each of their steps, which
    read a row once per level of reductions and once more for what comes after."""
    on, levels = chip(target), _levels(found.outputs)
    config = loop_configs(found)[0]
    results = [typical_elements(type_) for type_ in found.types]
    after = any(count > rows for count in results)
    steps = ceil(size / (STEP if scattered > 1 else config.elements))
    waves = ceil(ceil(rows / config.rows) / (on.processors * RESIDENT))
    passes = 1 if size <= config.elements else levels + after
    busy = waves * steps * passes * LATENCY * scattered
    moved = sum(map(bytes_of, [*map(tensor_type, found.body.inputs), *found.types])) / (on.memory * 1e3)
    return LAUNCH + max(busy, moved), (2 + after) * (LAUNCH + LATENCY) + 2 * moved


def typical_elements(type_: TensorType) -> int:
    return _elements(type_, range(len(type_.shape)))


def _levels(outputs: Iterable[Tensor]) -> int:
    """How many reductions come one after the other."""
    depth: dict[Tensor, int] = {}
    for tensor in everything(outputs):
        depth[tensor] = max((depth[child] for child in children(tensor)), default=0) + isinstance(tensor, Reduce)
    return max(depth.values())
