"""Split forms: two kernels for a result that has too few tiles to fill the GPU.

The first kernel computes partial results in f32, or i32 of integers, over ranges of K (split-K) or of the keys of
attention (split-KV). The second combines them in a fixed order and runs the epilogue; unlike with atomics, every run
gives the same bits. Both bodies are ATen calls, like any other. For reductions without an anchor see `split_reduction`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch_rtx.ir import Dim, Graph, Node, TensorType, Value
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, kernel, names_in, needed, type_of

Partial = Callable[[BodyBuilder, Node, int], tuple[Value, ...]]  # the anchor's partial results, per split
Combine = Callable[[BodyBuilder, Node, tuple[Value, ...]], Value]  # the whole result, unrounded, from the partial ones


def split_anchor(
    body: Graph, name: str, anchor: Node, num_splits: int, partial: Partial, combine: Combine, last: Collection[str]
) -> Graph:
    """`body`, of the kernel `name`, with its anchor split into `num_splits`, a divisor of the size that is split.

    Args:
        last: the arguments of the anchor that the second kernel takes: what it adds, and scales.

    Raises:
        Unsupported: the anchor can't be split.
    """
    operands = tuple(attr for name, attr in anchor.args if name not in last)
    taken = names_in(body)
    first = BodyBuilder(taken, needed(body.nodes, operands))
    results = partial(first, anchor, num_splits)
    second = BodyBuilder(taken)
    others = [node for node in body.nodes if node is not anchor]
    kept = needed(others, (*body.outputs, *map(anchor.arg, last)))
    for node in body.nodes:
        if node is anchor:
            _rounded(second, combine(second, anchor, results), anchor)
        elif node in kept:
            second.nodes.append(node)
    outputs = tuple(value for value in body.outputs if isinstance(value, Value))
    nodes = (
        kernel(f"{name}_parts{num_splits}", body.inputs, first.nodes, results),
        kernel(f"{name}_sum{num_splits}", (*results, *body.inputs), second.nodes, outputs),
    )
    return Graph("import", body.inputs, nodes=nodes, outputs=body.outputs)


def added(calls: BodyBuilder, terms: tuple[Value, ...], strides: tuple[Dim, ...]) -> Value:
    """The sum of partial results, in order, with these strides."""
    total, *rest = terms
    for term in rest:
        old = type_of(term)
        total = calls.call("add.Tensor", TensorType(old.dtype, old.shape, strides), self=total, other=term)
    return total


def _rounded(calls: BodyBuilder, total: Value, anchor: Node) -> None:
    """Define the result of `anchor`, the first one, by its unrounded value."""
    result = anchor.outputs[0]
    assert result is not None
    if type_of(result).dtype != type_of(total).dtype:
        calls.call("_to_copy.default", type_of(result), self=total, dtype=type_of(result).dtype)
    calls.name_last(result)
