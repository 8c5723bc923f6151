"""Sums over all rows in the kernel of a loop over rows, which computes what they sum.

The gradient of a norm's input is a loop over rows, those of its weight and bias sum columns. As kernels of their own
the sums read what the loop has in registers, and so it has to store that, in float32. `split_columns` makes of them

    dx, p, q: ..., f32[256, 1, 768], f32[256, 1, 768] = kernel norm_parts256(...)
        ...                                                    # a loop over rows
        p = sum(view(gradient * normal, [256, 16, 768]), 1)    # of the rows of each program, see `row_blocks`
        q = sum(view(gradient, [256, 16, 768]), 1)
    dw, db: f32[768], f32[768] = kernel norm_sum256(p, q)
        dw, db = sum(p, 0), sum(q, 0)

The other way is `separate_columns`: a kernel for rows and one for columns. Where nothing reduces rows, as in the
gradients of an activation and of a bias, it is `split_reduction`, in chunks of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, prod

from torch_rtx.chips import kernels_us
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, kernel, names_in, needed, type_of
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.kernels.reduction_rules import RULES
from torch_rtx.lowering.kernels.region import tensor_type
from torch_rtx.lowering.kernels.row_blocks import tile_width
from torch_rtx.lowering.kernels.split_reduction import reduces
from torch_rtx.targets import Arch

SUM = "aten.sum.dim_IntList"
BLOCKS = (4, 8, 16, 32, 64, 128, 256)  # rows of a program: the sums of few take as much memory as what they sum
PROGRAMS_PER_PROCESSOR = 3  # at least, so that some load while others compute


def split_columns(body: Graph, name: str, block: int) -> Graph:
    """`body`, of the kernel `name`, as two kernels: a program of the first one has `block` rows.

    Raises:
        Unsupported: it has no sums over rows.
    """
    rows, columns = _divided(body)
    taken = names_in(body)
    first, second = BodyBuilder(taken, rows), BodyBuilder(taken)
    partial: list[Value] = []
    for node in columns:
        if sums_rows(node) and node.inputs[0] not in _results(columns):
            partial.append(_sum_blocks(first, node, block))
            _add_blocks(second, node, partial[-1])
        else:
            second.nodes.append(node)
    early, late = _outputs(body, rows), _outputs(body, columns)
    count = typical(type_of(partial[0]).shape[0])
    read = [value for node in second.nodes for value in node.inputs if value in _results(rows)]
    stored = (*partial, *dict.fromkeys((*early, *read)))
    made = kernel(f"{name}_parts{count}", body.inputs, needed(first.nodes, stored), stored)
    added = kernel(f"{name}_sum{count}", (*stored, *body.inputs), needed(second.nodes, late), late)
    return Graph("import", body.inputs, nodes=(made, added), outputs=body.outputs)


def separate_columns(body: Graph, name: str) -> Graph:
    """`body`, of the kernel `name`, as a loop over rows, and one over columns: it reads what the first one stores
    anyway, and statistics of rows, and computes all else again.

    Raises:
        Unsupported: it has no sums over rows.
    """
    rows, columns = _divided(body)
    early, late = _outputs(body, rows), _outputs(body, columns)
    again = needed(_without(rows, early), [value for node in columns for value in node.inputs])
    read = {value for node in (*again, *columns) if node in columns or not reduces(node) for value in node.inputs}
    stored = (*early, *(value for node in again if reduces(node) for value in node.results if value in read))
    inside = needed([*_without(rows, stored), *columns], late)
    first = kernel(f"{name}_rows", body.inputs, needed(rows, stored), stored)
    second = kernel(f"{name}_columns", (*stored, *body.inputs), inside, late)
    return Graph("import", body.inputs, nodes=(first, second), outputs=body.outputs)


def _divided(body: Graph) -> tuple[list[Node], list[Node]]:
    """The loop over rows, and the sums over these with all that follows from them."""
    columns: list[Node] = []
    for node in body.nodes:
        if sums_rows(node) or not _results(columns).isdisjoint(node.inputs):
            columns.append(node)
    if not columns:
        raise Unsupported("a loop without sums over its rows")
    return [node for node in body.nodes if node not in columns], columns


def _without(nodes: Iterable[Node], stored: Sequence[Value]) -> list[Node]:
    """`nodes` where the values in `stored` need not be computed."""
    left = (replace(node, outputs=tuple(None if v in stored else v for v in node.outputs)) for node in nodes)
    return [node for node in left if node.results]


def _results(nodes: Iterable[Node]) -> set[Value]:
    return {value for node in nodes for value in node.results}


def _outputs(body: Graph, nodes: Iterable[Node]) -> tuple[Value, ...]:
    """What `body` returns of the results of `nodes`."""
    made = _results(nodes)
    return tuple(dict.fromkeys(value for value in attr_values(body.outputs) if value in made))


def sums_rows(node: Node) -> bool:
    """`node` sums a tensor over its first dimensions, but not over its last one."""
    if node.op != SUM or any(value is None for value in node.outputs):
        return False
    rank, dims = len(type_of(node.arg("self")).shape), node.arg("dim")
    axes = sorted(axis % rank for axis in dims if isinstance(axis, int)) if isinstance(dims, tuple) and rank else []
    return bool(axes) and axes == list(range(len(axes))) and len(axes) < rank


def _sum_blocks(body: BodyBuilder, node: Node, block: int) -> Value:
    """The sums of blocks of rows, [blocks, 1, *columns]. The last block is filled up with zeros."""
    operand, axes = RULES[node.op].operand(body, node)
    shape = type_of(operand).shape
    rows, columns = dim_expr("*", 1, *(shape[axis] for axis in axes)), shape[len(axes) :]
    blocks = dim_expr("//", dim_expr("+", rows, block - 1), block)
    value = body.reshape(operand, (rows, *columns))
    missing = dim_expr("+", dim_expr("*", blocks, block), dim_expr("*", -1, rows))
    if missing != 0:
        padded = (dim_expr("*", blocks, block), *columns)
        type_ = TensorType(type_of(value).dtype, padded, contiguous(padded))
        value = body.call("constant_pad_nd.default", type_, self=value, pad=(*[0, 0] * len(columns), 0, missing))
    return _sum(body, body.reshape(value, (blocks, block, *columns)), 1)


def _add_blocks(body: BodyBuilder, node: Node, partial: Value) -> None:
    """Defines the result of `node` by the sums of blocks."""
    (result,) = node.results
    body.define(result, _sum(body, partial, 0))


def _sum(body: BodyBuilder, value: Value, axis: int) -> Value:
    type_ = type_of(value)
    shape = (*type_.shape[:axis], 1, *type_.shape[axis + 1 :])
    return body.call(
        "sum.dim_IntList", TensorType(type_.dtype, shape, contiguous(shape)), self=value, dim=(axis,), keepdim=True
    )


# ---- when it is faster -----------------------------------------------------------------------------------------------


def best_block(body: Graph, arch: Arch) -> tuple[int, float] | None:
    """The best number of rows of a program for `split_columns`, and the expected time of both kernels in us; None:
    there are too few rows. The processor with the most programs takes the longest."""
    counts = [_rows_of(node) for node in body.nodes if sums_rows(node)]
    return _best_block(body, arch, counts)


def best_pixels(body: Graph, arch: Arch) -> int | None:
    """The best number of pixels of a program for `split_by_blocks`, of a body that sums those of images, channel by
    channel; None: it reduces something else, or there are too few."""
    found = [node for node in body.nodes if reduces(node)]
    if not all(node.op == SUM and _keeps_last(node) for node in found):
        return None
    counts = [_rows_of(node) for node in found]
    best = _best_block(body, arch, counts)
    if best is None:
        return None
    return next((block for block in BLOCKS[::-1] if block <= best[0] and counts[0][0] % block == 0), None)


def _keeps_last(node: Node) -> bool:
    """`node` sums over all dimensions but the one that is contiguous in memory."""
    operand, axes = RULES[node.op].operand(BodyBuilder(set()), node)
    type_ = type_of(operand)
    return [axis for axis in range(len(type_.shape)) if axis not in axes] == [
        axis for axis, stride in enumerate(type_.strides) if stride == 1 and type_.shape[axis] != 1
    ]


def _best_block(body: Graph, arch: Arch, counts: Sequence[tuple[int, int]]) -> tuple[int, float] | None:
    rows, columns = counts[0] if counts else (0, 0)
    on, least = arch.chip, BLOCKS[0]
    if rows < 2 * least:
        return None
    moved = sum(bytes_of(tensor_type(value)) for value in (*body.inputs, *attr_values(body.outputs)))

    whole = any(reduces(node) and not sums_rows(node) for node in body.nodes)
    tiles = ceil(columns / tile_width(columns, whole))

    def us(block: int) -> float:
        blocks = ceil(rows / block)
        most = ceil(blocks * tiles / on.processors) * block * on.processors / (rows * tiles)
        return kernels_us(on, 2) + (moved * most + 2 * 4 * blocks * columns * len(counts)) / (on.memory * 1e3)

    programs = on.processors * PROGRAMS_PER_PROCESSOR
    enough = [block for block in BLOCKS if block == least or rows * tiles >= block * programs]
    best = min(enough, key=us)
    return best, us(best)


def _rows_of(node: Node) -> tuple[int, int]:
    """How many rows a sum adds up, and of how many columns."""
    shape, (result,) = type_of(node.arg("self")).shape, node.results
    columns = prod(map(typical, type_of(result).shape))
    return prod(map(typical, shape)) // max(columns, 1), columns
