"""Results that share memory with one another, with inputs and with parameters, as they do in the model: seen by writing
to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from torch import nn

import torch_rtx
from tests.helpers.ahead import Function, through_file
from tests.helpers.compiled import compile_rtx, same
from torch_rtx.irparse import parse
from torch_rtx.runtime.code import compile_graph

SOURCES: dict[str, Callable[[Any, Any], Any]] = {
    "input": lambda model, x: x,
    "parameter": lambda model, x: model.weight,
    "zeros": lambda model, x: torch.zeros(3, 2),
    "literal": lambda model, x: torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    "computed": lambda model, x: model.weight.double().exp().float(),
    "linear": lambda model, x: model.linear(x),
    "conv": lambda model, x: model.conv(x[None, None]),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "add": lambda t: t + 1,
    "clone": lambda t: t.clone(),
    "cast": lambda t: t.to(torch.float64).to(torch.float32),
    "reshape": lambda t: t.reshape(-1),
    "transpose": lambda t: t.transpose(0, -1) if t.dim() else t,
    "first": lambda t: t[0] if t.dim() else t.view(1),
    "rest": lambda t: t[1:] if t.dim() else t,
    "detach": lambda t: t.detach(),
    "same": lambda t: t.view(t.shape),
    "expand": lambda t: t.expand(2, *t.shape),
    "contiguous": lambda t: t.contiguous(),
    "to": lambda t: t.to(torch.float32),
    "chunk": lambda t: t.chunk(2)[0] if t.dim() else t,
    "bits": lambda t: t.view(torch.int32).view(torch.float32),
    "write": lambda t: t if overlaps(t) or isinstance(t, nn.Parameter) else t.add_(1),
}
VIEWS = [name for name in CALLS if name not in ("add", "clone", "cast", "write")]


def overlaps(t):
    return any(size > 1 and not stride for size, stride in zip(t.shape, t.stride(), strict=True))


@dataclass(frozen=True)
class Plan:
    """`steps`: a call and the number of the value that it takes; values are the sources, then the results of calls.
    `results`: numbers of values; `writes`: numbers of results that the caller adds to."""

    sources: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]
    results: tuple[int, ...]
    writes: tuple[int, ...]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sources = draw(st.lists(st.sampled_from(list(SOURCES)), min_size=1, max_size=3))
    names = st.sampled_from(list(CALLS)) | st.sampled_from(VIEWS)
    count, steps = len(sources), []
    for _ in range(draw(st.integers(1, 6))):
        steps.append((draw(names), draw(st.integers(0, count - 1))))
        count += 1
    results = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
    writes = draw(st.lists(st.integers(0, len(results) - 1), min_size=1, max_size=4))
    return Plan(tuple(sources), tuple(steps), tuple(results), tuple(writes))


class Model(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.linear, self.conv = plan, nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
        self.weight = nn.Parameter(torch.ones(3, 2))
        for index, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, 0.25 * (1 + index))

    def forward(self, x):
        values = [SOURCES[name](self, x) for name in self.plan.sources]
        for name, index in self.plan.steps:
            values.append(CALLS[name](values[index]))
        return [values[index] for index in self.plan.results]


def record(call, model, plan):
    """Results, input and parameters after each of three calls, between which the caller writes to results."""
    x, found = torch.arange(6.0).view(3, 2), []
    with torch.no_grad():
        for _ in range(3):
            results = call(x)
            for index in plan.writes:
                if not overlaps(results[index]):
                    results[index].add_(2)
            found.append([tensor.clone() for tensor in (*results, x, *model.parameters())])
    return found


def checked(plan, compiled):
    note(plan)
    try:
        expected = record(eager := Model(plan), eager, plan)
    except RuntimeError:
        return  # such as a write to a view of a parameter
    torch._dynamo.reset()
    model = Model(plan)
    same(record(compiled(model), model, plan), expected)


@settings(max_examples=6)
@example(Plan(("parameter", "input"), (("add", 0), ("first", 2)), (2, 3), (0,)))
@example(Plan(("zeros",), (("first", 0), ("reshape", 0)), (0, 1, 2), (0, 2)))
@given(plans())
def test_results_of_torch_compile(plan):
    checked(plan, compile_rtx)


@settings(max_examples=6)
@example(Plan(("input",), (("write", 0), ("same", 1), ("rest", 1)), (1, 2, 3, 3), (0, 2)))
@example(Plan(("literal", "computed"), (("reshape", 0), ("first", 1)), (0, 2, 1, 3), (1, 3)))
@given(plans())
def test_results_of_an_engine(plan):
    checked(plan, lambda model: torch_rtx.compile(model, (torch.arange(6.0).view(3, 2),)))


def copied(x, y):
    z = y + 1
    x.copy_(z)
    return z, x, x.view(-1)


def assigned(x, y):
    x[:] = y
    y.mul_(2)
    return y, x[0], x


@pytest.mark.parametrize("f", [copied, assigned])
def test_an_engine_returns_the_input_that_it_writes_to(f):
    module = torch_rtx.compile(Function(f), (torch.ones(2, 3), torch.ones(2, 3)))
    places = []
    for call in (f, module):
        x, y = torch.ones(2, 3), torch.full((2, 3), 2.0)
        addresses = [tensor.data_ptr() for tensor in (x, y, *call(x, y))]
        places.append([addresses.index(address) for address in addresses])
    assert places[0] == places[1]


def conjugates(x):
    y = x * 2
    z = y.conj()
    return y, z, z[1:], z.imag, (x * 3).conj()


@pytest.mark.parametrize("ahead", [False, True])
def test_conjugates_share_memory(ahead):
    """No type expresses a pending conjugation; a result that nothing else shares is a plain tensor."""
    x = torch.complex(torch.arange(3.0), torch.ones(3))
    torch._dynamo.reset()
    call = torch_rtx.compile(Function(conjugates), (x,)) if ahead else compile_rtx(conjugates)
    for _ in range(2):
        found, expected = call(x), conjugates(x)
        assert not found[-1].is_conj()
        for results in (found, expected):
            results[0].mul_(1j)
            results[2].add_(1j)
        torch.testing.assert_close(found, expected)


def test_what_a_file_holds_is_not_the_callers(tmp_path):
    """A tensor attribute, and views of it: an engine has data of its own."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.arange(6.0)

        def forward(self, x):
            return x + self.table, self.table, self.table[2:], self.table.view(2, 3)

    engine = through_file(torch_rtx.compile(Table(), (torch.ones(6),)), tmp_path)
    for _ in range(2):
        total, whole, part, rows = engine(torch.ones(6))
        assert total.tolist() == [1, 2, 3, 4, 5, 6]
        whole[3] = 30
        part[0] = 20
        assert rows.tolist() == [[0, 1, 20], [30, 4, 5]]


def test_results_that_a_library_call_lays_out_otherwise():
    """The call returns other strides than the capture promised; its views are views all the same."""
    text = """
graph fused {
  input x: f32[2, 3]
  a: f32[2, 3](1, 2) = extern aten.add.Scalar(self=x, other=1)
  c: f32[2](1) = view aten.select.int(self=a, dim=1, index=0)
  return [a, c]
}
"""
    run = compile_graph(parse(text.strip()), torch.device("cpu"))
    whole, part = run([torch.zeros(2, 3)], ())
    assert whole.stride() == (1, 2)
    part.fill_(5)
    assert whole.tolist() == [[5, 1, 1], [5, 1, 1]]
