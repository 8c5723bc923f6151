"""Weights on a GPU: writes of every kind are seen, and a refit is all or nothing, across streams and threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.ahead import IMAGE, Net
from tests.runtime.test_batched_recipes import EXACT, check_bits
from torch_rtx import RuntimeSettings
from torch_rtx.runtime.watch import DeviceSample
from torch_rtx.runtime.weights import WeightStore

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unspecialized")]
TURNS = 15  # plain calls, captured calls, and calls whose comparison is captured


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def through_data(model: nn.Module) -> None:
    model.v.weight.data.mul_(-1)
    model.conv.weight.data.mul_(1.1)


def average(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(torch.ones_like(parameter), alpha=0.1)


WRITES: list[Callable[[nn.Module], object]] = [
    through_data,
    average,
    lambda m: m.bn.running_var.data.mul_(1.5),
    lambda m: m.v.bias.data[2].add_(9),
    lambda m: m.q.weight.add_(1),
    lambda m: None,
]


@pytest.mark.parametrize("how", ["torch.compile", "engine", "engine of a model in host memory"])
def test_every_write_is_seen_by_the_next_call(how: str) -> None:
    model, x = Net().eval().cuda(), IMAGE.cuda()
    if how == "torch.compile":
        module = torch.compile(model, backend="rtx", options={"copy_weights": True})
    else:
        module = torch_rtx.compile(model, (x,))
    if how == "engine of a model in host memory":
        model = model.cpu()
        module.attach(model)
    device = next(model.parameters()).device
    results = []
    for turn in range(TURNS):
        WRITES[turn % len(WRITES)](model)
        results.append((module(x).to(device), model(x.to(device))))
    for actual, expected in results:  # nothing waits between calls
        close(actual, expected)


def test_a_call_runs_again_only_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval().cuda(), IMAGE.cuda()
    module = torch_rtx.compile(model, (x,))
    for _ in range(TURNS):
        module(x)
    watch = module.session.store.watch
    assert watch is not None
    assert isinstance(watch.late[0], DeviceSample)
    settled: list[bool] = []
    settle = WeightStore.settle
    monkeypatch.setattr(WeightStore, "settle", lambda *args: (settled.append(settle(*args)), settled[-1])[1])
    module(x)
    through_data(model)
    module(x)
    assert settled == [False, True]


def test_a_capture_of_the_caller() -> None:
    model, x = Net().eval().cuda(), IMAGE.cuda()
    compiled = torch.compile(model, backend="rtx", options={"copy_weights": True})
    for _ in range(TURNS):
        compiled(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compiled(x)
    for _ in range(3):
        through_data(model)
        close(compiled(x), model(x))
        graph.replay()
        close(result, model(x))


@pytest.mark.parametrize("streams", [False, True])
def test_a_refit_is_all_or_nothing(streams: bool) -> None:
    models, x = [Net().eval().cuda() for _ in range(3)], IMAGE.cuda().repeat(32, 1, 1, 1)
    module = torch_rtx.compile(models[0], (x,))
    expected, stop = [model(x) for model in models], threading.Event()
    torn: list[torch.Tensor] = []
    failures: list[Exception] = []

    def call() -> None:
        try:
            stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.no_grad(), torch.cuda.stream(stream):
                while not stop.is_set():
                    result = module(x)
                    if not any(torch.allclose(result, one, atol=1e-3) for one in expected):
                        torn.append(result)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(300):
        module.refit(models[turn % 3])
    stop.set()
    for thread in threads:
        thread.join()
    assert (torn, failures) == ([], [])
    close(module(x), expected[299 % 3])


def test_copies_and_methods() -> None:
    model, other, x = Net().eval().cuda(), Net().eval().cuda(), IMAGE.cuda()
    module = torch_rtx.compile(model, (x,))
    before = [module(x) for _ in range(TURNS)][-1]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.device == module.device
        for _ in range(TURNS):
            close(copied(x), before)
        copied.refit(other)
        close(copied(x), other(x))
        close(module(x), before)
    assert module.cuda() is module.to("cuda") is module
    with pytest.raises(torch_rtx.RtxError, match="can't move to cpu"):
        module.cpu()


def test_the_opt_out() -> None:
    model, x = Net().eval().cuda(), IMAGE.cuda()
    module = torch_rtx.compile(model, (x,), runtime=RuntimeSettings(watch_weights=False))
    before = module(x)
    model.conv.weight.data.mul_(2)
    assert torch.equal(module(x), before)
    assert not module.session.store.watch.late  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", [None, "50%"])
@pytest.mark.parametrize("how", ["host memory", "device memory", "copies", "not kept"])
def test_unloading_frees_memory(how: str, budget: str | None) -> None:
    """Also that of CUDA graphs, which are captured again."""
    model, x = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).eval(), torch.randn(4, 1024, device="cuda")
    expected = model(x.cpu())
    runtime = RuntimeSettings(weight_streaming_budget=budget)
    module = torch_rtx.compile(copy.deepcopy(model).cuda(), (x,), runtime=runtime)
    if how == "host memory":
        module.attach(model)
    elif how != "device memory":
        module.refit(model)
    for _ in range(2):
        for _ in range(5):
            close(module(x).cpu(), expected)
        torch_rtx.wait()  # measuring tactics takes memory, too
        close(module(x).cpu(), expected)
        torch.cuda.synchronize()
        used, weights = torch.cuda.memory_allocated(), sum(p.nbytes for p in model.parameters())
        module.session.unload_weights(keep=how != "not kept")
        assert torch.cuda.memory_allocated() <= used - (weights if budget is None else weights // 3)
        pool = module.session.pool
        assert pool is None or not pool.captured
        with pytest.raises(torch_rtx.RtxError, match="unloaded" if how != "not kept" else "weight-stripped"):
            module(x)
        if how == "not kept":
            module.refit(model)
        module.session.load_weights()
    for _ in range(5):
        close(module(x).cpu(), expected)
    assert pool is not None
    assert pool.captures >= 3


def test_unloading_while_streams_call() -> None:
    """Memory that is freed belongs to others at once: no call may still read it."""
    model, x = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).eval(), torch.randn(64, 2048, device="cuda")
    module = torch_rtx.compile(copy.deepcopy(model).cuda(), (x,))
    module.attach(model)
    expected, stop = module(x), threading.Event()
    wrong: list[object] = []

    def call() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            while not stop.is_set():
                try:
                    result = module(x)
                    wrong.extend([] if torch.allclose(result, expected, atol=1e-3) else [result])
                except torch_rtx.RtxError as error:
                    wrong.extend([] if "unloaded" in error.message else [error])
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        module.session.unload_weights()
        for parameter in model.parameters():  # in the memory that is free now
            torch.full_like(parameter, float("nan"), device="cuda")
        module.session.load_weights()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("layout", ["f32[5, 7]", "f32[5, 7](1, 5)"])
@pytest.mark.parametrize("calls", EXACT.values(), ids=EXACT)
def test_recipes_that_run_together_give_the_bits_of_each_alone(calls: str, layout: str) -> None:
    check_bits(calls, layout, torch.device("cuda", 0))
