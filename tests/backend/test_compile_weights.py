"""Weights under torch.compile(backend="rtx") are live: a call sees every change, and computes no more than it must."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_rtx
from tests.helpers.compiled import compile_rtx, counted, same
from torch_rtx.runtime import watch, weights
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore


@pytest.fixture(autouse=True)
def _inference(fresh_dynamo):
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Two recipes: a batch norm folded into its convolution (weight, bias), and merged projections (weight, bias)."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        for tensor in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias):
            tensor.uniform_(0.5, 1.5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


COPY = {"copy_weights": True}  # merged projections as well, which torch.compile leaves apart of itself
X = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
CONV, QKV = {"conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv.bias"}, {"q", "k", "v"}


class Made(list):
    """The parameters of each recipe that ran, in order."""

    def __init__(self, monkeypatch):
        original = WeightStore._run

        def run(store, batch, *given):
            self.extend(store.weights[index].names for group in batch for index in group)
            return original(store, batch, *given)

        monkeypatch.setattr(WeightStore, "_run", run)
        monkeypatch.setattr(weights, "AUDIT_GAP", float("inf"))

    def since(self):
        """Which of the two parts were computed since the last question, and how many recipes ran."""
        parts = {"conv" if CONV.intersection(names) else "qkv" for names in self}
        count = len(self)
        self.clear()
        return parts, count


@pytest.fixture
def made(monkeypatch):
    return Made(monkeypatch)


@pytest.fixture
def net():
    model = Net().eval()
    return model, compile_rtx(model, options=COPY)


def test_patterns_are_in_the_graph(net, recorder, made):
    model, compiled = net
    same(compiled(X), model(X))
    assert "_native_batch_norm_legit_no_training" not in recorder.ops
    assert recorder.ops.count("linear") == 2  # q, k and v are one
    assert made.since() == ({"conv", "qkv"}, 4)
    same(compiled(X), model(X))
    assert made.since() == (set(), 0)


def add(model):
    model.q.weight.add_(0.5)


def merge_adapter(model):
    model.v.weight.add_(torch.ones(8, 1) @ torch.ones(1, 8), alpha=0.1)


def load(model):
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def step(model):
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "add_": (add, {"qkv"}, 1),
    "adapter": (merge_adapter, {"qkv"}, 1),
    "copy_": (lambda m: m.k.bias.copy_(torch.ones(8)), {"qkv"}, 1),
    "element": (lambda m: m.k.weight.__setitem__((0, 0), 9.0), {"qkv"}, 1),
    "view": (lambda m: m.k.weight.detach().view(-1)[3:].zero_(), {"qkv"}, 1),
    "identity": (lambda m: m.out.weight.mul_(2), set(), 0),
    "gamma": (lambda m: m.bn.weight.mul_(2), {"conv"}, 2),
    "beta": (lambda m: m.bn.bias.mul_(2), {"conv"}, 1),
    "statistics": (lambda m: m.bn.running_mean.add_(1), {"conv"}, 1),
    "load_state_dict": (load, {"conv", "qkv"}, 4),
    "optimizer": (step, {"conv", "qkv"}, 4),
    "init": (lambda m: nn.init.normal_(m.conv.weight), {"conv"}, 1),
    "data_of_another": (lambda m: setattr(m.q.weight, "data", torch.ones(8, 8)), None, None),
    "new_parameter": (lambda m: setattr(m.q, "weight", nn.Parameter(torch.ones(8, 8))), None, None),
    "no_change": (lambda m: m.q.weight.sum(), set(), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen_by_the_next_call(name, net, made):
    model, compiled = net
    compiled(X)
    made.clear()
    change, parts, count = CHANGES[name]
    change(model)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)
    if parts is not None:
        assert made.since() == (parts, count)
    made.clear()
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)
    assert made.since() == (set(), 0)


def test_back_to_the_first_weights_is_bit_for_bit(net, recorder):
    model, compiled = net
    first, other = copy.deepcopy(model.state_dict()), Net().state_dict()
    a = compiled(X)
    model.load_state_dict(other)
    b = compiled(X)
    model.load_state_dict(first)
    assert torch.equal(compiled(X), a)
    assert not torch.equal(a, b)
    assert len(recorder) == 1
    torch._dynamo.reset()
    model.load_state_dict(other)
    assert torch.equal(compile_rtx(model, options=COPY)(X), b)  # as if it had been compiled with them


def used_stores(monkeypatch):
    """A list that gets the store of each call."""
    stores, update = [], WeightStore.update

    def record(store, tensors):
        stores.append(store)
        update(store, tensors)

    monkeypatch.setattr(WeightStore, "update", record)
    return stores


def test_computed_weights_keep_their_addresses(net, monkeypatch):
    """Captured CUDA graphs read them there."""
    model, compiled = net
    stores = used_stores(monkeypatch)
    compiled(X)
    store = stores[-1]
    addresses, generation = [value.data_ptr() for value in store.values], store.generation
    add(model)
    load(model)
    compiled(X)
    assert stores[-1] is store
    assert [value.data_ptr() for value in store.values] == addresses
    assert store.generation == generation


def test_identity_weights_take_no_memory(net, monkeypatch):
    model, compiled = net
    stores = used_stores(monkeypatch)
    compiled(X)
    aliased = {value.data_ptr() for value in stores[-1].values}
    assert {model.out.weight.data_ptr(), model.out.bias.data_ptr()} <= aliased


def test_other_dtype_compiles_again():
    model = Net().eval()
    compiled, counter = counted(model)
    compiled(X)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        same(compiled(X.to(dtype)), model(X.to(dtype)), atol=2e-2, rtol=2e-2)
    model.to(torch.float32)
    same(compiled(X), model(X))
    assert counter.frame_count == 3


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x) * 2 + self.c(x)

    model, x = Tied(), torch.randn(2, 4)
    compiled = compile_rtx(model, options=COPY)
    for _ in range(3):
        same(compiled(x), model(x))
        model.b.weight.add_(1)
        model.b.bias.mul_(2)


def test_weights_made_in_inference_mode(made):
    """They have no version counter, so that what depends on them is computed for each call."""
    with torch.inference_mode():
        model = Net().eval()
        compiled = compile_rtx(model, options=COPY)
        same(compiled(X), model(X))
        add(model)
        same(compiled(X), model(X))
        made.clear()
        same(compiled(X), model(X))
        assert made.since() == ({"conv", "qkv"}, 4)


def test_adapter_on_and_off():
    """A low-rank adapter that is merged and taken off again, between calls, many times."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    compiled, x = compile_rtx(model, options=COPY), torch.randn(3, 8)
    delta, base = torch.randn(8, 2) @ torch.randn(2, 8), model[0].weight.clone()
    results = []
    for _ in range(3):
        model[0].weight.copy_(base)
        results.append(compiled(x))
        model[0].weight.add_(delta)
        same(compiled(x), model(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Many modules, one graph ---------------------------------------------------------------------------------------------


def test_modules_of_the_same_code_share_a_graph_but_no_weights(made, recorder):
    """Regional compilation: Dynamo compiles the first block only, and each block keeps weights of its own."""
    blocks = [Net().eval() for _ in range(3)]
    for block in blocks:
        block.compile(backend="rtx", fullgraph=True, options=COPY)
    expected = [block.forward(X) for block in blocks]
    for _ in range(3):
        same([block(X) for block in blocks], expected, atol=1e-5, rtol=1e-4)
    assert len(recorder) == 1
    assert made.since() == ({"conv", "qkv"}, 4 * 3)  # each once, however the calls take turns
    add(blocks[1])
    same([block(X) for block in blocks], [block.forward(X) for block in blocks], atol=1e-5, rtol=1e-4)
    assert made.since() == ({"qkv"}, 1)


def test_modules_that_share_a_graph_called_from_threads():
    blocks = [Net().eval() for _ in range(4)]
    for block in blocks:
        block.compile(backend="rtx", fullgraph=True, options=COPY)
    expected, failures, start = [block.forward(X) for block in blocks], [], threading.Barrier(4)

    def work(index):
        start.wait()
        with torch.no_grad():
            for step in range(20):
                i = (index + step) % 4
                if not torch.allclose(blocks[i](X), expected[i], atol=1e-5):
                    failures.append((index, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_deleted_module_is_not_kept_alive():
    blocks = [Net().eval() for _ in range(2)]
    for block in blocks:
        block.compile(backend="rtx", fullgraph=True, options=COPY)
        block(X)
    reference = weakref.ref(blocks[1].out.weight)
    expected = blocks[0](X)
    del block, blocks[1]
    gc.collect()
    assert reference() is None
    same(blocks[0](X), expected)


def test_functional_call_with_other_parameters():
    model = Net().eval()

    def f(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    compiled = torch.compile(f, backend="rtx")
    for scale in (1.0, 2.0, 0.5):
        parameters = {name: scale * p for name, p in model.named_parameters()}
        same(compiled(parameters, X), f(parameters, X), atol=1e-5, rtol=1e-4)


# What no version counter tells ---------------------------------------------------------------------------------------


def through_data(model):
    model.v.weight.data.add_(0.5)
    model.conv.weight.data *= 2


def through_numpy(model):
    model.v.bias.detach().numpy()[3] += 5


def momentum_encoder(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.5).add_(torch.ones_like(parameter), alpha=0.5)


UNSEEN = {
    "data": through_data,
    "numpy": through_numpy,
    "momentum": momentum_encoder,
    "element": lambda m: m.v.bias.data[2].add_(9),
    "statistics": lambda m: m.bn.running_var.data.mul_(3),
    "with_a_counter": lambda m: (m.v.weight.data.mul_(3), m.bn.weight.add_(1)),
}


def test_writes_without_a_version_counter_are_seen(net, made):
    model, compiled = net
    for write in UNSEEN.values():
        before = compiled(X)
        write(model)
        after = compiled(X)
        same(after, model(X), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before, after, atol=1e-3)
        made.clear()
        same(compiled(X), after)
        assert made.since() == (set(), 0)


def test_writes_to_a_flat_buffer_are_seen(made):
    model = Net().eval()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    pieces = flat.split([parameter.numel() for parameter in model.parameters()])
    for parameter, piece in zip(model.parameters(), pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    compiled = compile_rtx(model, options=COPY)
    compiled(X)
    flat.mul_(3)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)


def test_the_opt_out():
    model = Net().eval()
    compiled = compile_rtx(model, options={**COPY, "watch_weights": False})
    before = compiled(X)
    model.conv.weight.data.mul_(2)
    assert torch.equal(compiled(X), before)
    torch_rtx.refit_module_weights(compiled, model)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)


class Wide(nn.Module):
    """A computed weight of which the sample has a small part."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 512))

    def forward(self, x):
        return x @ self.weight.sin()


def test_a_write_that_misses_the_sample_is_found_and_reported(monkeypatch, caplog):
    model, x = Wide(), torch.randn(2, 512)
    compiled, stores, now = compile_rtx(model), used_stores(monkeypatch), [0.0]
    monkeypatch.setattr(weights, "perf_counter", lambda: now[0])
    with caplog.at_level("WARNING", "torch_rtx.runtime.weights"):
        before = compiled(x)
        (store,) = stores
        assert store.watch.partial
        sampled = torch.zeros(512, 512, dtype=torch.bool)
        sampled.view(-1)[watch._comb(torch.arange(512 * 512).view(512, 512), watch.HOST_WORDS)] = True
        model.weight.data[tuple((~sampled).nonzero()[7])] = 100.0
        assert torch.equal(compiled(x), before)
        assert not caplog.records
        now[0] += weights.AUDIT_GAP
        same(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        assert [record.args[0] for record in caplog.records] == ["weight"]
        now[0] += weights.AUDIT_GAP
        same(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        assert len(caplog.records) == 1
        noise = lambda *given, **named: torch.rand(512, 512)  # noqa: E731
        monkeypatch.setattr(WeightStore, "_make", noise)  # a recipe that is not deterministic proves nothing
        now[0] += weights.AUDIT_GAP
        same(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        assert len(caplog.records) == 1


class Late(watch.Sample):
    """As on a device: the comparison runs when it is launched, and the host learns of it when it waits."""

    def __init__(self, found):
        self.__dict__.update(found.__dict__)
        self.log = []

    def launch(self):
        self.log.append("launch")
        self.answer = self.differs()

    def wait(self):
        self.log.append("wait")
        return self.answer


def late(store):
    """Let the comparison of `store` run as on a device."""
    (early,) = store.watch._early
    store.watch.late, store.watch._early = [Late(early)], []
    return store.watch.late[0].log


def test_a_call_runs_again_if_the_device_finds_old_weights(monkeypatch):
    model = Net().eval()
    compiled, stores = compile_rtx(model, options=COPY), used_stores(monkeypatch)
    compiled(X)
    log, launch = late(stores[-1]), Session._launch
    monkeypatch.setattr(Session, "_launch", lambda *args: (log.append("run"), launch(*args))[1])
    same(compiled(X), model(X))
    assert log == ["launch", "run", "wait"]
    log.clear()
    through_data(model)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)
    assert log == ["launch", "run", "wait", "run"]
    log.clear()
    add(model)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)
    assert log == ["launch", "run", "wait"]  # the counter told before


@pytest.mark.parametrize("kind", ["writes", "draws"])
def test_a_call_that_must_not_run_twice_waits_first(kind, monkeypatch):
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x, total):
            y = x @ self.weight.sin()
            return y + torch.rand(()) if kind == "draws" else total.add_(y)

    model, x = Once(), torch.randn(3, 4)
    compiled, stores = compile_rtx(model), used_stores(monkeypatch)
    compiled(x, torch.zeros(3, 4))
    log, launch = late(stores[-1]), Session._launch
    monkeypatch.setattr(Session, "_launch", lambda *args: (log.append("run"), launch(*args))[1])
    model.weight.data.mul_(2)
    mine, theirs = torch.zeros(3, 4), torch.zeros(3, 4)
    torch.manual_seed(0)
    actual = compiled(x, mine)
    torch.manual_seed(0)
    same(actual, model(x, theirs), atol=1e-5, rtol=1e-4)
    same(mine, theirs, atol=1e-5, rtol=1e-4)
    assert log == ["launch", "wait", "run"]


def test_another_thread_computes_the_weights_meanwhile(monkeypatch):
    """The comparison that this thread waits for is of the new weights already; its call ran with the old ones."""
    model = Net().eval()
    compiled, stores = compile_rtx(model, options=COPY), used_stores(monkeypatch)
    compiled(X)
    store = stores[-1]
    late(store)
    through_data(model)
    pending = store.refresh()
    store._recompute(store.watch, store.writes)
    store.watch.launch()
    assert store.settle(pending)
    assert not store.settle(store.refresh())


def test_assigned_data_of_the_same_memory_is_no_change(net, made):
    model, compiled = net
    compiled(X)
    made.clear()
    model.q.weight.data = model.q.weight.data
    compiled(X)
    assert made.since() == (set(), 0)


@pytest.mark.parametrize("form", ["add_", "+=", "[]"])
def test_an_adapter_merged_through_data_is_seen(form):
    """As peft merges adapters. Linear layers use the model's own parameters, unless asked to keep a merged copy."""
    model = Net().eval()
    compiled = compile_rtx(model)
    delta = torch.randn(8, 8)
    with torch.no_grad():
        for sign in (1, -1, 1):
            if form == "add_":
                model.q.weight.data.add_(sign * delta)
            elif form == "+=":
                model.q.weight.data += sign * delta
            else:
                model.q.weight.data[2:5] += sign * delta[2:5]
            torch.testing.assert_close(compiled(X), model(X))


def test_no_second_copy_of_linear_weights(monkeypatch):
    stores = used_stores(monkeypatch)
    model = Net().eval()
    compile_rtx(model)(X)
    held = {value.data_ptr() for value in stores[-1].values}
    assert {layer.weight.data_ptr() for layer in (model.q, model.k, model.v, model.out)} <= held
