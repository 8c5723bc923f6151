"""Checks positions that a graph computes before calls read or write there.

An index outside of its tensor ends the process on a GPU: the device asserts, and every later call fails. A region that
is run alone on random inputs may compute such an index, where the whole program has a mask that comes from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeGuard

import torch

from torch_rtx import aten
from torch_rtx.accumulation import SCATTERS, call_of, replaces
from torch_rtx.dtypes import highest
from torch_rtx.errors import RtxError
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.op_work import GROUPED_MM, INT_CONV, INT_MM, POOLING_BACKWARD
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.streaming import numbers

CAST = "aten._to_copy.default"
PAGE, IN_PAGE = "aten.floor_divide.default", "aten.remainder.Scalar"
OF_NUMBERS = frozenset(
    ("_to_copy", "clone", "cat", "add", "sub", "mul", "neg", "where", "bitwise_and", "bitwise_or", "bitwise_xor")
)
INTEGERS = frozenset(("i64", "i32", "i16", "i8", "u8"))


def check_positions(graph: Graph, device: torch.device, inputs: Sequence[torch.Tensor]) -> bool:
    """Compute the positions that calls of `graph` (static, without weights) get, and compare them with the sizes.

    Returns: whether any are computed, rather than given, so that other inputs could make other positions.

    Raises:
        RtxError: a position is outside of its tensor.
    """
    flat, computed = inline_kernels(graph, {}), False
    for node in flat.nodes:
        for index, size in _positions(node):
            computed = computed or index not in flat.inputs
            (found,) = compile_graph(_up_to(flat, index), device)(inputs, ())
            least = -size if isinstance(node.arg("indices"), tuple) else 0  # others do not count from the end
            if found.numel() and not (least <= int(found.min()) and int(found.max()) < size):
                raise RtxError(f"{node.op} would get positions outside of a dimension of size {size}", loc=node.loc)
    return computed


def limits(graph: Graph) -> dict[str, int]:
    """By the name of an input that is nothing but positions, directly or as a view, cast or compared, or in pages of
    one size: the size of the smallest dimension that they are for."""
    kinds = {value.name: value.type.dtype for value in graph.inputs if isinstance(value.type, TensorType)}
    base = {value.name: (value.name, 1) for value in graph.inputs if _is_integers(value)}  # with the size of pages
    found: dict[str, int] = {}
    for node in inline_kernels(graph, {}).nodes:
        given = {base[value.name] for value in node.inputs if value.name in base}
        positions = [(*base[value.name], size) for value, size in _positions(node) if value.name in base]
        for name, page, size in positions:
            found[name] = min(size * page, found.get(name, size * page), int(highest(kinds[name])))
        is_same = node.kind != "fallback" and (aten.is_view(aten.overload(node.op)) or node.op == CAST)
        by = node.arg("other")
        is_paged = node.op in (PAGE, IN_PAGE) and isinstance(by, int) and by > 0
        if len(given) == 1 and (is_same or is_paged):
            ((name, pages),) = given
            size = pages * by if node.op == PAGE and isinstance(by, int) else pages
            base |= {value.name: (name, size) for value in node.results if node.op != IN_PAGE}  # it is in range
        elif not all(isinstance(v.type, TensorType) and v.type.dtype == "bool" for v in node.results):
            for name in {name for name, _ in given} - {name for name, _, _ in positions}:
                base = {value: root for value, root in base.items() if root[0] != name}
                found.pop(name, None)
    return found


def numbers_in(graph: Graph) -> set[str]:
    """The names of integer inputs that are numbers, such as the codes of quantized weights: no position depends on
    them, and calls that are known to take any number read them."""
    roots = {value.name: {value.name} for value in graph.inputs if _is_integers(value)}
    found, others = set(roots), set[str]()
    for node in inline_kernels(graph, {}).nodes:
        positions = [value for value, _ in _positions(node)]
        for value in node.inputs:
            taken = node.kind != "fallback" and _takes_numbers(node, value)
            if value in positions or (_is_integers(value) and not taken):
                others |= roots.get(value.name, set())
        read = set[str]().union(*(roots.get(value.name, ()) for value in node.inputs))
        roots |= {value.name: read for value in node.results}
    return found - others


def _takes_numbers(node: Node, value: Value) -> bool:
    """Whether `value`, an operand of the call, may be any integer."""
    _, _, name = node.op.partition(".")
    if any(isinstance(made.type, TensorType) and made.type.dtype == "bool" for made in node.results):
        return False  # of random numbers nearly all would be true
    if name.startswith(("__rshift__", "bitwise_right_shift")):
        return value == node.arg("self") and value != node.arg("other")
    return name.split(".")[0] in OF_NUMBERS or node.op in (INT_MM, INT_CONV) or aten.is_view(aten.overload(node.op))


def in_order(graph: Graph) -> dict[str, int | None]:
    """By the names of inputs whose elements ascend, since they are where groups of rows end: what the last one is;
    None: any."""
    found: dict[str, int | None] = {}
    for node in inline_kernels(graph, {}).nodes:
        ends, rows = node.arg("offs"), node.arg("self")
        if node.op == GROUPED_MM and ends in graph.inputs:
            assert isinstance(ends, Value)
            assert isinstance(rows, Value)
            assert isinstance(rows.type, TensorType)
            whole = node.arg("whole", False) is True
            found[ends.name] = numbers(rows.type.shape)[0] if whole else found.get(ends.name)
    return found


def distinct(graph: Graph) -> dict[str, int | None]:
    """By the name of an input that is where values are put, or of what that is computed from: the axis along which its
    elements differ, None: all do. Of several values that are put in one place any may stay, so that two runs of the
    calls need not agree."""
    roots = {value.name: {value.name} for value in graph.inputs if _is_integers(value)}
    found: dict[str, int | None] = {}
    for node in inline_kernels(graph, {}).nodes:
        dim = node.arg("dim") if call_of(node) in SCATTERS else None
        for value, _ in _positions(node) if node.kind != "fallback" and replaces(node) else ():
            for name in roots.get(value.name, ()):
                found[name] = dim if isinstance(dim, int) and name == value.name else None
        read = set[str]().union(*(roots.get(value.name, ()) for value in node.inputs))
        roots |= {value.name: read for value in node.results if read and _is_integers(value)}
    return found


def differing(positions: torch.Tensor, axis: int | None, size: int, generator: torch.Generator) -> torch.Tensor:
    """`positions` with others below `size` in their place that differ along an axis, or all; as they are, if they are
    too many."""
    shape = list(positions.shape) if axis is not None else [positions.numel()]
    along = axis or 0
    if not shape or shape[along] > size:
        return positions
    wide = [size if at == along % len(shape) else count for at, count in enumerate(shape)]
    drawn = torch.rand(wide, generator=generator, device=positions.device).argsort(along)
    return positions.copy_(drawn.narrow(along, 0, shape[along]).reshape(positions.shape))


def _positions(node: Node) -> Iterator[tuple[Value, int]]:
    """The operands of a call that are positions, with the size of the dimension that they are for."""
    base = next(
        (value for name in ("self", "weight", "grad_output") if isinstance(value := node.arg(name), Value)), None
    )
    if node.kind == "fallback" or base is None or not isinstance(base.type, TensorType):
        return
    sizes, index, indices = numbers(base.type.shape), node.arg("index"), node.arg("indices")
    if node.op == GROUPED_MM and _is_integers(ends := node.arg("offs")):
        yield ends, sizes[0] + 1
    if _is_integers(index):
        dim = node.arg("dim")
        yield index, sizes[dim] if isinstance(dim, int) and sizes else math.prod(sizes)
    elif isinstance(indices, tuple):
        yield from ((one, size) for one, size in zip(indices, sizes, strict=False) if _is_integers(one))
    elif _is_integers(indices) and node.op == POOLING_BACKWARD:
        image = node.arg("self")
        assert isinstance(image, Value)
        assert isinstance(image.type, TensorType)
        yield indices, math.prod(numbers(image.type.shape)[-2:])
    elif _is_integers(indices) and isinstance(count := node.arg("num_weights", sizes[0]), int):
        yield indices, count


def _is_integers(attr: Attr) -> TypeGuard[Value]:
    return isinstance(attr, Value) and isinstance(attr.type, TensorType) and attr.type.dtype in INTEGERS


def _up_to(graph: Graph, value: Value) -> Graph:
    """The part of `graph` that computes `value`."""
    needed, nodes = {value.name}, list[Node]()
    for node in reversed(graph.nodes):
        if any(made.name in needed for made in node.results):
            needed.update(given.name for given in node.inputs)
            nodes.append(node)
    return replace(graph, nodes=tuple(reversed(nodes)), outputs=(value,))
