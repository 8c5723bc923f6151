"""torch.compile(backend="rtx") is eager, whatever a function does with shapes, structures and its arguments."""

import dataclasses
import gc
import linecache
import threading
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from tests.helpers.compiled import check, compile_rtx, counted, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# Shapes --------------------------------------------------------------------------------------------------------------


def attention_like(x):
    """Sizes that are derived: products in views, quotients in slices, a size as a number."""
    b, s, n = x.shape
    flat = x.view(b * s, -1)
    left, right = flat[:, : n // 2], flat[:, n // 2 :]
    return left.softmax(-1), right.mean() * s, torch.cat([left, left], 0).view(2, b, s, -1).sum(1), b * s


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_for_many_shapes(dynamic, recorder):
    compiled, counter = counted(attention_like, dynamic=dynamic)
    for shape in [(2, 3, 8), (4, 5, 10), (3, 7, 12), (5, 2, 8)]:
        check(attention_like, torch.randn(shape), runs=1, compiled=compiled)
    # Without dynamic=True the second shape tells that sizes vary.
    assert counter.frame_count == (1 if dynamic else 2)
    assert recorder.fallbacks == []


@pytest.mark.quick
def test_sizes_zero_and_one():
    compiled, counter = counted(lambda x: (x.relu().sum(0), x * 2, x.shape[0]), dynamic=True)
    for rows in (4, 1, 0, 7):
        check(lambda x: (x.relu().sum(0), x * 2, x.shape[0]), torch.randn(rows, 3), runs=1, compiled=compiled)
    assert counter.frame_count <= 3


def test_mark_dynamic(recorder):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    compiled, counter = counted(model)
    with torch.no_grad():
        for rows in (4, 9, 64):
            x = torch.randn(rows, 8)
            torch._dynamo.mark_dynamic(x, 0, min=3, max=64)
            same(compiled(x), model(x))
    assert counter.frame_count == 1
    (dim,) = [dim for dim in recorder.sessions[0].graph.inputs[-1].type.shape if not isinstance(dim, int)]
    assert (dim.min, dim.max) == (3, 64)


def test_int_arguments_become_symbolic(recorder):
    def f(x, n, scale):
        return x[:n] * scale + n, torch.full((n,), n), n + 1

    compiled, counter = counted(f)
    for n in (3, 4, 5, 6):
        check(f, torch.randn(8, 2), n, n + 1.5, runs=1, compiled=compiled)
    assert counter.frame_count <= 3


def test_shape_arithmetic(recorder):
    def f(x):
        b, c, h, w = x.shape
        y = F.pad(x, (0, -w % 4, 0, -h % 4))
        z = y.unflatten(-1, (-1, 4)).flatten(0, 1)
        return z.transpose(1, 2).reshape(b, -1), F.interpolate(x, scale_factor=2.0), torch.arange(h * w // 2), max(h, w)

    compiled, counter = counted(f, dynamic=True)
    for shape in [(2, 3, 5, 7), (3, 2, 8, 9), (2, 4, 6, 6)]:
        check(f, torch.randn(shape), runs=1, compiled=compiled)
    assert counter.frame_count <= 2


def test_input_that_is_only_a_size():
    check(lambda n: torch.arange(n) * 2, 5)
    check(lambda x: x.shape[0] * 2, torch.randn(3))


# Graph breaks --------------------------------------------------------------------------------------------------------


def test_graph_breaks(capsys, recorder):
    def f(x):
        y = x.relu() + 1
        print("between")
        return y.sum() + y

    check(f, torch.randn(4), compiled=torch.compile(f, backend="rtx"))
    assert capsys.readouterr().out == 4 * "between\n"
    assert len(recorder) == 2


def test_branch_on_data():
    def f(x):
        return x.exp() if x.sum() > 0 else x.sin() - 1

    compiled = torch.compile(f, backend="rtx")
    for sign in (1, -1, 1):
        check(f, sign * torch.ones(4), runs=1, compiled=compiled)


# Structures ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    rest: list


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    extra: dict


@pytest.mark.quick
def test_nested_arguments_and_results():
    def f(batch, *, scale, pair=None):
        x = batch.x * scale["by"][0] + batch.extra["bias"]
        return {"x": x, "more": [(x.sum(), None), Pair(x + 1, [2, "text", x * 2])], "pair": pair}

    x, bias = torch.randn(3), torch.randn(3)
    compiled = compile_rtx(f)
    for _ in range(2):
        batch = Batch(x, {"bias": bias})
        same(compiled(batch, scale={"by": (x, 3)}), f(batch, scale={"by": (x, 3)}))


def test_dataclass_result():
    def f(x):
        return Batch(x * 2, {"y": x + 1})

    x = torch.randn(3)
    same(dataclasses.asdict(compile_rtx(f)(x)), dataclasses.asdict(f(x)))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: None,
        lambda x: 3,
        lambda x: (None, x, 1.5, "a", True),
        lambda x: torch.ones(3),
        lambda x: (torch.tensor([1.0, 2.0]), torch.tensor(3)),
        lambda x: (x.numel(), x.dtype, x.device),
        lambda x: [],
    ],
    ids=["none", "int", "mixed", "ones", "literal", "attributes", "empty"],
)
def test_constant_results(f):
    check(f, torch.randn(3))


