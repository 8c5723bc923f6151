"""Modifications of the scores of attention, as text that an operator takes: what `flex_attention` gets as functions.

The text is a graph of level import whose tensors have no dimensions: it computes one score. Its inputs are, by name,

    score   the scaled score; a mask has none
    g       in a gradient alone: the gradient of the modified score
    b h q k the places of the score: of batch, head, query and key, in i32
    x0 ...  tensors, in the order of the operator's `buffers`, whose sizes are open here; `aten.index.Tensor` with a
            place along each dimension reads an element

and its output is the modified score, its gradient, or whether a key is seen. An empty text changes and hides nothing.

Gradients of captured tensors are a text with several outputs: terms, each of which is a number and where it is added,
a place along each dimension of its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch_rtx.errors import InvalidIR
from torch_rtx.ir import Graph, Sym, TensorType, Type, Value, attr_values, contiguous, verify
from torch_rtx.irparse import parse
from torch_rtx.optable import POINTWISE

INDEX = "aten.index.Tensor"
_GRADIENTS = ("tanh", "sigmoid", "threshold", "silu", "gelu", "softplus", "hardtanh", "hardsigmoid", "hardswish", "elu")
_OTHERS = ("full", "scalar_tensor", "_to_copy", "floor_divide", "hardswish")
OPS = POINTWISE | {INDEX, "aten.rsub.Tensor", "aten.masked_fill.Tensor", *(f"aten.{name}.default" for name in _OTHERS)}
OPS |= {f"aten.{name}_backward.default" for name in (*_GRADIENTS, "leaky_relu", "log_sigmoid")}
PLACES = ("b", "h", "q", "k")
SCALARS = ("score", "g", *PLACES)
SCALAR = ()  # the shape of what is no buffer
MAX_OPS = 1024  # of one modification
_BUFFER = re.compile(r"x(\d+)")


def scalar(name: str, dtype: str) -> Value:
    """A value of a modification."""
    return Value(name, TensorType(dtype, SCALAR, SCALAR))


def buffer(index: int, dtype: str, rank: int) -> Value:
    """An input for the tensor `buffers[index]`."""
    sizes = tuple(Sym(f"d{axis}") for axis in range(rank))
    return Value(f"x{index}", TensorType(dtype, sizes, contiguous(sizes)))


@lru_cache(maxsize=1024)
def modification(text: str, results: int = 1) -> Graph:
    """The graph of a modification, with so many results.

    Raises:
        InvalidIR: it is not one, or calls what modifications may not.
    """
    graph = parse(text)
    verify(graph, OPS)
    for value in graph.inputs:
        if value.name not in SCALARS and buffer_index(value) is None:
            raise InvalidIR(f"a modification of scores has no input {value.name}")
    if graph.level != "import" or graph.weights or len(graph.nodes) > MAX_OPS or len(graph.outputs) != results:
        which = "one result" if results == 1 else f"{results} results"
        raise InvalidIR(f"a modification of scores must be a graph of calls with {which}", hint=f"{MAX_OPS} at most")
    buffers = {value.name for value in graph.inputs if buffer_index(value) is not None}
    for node in graph.nodes:
        scalars = [_is_scalar(value.type) for value in node.results]
        if node.kind != "op" or len(node.outputs) != 1 or scalars != [True] or node.arg("size", ()) != ():
            raise InvalidIR("a modification of scores computes single numbers", loc=node.loc)
        read = node.arg("self") if node.op == INDEX else None
        if any(value.name in buffers and value != read and value.type.shape for value in node.inputs):  # type: ignore[union-attr]
            raise InvalidIR(f"{node.op} of a whole tensor in a modification of scores")
        if node.op == INDEX and not _reads_element(read, node.arg("indices")):
            raise InvalidIR("a modification of scores reads a tensor at a place along each dimension")
    if not all(isinstance(out, Value) and _is_scalar(out.type) for out in graph.outputs):
        raise InvalidIR("the result of a modification of scores must be a number")
    return graph


@dataclass(frozen=True)
class Term:
    """A number that is added to the gradient of a captured tensor.

    Attributes:
        offset: of the tensor's first element among those of all gradients.
        size: of the tensor.
    """

    number: Value
    places: tuple[Value, ...]
    offset: int
    size: tuple[int, ...]


def terms_of(text: str, sizes: Sequence[int], ranks: Sequence[int], targets: Sequence[int]) -> tuple[Graph, list[Term]]:
    """The graph of a text of gradients, and its terms.

    Args:
        sizes: of all tensors that have a gradient, one after the other.
        ranks: how many of `sizes` are those of each tensor.
        targets: the tensor of each term.

    Raises:
        InvalidIR: it is none, or does not fit the sizes.
    """
    if sum(ranks) != len(sizes) or min((*sizes, *ranks), default=0) < 0:
        raise InvalidIR("sizes of gradients that do not fit their ranks")
    if not targets or not all(0 <= which < len(ranks) for which in targets):
        raise InvalidIR("a gradient of a tensor that is not there")
    starts = [sum(ranks[:which]) for which in range(len(ranks))]
    shapes = [tuple(sizes[start : start + rank]) for start, rank in zip(starts, ranks, strict=True)]
    graph = modification(text, sum(1 + ranks[which] for which in targets))
    found, left = list[Term](), list(attr_values(graph.outputs))
    for which in targets:
        (number, *places), left = left[: 1 + ranks[which]], left[1 + ranks[which] :]
        if not all(is_place(one.type) for one in places):
            raise InvalidIR("a gradient is added at a place along each dimension")
        found.append(Term(number, tuple(places), sum(map(prod, shapes[:which])), shapes[which]))
    return graph, found


def buffer_index(value: Value) -> int | None:
    """Which of the operator's buffers an input is; None: it is none."""
    found = _BUFFER.fullmatch(value.name)
    return None if found is None else int(found[1])


def is_place(type_: Type) -> bool:
    """Whether a value of this type is a place in a tensor: a mask would be an index, too."""
    return isinstance(type_, TensorType) and type_.shape == SCALAR and type_.dtype in ("i32", "i64")


def _is_scalar(type_: Type) -> bool:
    return isinstance(type_, TensorType) and type_.shape == SCALAR


def _reads_element(read: object, indices: object) -> bool:
    if not isinstance(read, Value) or not isinstance(read.type, TensorType) or not isinstance(indices, tuple):
        return False
    places = list(attr_values(indices))
    return len(places) == len(indices) == len(read.type.shape) and all(is_place(one.type) for one in places)
