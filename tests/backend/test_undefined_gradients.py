"""Gradients of results that no loss depends on: as in eager mode, nothing is computed from them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain, combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.caching import Traffic
from tests.helpers.compiled import Recorder, compile_rtx
from torch_rtx.backend.undefined_gradients import defined, without

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def traffic(caplog: pytest.LogCaptureFixture) -> Traffic:
    return Traffic(caplog)


class Heads(nn.Module):
    """Three results, which share a layer; the last depends on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.relu(self.body(x))
        first, second = self.first(hidden), F.layer_norm(self.second(hidden), [3])
        return first, second.double(), first.square().mean()


def subsets(count: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(count), k) for k in range(1, count + 1)))


def step(call: Callable[..., Any], x: Tensor, used: Sequence[int], **options: bool) -> None:
    results = call(x)
    sum((i + 1) * results[i].sum() for i in used).backward(**options)  # type: ignore[union-attr]


def same(got: nn.Module, expected: nn.Module) -> None:
    """Both have the same gradients, and the same parameters have none."""
    for (name, one), other in zip(expected.named_parameters(), got.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)
    got.zero_grad()
    expected.zero_grad()


def check(call: Callable[..., Any], model: nn.Module, used: Sequence[int], *size: int, **options: bool) -> None:
    """One step of `model` by `call` and one in eager mode."""
    own, x = copy.deepcopy(model), torch.randn(size or (4, 8))
    step(call, x, used, **options)
    step(own, x, used)
    same(model, own)


@pytest.mark.parametrize("first", [(2,), (0, 1)], ids=str)
def test_any_results_are_used(first: tuple[int, ...], traffic: Traffic) -> None:
    """Also in a process that finds the capture of another one, whose loss depended on the results `first`."""
    for order in ((first, *subsets(3)), subsets(3)):
        torch._dynamo.reset()
        model = Heads()
        call = compile_rtx(model)
        for used in order:
            check(call, model, used)
    assert any("without a capture" in message for message in traffic("hit"))


def test_only_what_is_used_is_computed(recorder: Recorder) -> None:
    model = Heads()
    call = compile_rtx(model)
    check(call, model, (1,))
    (backward,) = [session.graph for session in recorder.sessions[1:]]
    assert sum("mm" in node.op for node in backward.nodes) == 3  # of `second` both, of `body` the weight's
    assert not any("full" in node.op or "zeros" in node.op for node in backward.nodes)


def test_results_that_are_views_and_inputs_that_are_written() -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            first, second, loss = super().forward(x)
            self.body.bias.data.add_(0)
            return first.view(-1), first[:2], loss, x, second

    model = Model()
    call = torch.compile(model, backend="rtx")
    for used in ((0,), (1,), (0, 1), (2,), (4,), (0, 2, 4)):
        check(call, model, used)


@pytest.mark.parametrize(
    "views",
    [lambda a, b, c: (a.view(-1), b.t(), c), lambda a, b, c: (a[1:], a.t(), b[0], b[1:], c)],
    ids=["one each", "several"],
)
def test_results_that_are_all_views(views: Callable[..., tuple[Tensor, ...]]) -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            first, second, _ = super().forward(x)
            return views(first, second, self.second(x).t())

    model = Model()
    call = torch.compile(model, backend="rtx")
    for used in ((0,), (1,), (0, 1), (2,)):
        check(call, model, used)


def test_sizes_that_change() -> None:
    model = Heads()
    call = torch.compile(model, backend="rtx", dynamic=True)
    for rows, used in enumerate(subsets(3), 3):
        check(call, model, used, rows, 8)


def test_a_graph_that_is_kept_and_two_forwards() -> None:
    model = Heads()
    own, x = copy.deepcopy(model), torch.randn(4, 8)
    for call in (compile_rtx(model), own):
        results, others = call(x), call(x + 1)
        results[2].backward(retain_graph=True)
        others[0].sum().backward()
        (results[0].sum() + results[2]).backward()
    same(model, own)


@pytest.mark.parametrize("warm", [False, True])
def test_compiled_autograd(warm: bool) -> None:
    for round_ in range(2) if warm else (1,):
        torch._dynamo.reset()
        model = Heads()
        own, x = copy.deepcopy(model), torch.randn(4, 8)
        call = compile_rtx(model)
        results = call(x)
        with torch._dynamo.compiled_autograd._enable(lambda gm: gm) if round_ else nullcontext():
            (3 * results[2]).backward()
        step(own, x, (2,))
        for parameter in own.parameters():  # compiled autograd returns zeros where eager mode has no gradient
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None and round_ else parameter.grad
        same(model, own)


def test_a_function_with_one_result_gets_no_gradient_either() -> None:
    """As before a graph break: the next function has no gradient for it."""
    model, before = Heads(), nn.Linear(8, 8)
    first = torch.compile(before, backend="rtx")
    call = torch.compile(lambda x, y: (*model(x), y * model.first.weight.sum()), backend="rtx")
    for used, has_gradient in (((3,), False), ((2,), True), ((2, 3), True), ((3,), False)):
        results = call(first(torch.randn(4, 8)), torch.randn(4, 8))
        sum(results[i].sum() for i in used).backward()  # type: ignore[union-attr]
        assert [parameter.grad is not None for parameter in before.parameters()] == [has_gradient] * 2
        before.zero_grad()


