"""Split forms in a number of splits that a test names, whatever the cost model thinks of them."""

from __future__ import annotations

from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.kernels.families import attention, attention_backward, attention_flex, conv, gemm
from torch_rtx.lowering.kernels.split_columns import split_columns, sums_rows
from torch_rtx.lowering.kernels.split_queries import split_queries
from torch_rtx.lowering.kernels.split_reduction import reduces, split_reductions

SPLITS = (
    (gemm.FAMILY.ops, gemm.gemm_split),
    (conv.FAMILY.ops, conv.conv_split),
    (attention.FAMILY.ops, attention.attention_split),
    (attention_backward.FAMILY.ops, split_queries),
    (attention_flex.FAMILY.ops, attention_flex.flex_split),
)


def split_in(body: Graph, name: str, num_splits: int) -> Graph:
    """The split form of `body`, of the kernel `name`, with its anchor in `num_splits`, or its rows in about as many; or
    in blocks of `num_splits` rows, beside a loop over rows.

    Raises:
        Unsupported: it can't be split.
    """
    nodes = flat(body.nodes)
    ops = {node.op for node in nodes}
    columns = any(map(sums_rows, nodes)) and any(reduces(node) and not sums_rows(node) for node in nodes)
    others = split_columns if columns else split_reductions
    split = next((split for anchors, split in SPLITS if not anchors.isdisjoint(ops)), others)
    return split(body, name, num_splits)
