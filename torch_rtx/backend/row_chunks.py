"""Losses over a wide product by chunks of rows, so that the product never exists whole.

A language model's last layer makes logits, [tokens, vocabulary], of which a loss keeps a number per token. What depends
on them is often row by row: the loss, and, given the gradient of the loss, the gradients of the layer's input and
weight. Such a region of the joint graph becomes one call of the forward, which goes through the rows in chunks. It
computes the gradients as if that of the loss were 1; they are linear in it, and the backward multiplies them by it. So
there are as many products as before, and gradients of the size of the operands are saved instead of the logits.

Nothing here knows of softmax or of losses: a region has element-wise operations, reductions inside of rows, and the
products. It is left alone if anything else reads a value of the size of the logits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from torch_rtx.errors import Unsupported

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
LEAST_ROWS = 1024  # of a chunk: adding up the gradient of a weight would take a good part of the time of the products
PLACE = ("stack_trace", "nn_module_stack", "seq_nr")  # what says where in a model a node is from
MOST_PRODUCTS = 3  # of one layer: its result, and the gradients of its operands
VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
COPIES = {aten._to_copy.default, aten.clone.default}
REDUCTIONS = {
    aten.amax.default,
    aten.amin.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.logsumexp.default,
    aten.argmax.default,
}
ALONG = {aten.gather.default, aten.scatter.src, aten.scatter.value}
ZEROS = {aten.new_zeros.default, aten.zeros_like.default}
# Linear in the first argument.
LINEAR = (
    VIEWS
    | COPIES
    | {
        *(aten.neg.default, aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar, aten.expand.default, aten.t.default),
        *(aten.permute.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.tanh_backward.default),
    }
)


@dataclass(frozen=True)
class Operand:
    """A tensor from outside of a region.

    Attributes:
        shape: what it is reshaped to first, -1 for all rows; None: it stays as it is.
        axis: the dimension that counts the rows; None: every chunk reads all of it.
    """

    node: fx.Node
    axis: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Call:
    """A call for a chunk; its arguments may be nodes of the region and operands."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """How a node is computed for a chunk of rows, and where its value has these: in the first `dims` dimensions, which
    are one of a chunk. 0: it is the sum over all rows. With `turned`, in the last dimension of two."""

    call: Call
    dims: int = 1
    turned: bool = False


class RowChunks:
    """The call that computes the results of a region, in chunks of rows.

    Attributes:
        given: the nodes that it gets as arguments; the first one's first dimension counts the rows.
        results: the nodes whose values it returns.
    """

    __name__ = "row_chunks"
    __qualname__ = "RowChunks"

    def __init__(self, rows: dict[fx.Node, Rows], results: Sequence[fx.Node], first: fx.Node, chunks: int) -> None:
        self.rows, self.results, self.chunks = rows, list(results), chunks
        args = (arg for one in rows.values() for arg in pytree.tree_leaves((one.call.args, one.call.kwargs)))
        self.operands = list(dict.fromkeys(arg for arg in args if isinstance(arg, Operand)))
        self.given = list(dict.fromkeys([first, *(operand.node for operand in self.operands)]))

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.given, given, strict=True))
        whole = {
            one: values[one.node] if one.shape is None else values[one.node].reshape(one.shape) for one in self.operands
        }
        count = given[0].shape[0]
        found: dict[fx.Node, list[Tensor]] = {node: [] for node in self.results}
        for index in range(self.chunks):
            start = index * (count // self.chunks)
            length = count - start if index == self.chunks - 1 else count // self.chunks
            cut = {one: v if one.axis is None else v.narrow(one.axis, start, length) for one, v in whole.items()}
            chunk = self._chunk(cut)
            for node, parts in found.items():
                if self.rows[node].dims:
                    parts.append(chunk[node])
                else:
                    part = chunk[node].to(torch.promote_types(chunk[node].dtype, torch.float32))
                    parts[:] = [parts[0] + part if parts else part]
        return tuple(self._whole(node, parts) for node, parts in found.items())

    def _chunk(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """The values of all nodes for one chunk, from those of the operands."""
        for node, one in self.rows.items():
            args, kwargs = pytree.tree_map(
                lambda arg: values[arg] if isinstance(arg, fx.Node | Operand) else arg, (one.call.args, one.call.kwargs)
            )
            values[node] = one.call.target(*args, **kwargs)
        return values

    def _whole(self, node: fx.Node, parts: list[Tensor]) -> Tensor:
        dims, value = self.rows[node].dims, node.meta["val"]
        if not dims:
            return parts[0].to(value.dtype)
        return torch.cat(parts).reshape(_sizes(value.shape)) if dims > 1 else torch.cat(parts)


def _sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    """`shape` as numbers, -1 for what is not known."""
    found = tuple(size if isinstance(size, int) else -1 for size in shape)
    if found.count(-1) > 1:
        raise Unsupported("several sizes that are not known")
    return found


def _product(sizes: Sequence[Any]) -> Any:
    return math.prod(sizes)


class _Region:
    """What is row by row, of the rows of a product.

    Attributes:
        dependent: the nodes that depend on the product.
        rows: how those are computed for a chunk that can be; also nodes of the size of the product that do not depend
            on it, such as gradients that are the same for a whole row.
    """

    def __init__(self, first: fx.Node) -> None:
        self.first = first
        self.count, self.width = first.meta["val"].shape
        self.rows: dict[fx.Node, Rows] = {}
        self.dependent = {first}

    def grow(self, nodes: Sequence[fx.Node]) -> None:
        """Find all nodes that are row by row, among `nodes`, all nodes of the graph."""
        for node in nodes:
            depends = node is self.first or not self.dependent.isdisjoint(node.all_input_nodes)
            if depends:
                self.dependent.add(node)
            if not all(isinstance(one.meta.get("val"), Tensor) for one in (node, *self.operands(node))):
                continue
            try:
                if node.op == "call_function" and (depends or 2 * math.prod(self._leading(node)[1]) >= self.width):
                    self.rows[node] = self._rule(node)
            except Unsupported:
                continue

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands that are computed chunk by chunk."""
        if node is self.first:
            return []
        return [one for one in node.all_input_nodes if one in self.dependent or one in self.rows]

    def is_wide(self, node: fx.Node) -> bool:
        """A value of the size of the product."""
        found = self.rows.get(node)
        return found is not None and found.dims > 0 and 2 * self._rest(node, found) >= self.width

    def _rest(self, node: fx.Node, rows: Rows) -> Any:
        """Elements of a row."""
        shape = node.meta["val"].shape
        return shape[0] if rows.turned else _product(shape[rows.dims :])

    # ---- rules -------------------------------------------------------------------------------------------------------

    def _rule(self, node: fx.Node) -> Rows:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
            raise Unsupported(f"{target} by chunks of rows")
        if target in PRODUCTS:
            return self._product_rule(node)
        inputs = [self.rows.get(one) for one in self.operands(node)]
        if any(one is None or not one.dims for one in inputs):
            raise Unsupported("a value that is not row by row")
        if not inputs and target is not aten.expand.default and torch.Tag.pointwise not in target.tags:
            raise Unsupported("a value of other origin")
        turned = any(one.turned for one in inputs if one)
        if target is aten.t.default or (target is aten.permute.default and list(node.args[1]) == [1, 0]):  # type: ignore[arg-type]
            (source,) = self.operands(node)
            if self.rows[source].dims == 1 and source.meta["val"].dim() == 2:
                return Rows(Call(aten.t.default, (source,)), 1, not turned)
        if turned:
            raise Unsupported("columns")
        if target in ZEROS:
            return self._zeros(node)
        if target in VIEWS:
            dims, rest = self._leading(node)
            (source,) = self.operands(node)
            return Rows(Call(_reshape_rows, (source, rest)), dims)
        dims = max((one.dims for one in inputs if one), default=0) or self._leading(node)[0]
        if target in REDUCTIONS:
            return self._reduction(node, dims)
        if target in COPIES:
            return Rows(Call(target, node.args, _without_layout(node.kwargs)), dims)
        if target is aten.expand.default:
            source = self._aligned(node, node.args[0], dims)
            rest = _known(node.meta["val"].shape[dims:])
            return Rows(Call(_expand_rows, (_with_rows(source), rest)), dims)
        if target in ALONG or torch.Tag.pointwise in target.tags:
            args = pytree.tree_map(lambda arg: self._aligned(node, arg, dims), node.args)
            _with_rows(*pytree.tree_leaves(args))
            if target in ALONG:
                args = (args[0], self._moved(node, node.args[1], dims), *args[2:])
            return Rows(Call(target, args, node.kwargs), dims)
        raise Unsupported(f"{target} by chunks of rows")

    def _product_rule(self, node: fx.Node) -> Rows:
        """x @ w of rows x, or the sum over rows of x.T @ y."""
        *bias, one, two = node.args
        left, right = (self.rows.get(arg) for arg in (one, two))  # type: ignore[arg-type]
        if node is self.first or (left and left.dims == 1 and not left.turned and two not in self.dependent):
            source = Operand(one, 0) if node is self.first else one  # type: ignore[arg-type]
            if bias and (bias[0] in self.dependent or bias[0].meta["val"].dim() != 1):  # type: ignore[union-attr]
                raise Unsupported("a matrix that is added")
            return Rows(Call(node.target, (*(Operand(b) for b in bias), source, Operand(two)), node.kwargs))  # type: ignore[arg-type]
        if not bias and left and left.turned and two not in self.dependent:
            return Rows(Call(node.target, (one, Operand(two, 0))), 0)  # type: ignore[arg-type]
        if not bias and right and right.dims == 1 and not right.turned and one not in self.dependent:
            return Rows(Call(node.target, (Operand(one, 1), two)), 0)  # type: ignore[arg-type]
        raise Unsupported("a product of other operands")

    def _leading(self, node: fx.Node) -> tuple[int, tuple[int, ...]]:
        """How many dimensions count the rows, and the sizes of the others."""
        shape = node.meta["val"].shape
        for dims in range(1, len(shape) + 1):
            if statically_known_true(_product(shape[:dims]) == self.count):
                return dims, _known(shape[dims:])
        raise Unsupported("rows of another number")

    def _zeros(self, node: fx.Node) -> Rows:
        dims, rest = self._leading(node)
        return Rows(Call(_zero_rows, (self.operands(node)[0], rest, node.meta["val"].dtype)), dims)

    def _reduction(self, node: fx.Node, dims: int) -> Rows:
        """A reduction inside of rows, or a sum over all of them."""
        source, along, *rest = (*node.args, None) if len(node.args) == 1 else node.args
        if along is None:
            raise Unsupported("a reduction of everything")
        rank = source.meta["val"].dim()  # type: ignore[union-attr]
        axes = {axis % rank for axis in ([along] if isinstance(along, int) else along)}  # type: ignore[union-attr]
        if axes and min(axes) >= dims:
            moved = [axis - dims + 1 for axis in sorted(axes)]
            return Rows(Call(node.target, (source, moved[0] if isinstance(along, int) else moved, *rest)), dims)  # type: ignore[arg-type]
        if node.target is aten.sum.dim_IntList and axes == set(range(dims)) and (dims == 1 or not any(rest)):
            return Rows(Call(node.target, (source, [0], *rest), node.kwargs), 0)
        raise Unsupported("a reduction across rows")

    def _moved(self, node: fx.Node, axis: Any, dims: int) -> int:
        axis %= node.meta["val"].dim()
        if axis < dims:
            raise Unsupported("positions across rows")
        return axis - dims + 1

    def _aligned(self, node: fx.Node, arg: Any, dims: int) -> Any:
        """An argument of an element-wise call whose result has `dims` dimensions of rows, as a chunk needs it."""
        if not isinstance(arg, fx.Node):
            return arg
        value, shape = arg.meta["val"], node.meta["val"].shape
        if not isinstance(value, Tensor):
            raise Unsupported("a size")
        if arg in self.dependent or arg in self.rows:
            found = self.rows[arg]
            if found.dims != dims or value.dim() != len(shape):
                raise Unsupported("dimensions that do not agree")
            return arg
        before = dims - (len(shape) - value.dim())  # how many of its dimensions stand for rows
        if before <= 0:
            return Operand(arg)
        rest = _known(value.shape[before:])
        if all(statically_known_true(size == 1) for size in value.shape[:before]):
            return Operand(arg, None, (1, *rest))
        if statically_known_true(_product(value.shape[:before]) == self.count):
            return Operand(arg, 0, (-1, *rest))
        raise Unsupported("a tensor that is broadcast along some rows")