def test_threads_of_a_process_that_finds_the_capture() -> None:
    """While one captures the backward graph for its set of gradients, the others call what is compiled."""
    model, errors = Heads(), list[BaseException]()
    step(compile_rtx(model), torch.randn(4, 8), (2,))
    torch._dynamo.reset()
    call = compile_rtx(model)
    step(call, torch.randn(4, 8), (2,))

    def work(first: int) -> None:
        try:
            for used in 2 * [*subsets(3)[first:], *subsets(3)[:first]]:
                results = call(torch.randn(4, 8))
                total = sum(results[i].sum() for i in used)
                torch.autograd.grad(total, list(model.parameters()), allow_unused=True)  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_result_of_an_earlier_call_is_passed_on() -> None:
    """The backward of another compiled function, which may not take None, keeps its zeros."""
    model, before = Heads(), nn.Linear(8, 8)
    first, call = torch.compile(before, backend="aot_eager"), torch.compile(lambda x: (x, *model(x)), backend="rtx")
    step(call, first(torch.randn(4, 8)), (3,))
    assert before.weight.grad is not None


# ---- the graph ---------------------------------------------------------------------------------------------------


def graph_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """`function` as a backward graph whose inputs are all gradients that may be undefined."""
    args = [torch.ones(shape) for shape in shapes]
    gm = make_fx(lambda *given: function(*given))(*args)
    for node in gm.graph.nodes:
        node.meta.setdefault("val", None)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), args, strict=True):
        with gm.graph.inserting_after(node):
            made = gm.graph.call_function(defined, (node, list(value.shape), value.dtype, value.device))
        made.meta["val"] = node.meta["val"] = value
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    return gm


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "sums": (lambda a, b: (a + b, a - b, b - a, torch.add(a, b, alpha=3)), ((3,), (3,))),
    "sums of other sizes": (lambda a, b: (a + b, b.double() + a), ((2, 3), (3,))),
    "products": (lambda a, b: (a @ b, a * b.t(), torch.exp(a)), ((2, 3), (3, 2))),
    "parts": (lambda a, b: (torch.cat([a, b]), torch.stack([a, a]), torch.where(a > 0, a, b), b.sum(0)), ((3,), (3,))),
    "several results": (
        lambda a, b: (*torch.split(a, 1), torch.native_layer_norm(b, [3], a, None, 0.1)[0]),
        ((3,), (3,)),
    ),
    "others": (lambda a, b: (a.cumsum(0) + b.cos(), torch.maximum(a, b), a.exp() * b.exp()), ((3,), (3,))),
    "writes to zeros": (
        lambda a, b: (
            torch.where(b > 0, torch.zeros(3), a) + b,
            torch.index_put(torch.zeros(3), [torch.tensor([2, 0, 1])], a, True) + b,
            torch.zeros(5).slice_scatter(a, 0, 1, 4)[1:4] + b,
            torch.zeros(3).scatter_add(0, torch.tensor([1, 1, 0]), a) + b,
            F.pad(a, (2, 0))[:3] + b,
            F.pad(a, (2, 0), value=1.0)[:3] + b,
            a.masked_fill(torch.tensor([True, False, True]), 0.0) + b,
            a.masked_fill(torch.tensor([True, False, True]), 2.0) + b,
            torch.ones(3).index_add(0, torch.tensor([0, 0, 2]), a) + b,
            torch.round(a),
        ),
        ((3,), (3,)),
    ),
}


def depends(function: Callable[..., Any], values: Sequence[Tensor], on: Sequence[int]) -> list[bool]:
    """Whether autograd reaches the values at the positions `on`, by result."""
    given = [value.clone().requires_grad_(i in on) for i, value in enumerate(values)]
    return [result.requires_grad for result in function(*given)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1)], ids=str)
def test_what_is_zero(name: str, missing: tuple[int, ...]) -> None:
    function, shapes = FUNCTIONS[name]
    values = [torch.zeros(shape) if i in missing else torch.randn(shape) for i, shape in enumerate(shapes)]
    results = without(graph_of(function, *shapes), missing)(
        *[None if i in missing else value for i, value in enumerate(values)]
    )
    others = [i for i in range(len(values)) if i not in missing]
    undefined, given = depends(function, values, missing), depends(function, values, others)
    assert [result is None for result in results] == [a and not b for a, b in zip(undefined, given, strict=True)]
    for result, right in zip(results, function(*values), strict=True):
        if result is not None:
            torch.testing.assert_close(result, right)


def test_what_is_written_to_zeros_is_not_computed() -> None:
    function, shapes = FUNCTIONS["writes to zeros"]
    graph = without(graph_of(lambda a, b: [function(a, b)[i] for i in (0, 1, 2, 3, 4, 6)], *shapes), (0,))
    (output,) = graph.graph.find_nodes(op="output")
    assert set(output.args[0]) == {graph.graph.find_nodes(op="placeholder")[1]}


def test_a_parameter_has_no_gradient_whatever_computes_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 8)) for _ in range(6)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            a, b, c, d, e, f = (weight * x for weight in self.weights)
            return a.max(1).values, b[[0, 2, 2]], c.cumsum(1), d.split(4, 1)[1], e.clamp(0), F.pad(f, (1, 2))

    model = Model()
    call = torch.compile(model, backend="rtx")
    for used in ((0, 1), (2, 5), (3, 4)):
        check(call, model, used)