def test_constant_result_is_not_shared_between_calls():
    compiled = compile_rtx(lambda x: (torch.tensor([1.0, 2.0]), torch.ones(2) * 3))
    for result in compiled(torch.randn(1)):
        result.add_(5)
    same(compiled(torch.randn(1)), (torch.tensor([1.0, 2.0]), torch.full((2,), 3.0)))


def test_weight_result_is_not_shared_between_calls():
    """A result that only depends on parameters is a recipe's; who gets it may write to it."""
    model = nn.Linear(2, 2)
    f = compile_rtx(lambda: model.weight * 2)
    with torch.no_grad():
        f().add_(5)
        same(f(), model.weight * 2)


# Mutation and aliases ------------------------------------------------------------------------------------------------


def fill_diagonal(x):
    x.diagonal().mul_(2)
    return x.sum()


def mutate_view(x):
    y = x[1:]
    y.add_(1)
    x[0].zero_()
    return y


def mutate_twice(x):
    x.add_(1)
    y = x * 2
    x.mul_(y)
    return y


MUTATIONS = {
    "add_": lambda x: x.add_(1),
    "result_none": lambda x: (x.mul_(2), None)[1],
    "view": mutate_view,
    "diagonal": fill_diagonal,
    "twice": mutate_twice,
    "index_put": lambda x: x.__setitem__((slice(None), 0), 7.0),
    "transposed": lambda x: x.t().add_(1),
    "out": lambda x: torch.add(x, 1, out=x),
    "detached": lambda x: x.detach().add_(1),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_input(name):
    check(MUTATIONS[name], torch.arange(12.0).view(3, 4))


def test_list_and_dict_arguments_grow():
    def f(x, history, state):
        history.append(x + 1)
        state["last"] = x * 2
        return len(history)

    compiled = torch.compile(f, backend="rtx", fullgraph=True)
    ours, theirs = ([], {}), ([], {})
    for _ in range(3):
        x = torch.randn(2)
        assert compiled(x, *ours) == f(x, *theirs)
        same(ours, theirs)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("table", torch.zeros(4, 2))
        self.fc = nn.Linear(2, 2)

    def forward(self, x, i):
        self.steps += 1
        self.table.index_copy_(0, i, self.fc(x)[None])
        return self.table * self.steps


def test_mutated_buffers():
    eager, model = Counter(), Counter()
    model.load_state_dict(eager.state_dict())
    compiled = compile_rtx(model)
    with torch.no_grad():
        for i in range(4):
            x, index = torch.randn(2), torch.tensor([i])
            same(compiled(x, index), eager(x, index))
            same(model.state_dict(), eager.state_dict())


def test_kv_cache_given_as_argument(recorder):
    def step(x, keys, values, position):
        keys.index_copy_(1, position, x)
        values[:, position] = x * 2
        return F.scaled_dot_product_attention(x[:, None], keys[:, None], values[:, None])

    compiled = compile_rtx(step)
    ours, theirs = ([torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)] for _ in range(2))
    for i in range(4):
        x, position = torch.randn(2, 1, 4), torch.tensor([i])
        addresses = [cache.data_ptr() for cache in ours]
        same(compiled(x, *ours, position), step(x, *theirs, position))
        same(ours, theirs)
        assert addresses == [cache.data_ptr() for cache in ours]
    assert recorder.fallbacks == []


