"""What kernels make of single operations: the elements or rows that a loop goes through, or nothing but addresses."""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.kernels.index import Index, from_dim, product
from torch_rtx.lowering.kernels.kernel_ir import Tensor, load
from torch_rtx.lowering.kernels.region import Region, express, tensor_type
from torch_rtx.lowering.kernels.rows import rows_of
from torch_rtx.op_work import ANCHORS


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
