"""Split forms in a number of splits that a test names, whatever the cost model thinks of them."""

from __future__ import annotations

from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.families import attention, conv, gemm
from torch_rtx.lowering.kernels.split_reduction import split_reductions

SPLITS = (
    (gemm.FAMILY.ops, gemm.gemm_split),
    (conv.FAMILY.ops, conv.conv_split),
    (attention.FAMILY.ops, attention.attention_split),
)


def split_in(body: Graph, name: str, num_splits: int) -> Graph:
    """The split form of `body`, of the kernel `name`, with its anchor in `num_splits`, or its rows in about as many.

    Raises:
        Unsupported: it can't be split.
    """
    ops = {node.op for node in body.nodes}
    split = next((split for anchors, split in SPLITS if not anchors.isdisjoint(ops)), split_reductions)
    return split(body, name, num_splits)
