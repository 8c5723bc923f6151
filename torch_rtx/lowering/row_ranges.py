"""Ranges of rows that stay outside of kernels, as addresses that they take."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.dtypes import DTYPES, register
from torch_rtx.ir import Node, TensorType, Value, contiguous
from torch_rtx.lowering.kernels.index import multiple
from torch_rtx.targets import ALIGNMENT

SELECT = "aten.select.int"
RANGES = {"aten.slice.Tensor": "start", SELECT: "index"}  # of rows, and the argument that says which is the first
MANY_STEPS = 8  # for each of which a kernel would have code of its own


def ranges_of_rows(nodes: tuple[Node, ...]) -> Iterator[int]:
    """Ranges of rows of one tensor, several of one type, at addresses that kernels can take; and single positions along
    a dimension, if there are many, as of the steps of a loop. They stay outside of kernels, which then have equal code
    for each of them."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, node in enumerate(nodes):
        if node.op not in RANGES or node.arg("step", 1) != 1:
            continue
        (source,), (result,) = node.inputs, node.outputs
        start, dim = node.arg(RANGES[node.op]) or 0, node.arg("dim", 0)
        type_ = source.type
        if result is None or not isinstance(type_, TensorType) or not register(type_.dtype):
            continue  # kernels can't read it: no view of it is part of one
        if not isinstance(start, int) or not isinstance(dim, int):
            continue
        offset = start * multiple(type_.strides[dim]) * DTYPES[type_.dtype].bytes
        is_rows = node.op == SELECT or (dim == 0 and _is_dense(source) and _is_dense(result))
        if is_rows and start >= 0 and offset % ALIGNMENT == 0:
            found.setdefault((source.name, f"{node.op} {dim} {result.type}"), []).append(index)
    for indices in found.values():
        if len(indices) >= (MANY_STEPS if nodes[indices[0]].op == SELECT else 2):
            yield from indices


def _is_dense(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.strides == contiguous(value.type.shape)
