"""What is known of masks for all sizes is what their calls give at each size."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.lowering.kernels.kernel_bodies import body
from torch_rtx.ir import Graph, Value
from torch_rtx.lowering.kernels.index import Index, constant, substitute
from torch_rtx.lowering.kernels.kernel_ir import Position
from torch_rtx.lowering.positions import AtLeastZero, Element, Positions
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.code import compile_graph

ROWS = "dim s0 = 1, 64, 1\ndim s1 = 1, 64, 1\n"
KNOWN = {
    "causal": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[s1] = arange.start(start=1, end=(1 + s1), device='main')
        c: i64[s0, 1] = unsqueeze.default(self=a, dim=1)
        d: i64[s0, 1] = add.Tensor(self=c, other=1)
        y: bool[s0, s1] = le.Tensor(self=b, other=d)
        return y""",
    "steps backwards": """
        a: i64[s0] = arange.start_step(start=s0, end=0, step=-1, device='main')
        b: i64[s0] = mul.Tensor(self=a, other=3)
        y: i64[s0] = flip.default(self=b, dims=[0])
        return y""",
    "differences": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[1](1) = slice.Tensor(self=a, dim=0, start=0, end=1)
        c: i64[1] = sub.Tensor(self=b, other=1)
        d: i64[(1 + s0)] = cat.default(tensors=[c, a])
        e: i64[s0] = slice.Tensor(self=d, dim=0, start=1, end=(1 + s0))
        f: i64[s0] = slice.Tensor(self=d, dim=0, start=0, end=s0)
        g: i64[s0] = sub.Tensor(self=e, other=f)
        h: bool[s0] = ne.Scalar(self=g, other=1)
        i: i64[s0] = cumsum.default(self=h, dim=0)
        j: bool[s0] = eq.Scalar(self=i, other=0)
        y: bool[s0] = logical_not.default(self=j)
        return y""",
    "a triangle": """
        a: bool[s0, s1] = full.default(size=[s0, s1], fill_value=True, dtype='bool', device='main')
        y: bool[s0, s1] = tril.default(self=a)
        return y""",
    "above a triangle": """
        a: bool[s0, s1] = full.default(size=[s0, s1], fill_value=True, dtype='bool', device='main')
        b: bool[s0, s1] = triu.default(self=a, diagonal=1)
        y: bool[s0, s1] = bitwise_not.default(self=b)
        return y""",
    "taken by positions": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[s0] = add.Tensor(self=a, other=7)
        c: i64[s0, 1] = unsqueeze.default(self=a, dim=1)
        d: i64[s0, 1] = index.Tensor(self=b, indices=[c])
        y: bool[s0, 1] = gt.Scalar(self=d, other=6)
        return y""",
    "repeated": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[1, s0] = unsqueeze.default(self=a, dim=0)
        y: i64[s1, s0] = repeat.default(self=b, repeats=[s1, 1])
        return y""",
}
UNKNOWN = {
    "a window": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[s0, 1] = unsqueeze.default(self=a, dim=1)
        c: bool[s0, s0] = le.Tensor(self=a, other=b)
        d: i64[s0, 1] = sub.Tensor(self=b, other=4)
        e: bool[s0, s0] = gt.Tensor(self=a, other=d)
        y: bool[s0, s0] = bitwise_and.Tensor(self=c, other=e)
        return y""",
    "behind each other": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[1] = full.default(size=[1], fill_value=-1, dtype='i64', device='main')
        y: i64[(1 + s0)] = cat.default(tensors=[b, a])
        return y""",
    "a diagonal": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[s0, 1] = unsqueeze.default(self=a, dim=1)
        y: bool[s0, s0] = eq.Tensor(self=a, other=b)
        return y""",
    "bits of numbers": """
        a: i64[s0] = arange.default(end=s0, device='main')
        y: i64[s0] = bitwise_and.Scalar(self=a, other=1)
        return y""",
    "sums of all before": """
        a: i64[s0] = arange.default(end=s0, device='main')
        y: i64[s0] = cumsum.default(self=a, dim=0)
        return y""",
    "from the end": """
        a: i64[s0] = arange.default(end=s0, device='main')
        b: i64[s0] = sub.Tensor(self=a, other=1)
        y: i64[s0] = index.Tensor(self=a, indices=[b])
        return y""",
    "narrow numbers": """
        a: i64[s0] = arange.default(end=s0, device='main')
        y: i8[s0] = _to_copy.default(self=a, dtype='i8')
        return y""",
    "an input": """
        x: bool[s0]
        y: bool[s0] = logical_not.default(self=x)
        return y""",
}


def number(element: Element, values: dict[str, int]) -> int:
    """The element where positions and dims have these values."""
    index = element if isinstance(element, Index) else element.index
    found = substitute(index, {name: constant(value) for name, value in values.items()}).number
    assert found is not None
    return int(found >= 0) if isinstance(element, AtLeastZero) else found


def formula(text: str) -> tuple[Graph, Position, Element | None]:
    """A graph, the variables for positions in its result, and the element there."""
    graph = body(ROWS + text.strip())
    (value,) = graph.outputs
    assert isinstance(value, Value)
    return graph, *Positions(graph).element(value)


@pytest.mark.parametrize("text", KNOWN.values(), ids=KNOWN)
def test_the_formula_is_the_call(text: str) -> None:
    graph, position, element = formula(text)
    assert element is not None
    for sizes in itertools.product((1, 2, 5), (1, 3, 6)):
        dims = dict(zip(("s0", "s1"), sizes, strict=True))
        (called,) = compile_graph(bind(graph, dims), torch.device("cpu"))([], ())
        for place in itertools.product(*map(range, called.shape)):
            named = {str(at): p for at, p in zip(position, place, strict=True)}
            assert number(element, named | dims) == int(called[place]), (dims, place)


@pytest.mark.parametrize("text", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known(text: str) -> None:
    *_, element = formula(text)
    assert element is None


@pytest.mark.parametrize(("dtype", "start", "known"), [("f16", 0, True), ("f16", 1, True), ("c64", 0, False)])
def test_where_elements_are_taken(dtype: str, start: int, known: bool) -> None:
    """Kernels have no complex numbers: nothing is known of these."""
    graph = body(f"""dim s0 = 1, 64, 1
        x: {dtype}[(1 + s0)]
        a: i64[s0] = arange.start(start={start}, end=(s0 + {start}), device='main')
        y: {dtype}[s0] = index.Tensor(self=x, indices=[a])
        return y""")
    position, there = Positions(graph).taken(graph.nodes[-1])
    assert there == ((position[0] + constant(start),) if known else None)
