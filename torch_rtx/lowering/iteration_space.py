"""What kernels make of single operations: the elements or rows that a loop goes through, or nothing but addresses."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.lowering.kernels.index import Index, from_dim, product
from torch_rtx.lowering.kernels.kernel_ir import Tensor, load
from torch_rtx.lowering.kernels.region import Region, express, tensor_type
from torch_rtx.lowering.kernels.rows import rows_of
from torch_rtx.op_work import ANCHORS
from torch_rtx.targets import ALIGNMENT


@dataclass(frozen=True)
class IterationSpace:
    """`count` elements, or `count` rows of `size` elements, which are contiguous in memory or not."""

    count: Index
    size: Index | None = None
    contiguous: bool = False

    @property
    def elements(self) -> tuple[Index, ...]:
        """The numbers of elements that a result may have."""
        return (self.count,) if self.size is None else (self.count, self.count * self.size)


def elements(value: Value) -> Index:
    """Elements of a tensor."""
    assert isinstance(value.type, TensorType)
    return product(map(from_dim, value.type.shape))


def is_absorbed_view(node: Node) -> bool:
    """Kernels absorb `node` as address arithmetic."""
    if node.kind != "op" or len(node.inputs) != 1 or not aten.is_view(aten.overload(node.op)):
        return False
    try:
        return bool(expressed(node))
    except Unsupported:
        return False


def cut_copies(graph: Graph, views: Set[int], producer: Mapping[str, int]) -> set[int]:
    """The copies, by index, that only cut the ends of the rows of a product, such as one whose columns were padded:
    kernels read the rows where they lie, each as fast as it would read the copy.

    Args:
        views: the nodes that kernels absorb.
        producer: the node that computes each value, by its name.
    """

    def source(value: Value) -> int | None:
        index = producer.get(value.name)
        while index is not None and index in views:
            index = producer.get(graph.nodes[index].inputs[0].name)
        return index

    found = {index for index, node in enumerate(graph.nodes) if _cuts_rows(node)}
    found = {i for i in found if (at := source(graph.nodes[i].inputs[0])) is not None and graph.nodes[at].op in ANCHORS}
    returned = {source(value) for value in attr_values(graph.outputs)}
    calls = (node for index, node in enumerate(graph.nodes) if index not in views and not _is_in_kernel(node))
    return found - returned - {source(value) for node in calls for value in node.inputs}


def _cuts_rows(node: Node) -> bool:
    """`node` copies a tensor whose rows are aligned in memory, in the order of memory, to where no gaps are."""
    if node.op != "aten.clone.default" or node.kind != "op" or node.outputs[0] is None:
        return False
    try:
        before, after = tensor_type(node.inputs[0]), tensor_type(node.outputs[0])
    except Unsupported:  # on the CPU
        return False
    kept = [stride for size, stride in zip(before.shape, before.strides, strict=True) if size != 1]
    strides = [stride for stride in kept if isinstance(stride, int) and stride]
    if strides != kept or strides != sorted(strides, reverse=True) or strides[-1:] != [1]:
        return False
    aligned = not any(stride * DTYPES[before.dtype].bytes % ALIGNMENT for stride in strides[:-1])
    return aligned and after.strides == contiguous(after.shape)


def _is_in_kernel(node: Node) -> bool:
    return node.op in ANCHORS or iteration_space_of(node) is not None


def expressed(node: Node) -> list[Tensor]:
    """The results of one operation as kernel IR.

    Raises:
        Unsupported: kernels do not cover it.
    """
    values: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    return list(express(node, values).values())


def iteration_space_of(node: Node) -> IterationSpace | None:
    """The iteration space of one operation; None if kernels do not cover it."""
    if node.op in ANCHORS or not all(isinstance(v.type, TensorType) for v in node.inputs):
        return None
    try:
        tensors = expressed(node)
        if not tensors:
            return None
        found = Region(Graph("import", outputs=tuple(v for v in node.outputs if v)), tuple(tensors), None, {})
        rows = rows_of(found)
    except Unsupported:
        return None
    if not rows.axes:
        return IterationSpace(product(tensors[0].shape))
    return IterationSpace(rows.count, rows.size, rows.contiguous)
