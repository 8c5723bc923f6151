"""Split forms: a body as two kernels, for results that are too small to fill a chip.

The first kernel computes partial results in f32: of a product or a convolution over ranges of its depth (split-K), of
attention over ranges of its keys (split-KV). The second adds them up, in order, and does all that follows; so every run
gives the same bits, which atomic additions would not. Both are written as ATen calls, like any other body. Loops have a
form of three kernels, or two for each reduction: see `split_reduction`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch_rtx.ir import Dim, Graph, Node, TensorType, Value
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, kernel, needed, type_of

Partial = Callable[[BodyBuilder, Node, int], tuple[Value, ...]]  # the partial results of an anchor
Finish = Callable[[BodyBuilder, Node, tuple[Value, ...]], Value]  # from these the whole result, in f32


def split_anchor(
    body: Graph, name: str, anchor: Node, parts: int, partial: Partial, finish: Finish, last: str
) -> Graph:
    """`body`, of the kernel `name`, with its anchor cut in `parts`, which must divide what is cut.

    Args:
        last: the argument of the anchor that is added in the end.

    Raises:
        Unsupported: the anchor has nothing that can be cut.
    """
    operands = tuple(attr for name, attr in anchor.args if name != last)
    taken = {value.name for value in body.values()} | body.syms.keys()
    first = BodyBuilder(taken, needed(body.nodes, operands))
    results = partial(first, anchor, parts)
    second = BodyBuilder(taken)
    others = [node for node in body.nodes if node is not anchor]
    kept = needed(others, (*body.outputs, anchor.arg(last)))
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


def added(calls: BodyBuilder, parts: tuple[Value, ...], strides: tuple[Dim, ...]) -> Value:
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