def _with_rows(*args: Any) -> Any:
    """The first of these arguments, one of which has all rows."""
    if not any(isinstance(arg, fx.Node) or (isinstance(arg, Operand) and arg.axis is not None) for arg in args):
        raise Unsupported("one row for all")
    return args[0]


def _known(sizes: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise Unsupported("rows of a size that is not known")
    return tuple(sizes)


def _without_layout(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("memory_format", "layout")}


def _reshape_rows(value: Tensor, rest: tuple[int, ...]) -> Tensor:
    return value.reshape(value.shape[0], *rest)


def _expand_rows(value: Tensor, rest: tuple[int, ...]) -> Tensor:
    return value.expand(value.shape[0], *rest)


def _zero_rows(like: Tensor, rest: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_zeros((like.shape[0], *rest), dtype=dtype)


# ---- which regions, and what becomes of them -------------------------------------------------------------------------


def chunk_rows(graph: fx.Graph, most: float) -> None:
    """Replace the regions around products of more than `most` bytes by calls of `RowChunks`, in a joint graph, where
    that saves memory."""
    for node in list(graph.nodes):
        if node.target in PRODUCTS and not node._erased and _bytes(node) > most:
            _replace(graph, node)


def _hint(size: int | torch.SymInt) -> int:
    """A size that was met; 0 if the data decide it."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return _hint(value.numel()) * value.itemsize


def _chunks(product: fx.Node, totals: int) -> int:
    """How many chunks save most memory, a power of two; 1: none do. Alive are a chunk of the product, one of its
    gradient, and, until they are added up, the parts of each sum over rows, of `totals` bytes each."""
    both, rows = 2 * _bytes(product), _hint(product.meta["val"].shape[0])
    chunks = 1 << round(math.log2(both / max(totals, 1)) / 2)
    while chunks > 1 and (rows < chunks * LEAST_ROWS or both * (chunks - 1) <= totals * chunks**2):
        chunks //= 2
    return chunks


def _replace(graph: fx.Graph, product: fx.Node) -> None:
    nodes = list(graph.nodes)
    region = _Region(product)
    region.grow(nodes)
    members = _members(region)
    if members is None:
        return
    rows = {node: region.rows[node] for node in nodes if node in members}
    own = [node for node in rows if node in region.dependent]
    results = [node for node in own if not members.issuperset(node.users)]
    chunks = _chunks(product, sum(_bytes(node) for node in results if not rows[node].dims))
    unit = _Unit(graph, rows)
    if chunks == 1 or not unit.is_linear():
        return
    rows = unit.given_ones(product)
    call = RowChunks(rows, results, rows[product].call.args[-2].node, chunks)
    with graph.inserting_before(product):
        made = graph.call_function(call, tuple(call.given))
    place = {key: product.meta[key] for key in PLACE if key in product.meta}
    made.meta = {**place, "val": tuple(node.meta["val"] for node in results), "recompute": CheckpointPolicy.MUST_SAVE}
    for index, node in enumerate(results):
        outside = [user for user in node.users if user not in members]
        with graph.inserting_before(product):
            item = graph.call_function(operator.getitem, (made, index))
            item.meta = {**place, "val": node.meta["val"]}
            if node in unit.later:
                item = graph.call_function(aten.mul.Tensor, (item, unit.tangent))
                item.meta = {**place, "val": node.meta["val"]}
        for user in outside:
            user.replace_input_with(node, item)
    for node in reversed(own):
        graph.erase_node(node)
    _sort(graph)


def _members(region: _Region) -> set[fx.Node] | None:
    """The nodes of a region: those that read or make wide values, and what lies between; None if there is none."""
    if not isinstance(region.width, int):
        return None
    wide = [node for node in region.rows if node in region.dependent and region.is_wide(node)]
    members = {*wide, *(user for node in wide for user in node.users)}
    left = list(members)
    while left:
        node = left.pop()
        if node not in region.rows:
            return None
        before = region.operands(node)
        left += [one for one in before if one not in members]
        members.update(before)
    products = sum(node.target in PRODUCTS for node in members)
    return members if products <= MOST_PRODUCTS else None


class _Unit:
    """A region whose gradients are computed for a gradient of 1 of the one number that they are linear in.

    Attributes:
        later: the nodes that depend on gradients of results.
        tangent: the placeholder of that gradient.
    """

    def __init__(self, graph: fx.Graph, rows: dict[fx.Node, Rows]) -> None:
        self.graph, self.rows = graph, rows
        self.later: set[fx.Node] = set()
        for node in graph.nodes:
            given = node.op == "placeholder" and "tangents" in str(node.target)
            if given or (node.op != "output" and not self.later.isdisjoint(node.all_input_nodes)):
                self.later.add(node)
        self.cone = self._before()
        tangents = [node for node in self.cone if node.op == "placeholder"]
        self.tangent = tangents[0] if len(tangents) == 1 else None

    def _before(self) -> list[fx.Node]:
        """The nodes outside of the region that depend on gradients, and that the region needs, in order."""
        found, left = set[fx.Node](), list(self.rows)
        while left:
            for node in left.pop().all_input_nodes:
                if node in self.later and node not in self.rows and node not in found:
                    found.add(node)
                    left.append(node)
        return [node for node in self.graph.nodes if node in found]

    def is_linear(self) -> bool:
        """All that depends on a gradient is linear in one number, and in no danger to leave the range of its dtype."""
        if self.tangent is None or self.tangent.meta["val"].dim():
            return False
        along = [node for node in (*self.cone, *self.rows) if node in self.later]
        if not all(node is self.tangent or _is_linear(node, self.later) for node in along):
            return False
        return all(node.meta["val"].dtype != torch.float16 for node in along)  # a scaled loss keeps these in range

    def given_ones(self, before: fx.Node) -> dict[fx.Node, Rows]:
        """The region with its operands computed for a gradient of 1, by copies of nodes before the node `before`."""
        assert self.tangent is not None
        value = self.tangent.meta["val"]
        copies: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(before):
            for node in self.cone:
                if node is self.tangent:
                    kwargs = {"dtype": value.dtype, "device": value.device}
                    copies[node] = self.graph.call_function(aten.full.default, ([], 1.0), kwargs)
                else:
                    copies[node] = self.graph.node_copy(node, lambda one: copies.get(one, one))
                copies[node].meta = {"val": node.meta["val"]}

        def given(arg: Any) -> Any:
            return replace(arg, node=copies.get(arg.node, arg.node)) if isinstance(arg, Operand) else arg

        calls = {node: pytree.tree_map(given, (one.call.args, one.call.kwargs)) for node, one in self.rows.items()}
        return {node: replace(one, call=Call(one.call.target, *calls[node])) for node, one in self.rows.items()}


def _is_linear(node: fx.Node, later: set[fx.Node]) -> bool:
    """Whether `node` is linear in those of its arguments that are in `later`, taken together."""
    args = [index for index, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg in later]
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return args == [0, 1]
    if node.target in (aten.mul.Tensor, aten.mm.default):
        return len(args) == 1
    if node.target is aten.masked_fill.Scalar:
        return args == [0] and node.args[2] in (0, False)
    if node.target is aten.scatter.src:
        into = node.args[0]
        return args == [0, 3] or (args == [3] and isinstance(into, fx.Node) and into.target in ZEROS)
    if node.target in ZEROS:
        return True
    return args == [0] and node.target in LINEAR


def _sort(graph: fx.Graph) -> None:
    """Move each node behind those that it needs; otherwise the order stays."""
    placed: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        path = [node]
        while path:
            missing = [one for one in path[-1].all_input_nodes if one not in placed]
            if path[-1] in placed or not missing:
                placed[path.pop()] = None
            else:
                path.append(missing[0])
    (root,) = (graph._root,)
    for node in reversed(placed):
        root.append(node)


def write_out(module: fx.GraphModule) -> None:
    """Replace calls of `RowChunks` by the calls that they make."""
    graph = module.graph
    for node in list(graph.nodes):
        if not isinstance(node.target, RowChunks):
            continue
        traced = make_fx(node.target)(*(arg.meta["val"] for arg in node.args))
        traced.graph.eliminate_dead_code()
        with graph.inserting_before(node):
            placeholders = traced.graph.find_nodes(op="placeholder")
            copies = dict(zip(placeholders, node.args, strict=True))
            found = graph.graph_copy(traced.graph, copies)
        place = {key: node.meta[key] for key in PLACE if key in node.meta}
        for old in traced.graph.nodes:
            if old.op == "call_function":
                copies[old].meta.update(place)
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()