def test_buffer_assigned_anew():
    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x
            return x - self.mean

    eager, model = Ema(), Ema()
    compiled = compile_rtx(model)
    for _ in range(3):
        x = torch.randn(3)
        same(compiled(x), eager(x))
        same(model.mean, eager.mean)


ALIASES = {
    "input": lambda x: x,
    "input_and_more": lambda x: (x, x + 1),
    "view": lambda x: x.view(-1),
    "slice": lambda x: (x[1:], x[0]),
    "transpose_twice": lambda x: x.t().t(),
    "same_twice": lambda x: (y := x + 1, y),
    "views_of_each_other": lambda x: (y := x + 1, y[0], y.view(-1), y.t()),
    "views_of_hidden": lambda x: ((y := x + 1)[0], y[1:]),
    "chunks": lambda x: (x * 2).chunk(2, 1),
    "expanded": lambda x: (x + 1)[:1].expand(3, 4),
    "detach": lambda x: x.detach(),
    "mutated_and_view": lambda x: (x.add_(1), x[0], x.view(-1)),
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliased_results(name):
    """Besides equal values: what aliases what, seen by writing to each in turn."""
    f = ALIASES[name]
    compiled = check(f, torch.arange(12.0).view(3, 4))
    ours, theirs = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4)
    actual, expected = [compiled(ours)], [f(theirs)]
    flat_a, flat_e = ([x, *pytree.tree_leaves(out)] for x, out in ((ours, actual), (theirs, expected)))
    assert [[a is b for b in flat_a] for a in flat_a] == [[a is b for b in flat_e] for a in flat_e]
    for a, e in zip(flat_a, flat_e, strict=True):
        if 0 not in e.stride():
            a[..., :1].mul_(3)
            e[..., :1].mul_(3)
        same(flat_a, flat_e)


def test_arguments_that_alias_each_other():
    def f(x, y):
        x.add_(1)
        return x * y

    compiled = compile_rtx(f)
    for make in (lambda: (torch.ones(4), torch.ones(4)), lambda: (t := torch.ones(4), t)):
        same(compiled(*make()), f(*make()))


def test_parameter_as_result():
    model = nn.Linear(2, 2)
    compiled = compile_rtx(lambda x: (model.weight, model.weight.t(), x @ model.weight))
    with torch.no_grad():
        weight, transposed, _ = compiled(torch.ones(2, 2))
    assert weight is model.weight
    assert transposed.data_ptr() == model.weight.data_ptr()


# Life ----------------------------------------------------------------------------------------------------------------


def generated_sources():
    return sorted(file for file in linecache.cache if file.startswith("<torch_rtx"))


def test_reset_drops_what_was_compiled(recorder):
    gc.collect()
    sources = generated_sources()
    model = nn.Linear(2, 2)
    with torch.no_grad():
        compiled = compile_rtx(model)
        compiled(torch.ones(2))
    references = [weakref.ref(x) for session in recorder.sessions for x in (session, session.store, session.run)]
    references.append(weakref.ref(model.weight))
    del compiled, model
    recorder.sessions.clear()
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert set(generated_sources()) <= set(sources)  # of earlier tests, some may be gone as well


def test_deleted_module_gives_its_memory_back():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    references = [weakref.ref(model[0].weight), weakref.ref(model[0].weight.untyped_storage())]
    with torch.no_grad():
        compiled = compile_rtx(model)
        compiled(torch.ones(1, 1, 2, 2))
    del model, compiled
    gc.collect()
    assert references[0]() is None


def test_many_threads():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()).eval()
    compiled = torch.compile(model, backend="rtx", dynamic=True)
    xs = [torch.randn(2 + i, 4) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    failures, start = [], threading.Barrier(8)

    def work(index):
        start.wait()
        with torch.no_grad():
            for step in range(20):
                i = (index + step) % 8
                if not torch.allclose(compiled(xs[i]), expected[i], atol=1e-6):
                    failures.append((index, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
