"""Training under CUDA graphs on a GPU with what surrounds a step: hooks, checkpoints, scalers, wrappers, threads."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torch_rtx
from tests.runtime.pools import graph_pools
from tests.runtime.test_gpu_training import Call, Pair, batch, loss
from torch_rtx.backend.entry import rtx

pytestmark = pytest.mark.gpu


class Layers(nn.Sequential):
    """Dynamo compiles `forward` of a user's class wherever it is called from, but not that of nn.Sequential itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def small() -> Layers:
    return Layers(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda()


def rows(count: int = 16) -> Tensor:
    return torch.randn(count, 64, device="cuda")


def replays() -> int:
    """Of all graphs of training steps that are alive."""
    return sum(pool.replays for pool in graph_pools() if pool.pinned)


def close(got: nn.Module, expected: nn.Module, **tolerances: float) -> None:
    """Both have the same values and gradients."""
    for (name, one), other in zip(expected.named_parameters(), got.parameters(), strict=True):
        for a, b in ((other, one), (other.grad, one.grad)):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


# ---- steps of a model that replays -----------------------------------------------------------------------------------


def plain(call: Call, module: nn.Module, ids: Tensor) -> None:
    loss(call, ids).backward()


def accumulated(call: Call, module: nn.Module, ids: Tensor) -> None:
    module.zero_grad(set_to_none=False)
    for part in ids.repeat(3, 1).split(4):
        (loss(call, part) / 3).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.1)


def hooks_of_parameters(call: Call, module: nn.Module, ids: Tensor) -> None:
    def descends(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.01)

    handles = [p.register_hook(lambda grad: 2 * grad) for p in module.parameters()]
    handles += [p.register_post_accumulate_grad_hook(descends) for p in module.parameters()]
    for _ in range(2):
        module.zero_grad()
        loss(call, ids).backward()
    for handle in handles:
        handle.remove()


def an_error_after_the_forward(call: Call, module: nn.Module, ids: Tensor) -> None:
    with pytest.raises(KeyError):
        raise KeyError(loss(call, ids))
    loss(call, ids).backward()


def an_error_in_the_backward(call: Call, module: nn.Module, ids: Tensor) -> None:
    def fail(grad: Tensor) -> None:
        raise KeyError

    handle = next(module.parameters()).register_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError):
            loss(call, ids).backward()
    handle.remove()
    module.zero_grad()
    loss(call, ids).backward()


def saved_tensors_go_to_the_host(call: Call, module: nn.Module, ids: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        value = loss(call, ids)
    loss(call, ids).backward()
    value.backward()


def parameters_move(call: Call, module: nn.Module, ids: Tensor) -> None:
    for parameter in module.parameters():
        parameter.data = 1.01 * parameter.data
    loss(call, ids).backward()


def state_is_assigned(call: Call, module: nn.Module, ids: Tensor) -> None:
    state = {name: 1.01 * value for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    loss(call, ids).backward()


def frozen_and_thawed(call: Call, module: nn.Module, ids: Tensor) -> None:
    first = next(module.parameters())
    first.requires_grad_(False)
    loss(call, ids).backward()
    first.requires_grad_(True)
    loss(call, ids).backward()


def only_some_gradients(call: Call, module: nn.Module, ids: Tensor) -> None:
    some = [*module.parameters()][::2]
    for parameter, grad in zip(some, torch.autograd.grad(loss(call, ids), some), strict=True):
        parameter.grad = grad
    loss(call, ids).backward()


@pytest.mark.parametrize(
    "work",
    [
        accumulated,
        hooks_of_parameters,
        an_error_after_the_forward,
        an_error_in_the_backward,
        saved_tensors_go_to_the_host,
        parameters_move,
        state_is_assigned,
        frozen_and_thawed,
        only_some_gradients,
    ],
)
def test_steps(work: Callable[[Call, nn.Module, Tensor], None], pair: Pair) -> None:
    """Gradients are eager's in such steps, and in plain ones between and after them."""
    before = pair.replays()
    for each in (work, plain, work, plain):
        ids = batch()
        pair.same(lambda call, module, each=each, ids=ids: each(call, module, ids), ids)
    assert pair.replays() > before


def test_a_saved_tensor_that_is_modified_is_an_error(pair: Pair) -> None:
    value = loss(pair.compiled, batch())
    with torch.no_grad():
        pair.own.head.weight.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    del value
    pair.own.zero_grad()
    pair.same(lambda call, module: loss(call, pair.ids).backward(), batch())


def test_a_copy_trains_by_itself(pair: Pair) -> None:
    model, own = copy.deepcopy(pair.model), copy.deepcopy(pair.compiled)
    for shift in range(6):
        ids = batch()
        for call in (model, own):
            (loss(call, ids) * (1 + shift)).backward()
        pair.same(lambda call, module, ids=ids: loss(call, ids).backward(), ids)
    close(own, model, rtol=2e-3, atol=2e-3)


def test_sixteen_threads(pair: Pair) -> None:
    errors: list[Exception] = []
    data = [batch() for _ in range(16)]

    def work(ids: Tensor) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    expected = torch.autograd.grad(loss(pair.model, ids), list(pair.model.parameters()))
                    got = torch.autograd.grad(loss(pair.compiled, ids), list(pair.own.parameters()))
                    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)
        except Exception as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(ids,)) for ids in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# ---- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_draws_dropout_again_as_it_was(reentrant: bool, inside: bool) -> None:
    model = Layers(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64)).cuda()
    around = partial(checkpoint, use_reentrant=reentrant)
    call = (
        torch.compile(partial(around, model), backend=rtx)
        if inside
        else partial(around, torch.compile(model, backend=rtx))
    )
    seen: list[Tensor] = []
    for step in range(8):
        x = rows().requires_grad_()
        result = call(x)
        result.sum().backward()
        last = model[3]  # of whose weight each row of the gradient is the sum of what came through the dropout
        expected = last.weight @ last.weight.grad[0] + len(x) * last.bias
        torch.testing.assert_close(result.sum(0), expected, rtol=1e-3, atol=1e-3)
        seen.append(last.weight.grad[0].clone())
        model.zero_grad()
        assert step != 3 or torch_rtx.wait(60)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert replays() > 0


class Normalized(nn.Module):
    """Uses a buffer for what is differentiated, then writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        result = self.linear(x) * self.mean.exp()
        with torch.no_grad():
            self.mean.add_(x.mean(0), alpha=0.1)
        return result


def test_a_buffer_that_is_written_after_its_use() -> None:
    model = Normalized().cuda()
    own = copy.deepcopy(model)
    compiled = torch.compile(own, backend=rtx)
    for step in range(8):
        x = rows()
        for call, module in ((model, model), (compiled, own)):
            module.zero_grad()
            call(x).square().mean().backward()
        close(own, model, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.mean, model.mean)
        assert step != 3 or torch_rtx.wait(60)


def test_scaled_gradients() -> None:
    model = small()
    own = copy.deepcopy(model)
    compiled = torch.compile(own, backend=rtx)
    optimizers = [torch.optim.AdamW(one.parameters(), 1e-3) for one in (model, own)]
    scalers = [torch.amp.GradScaler("cuda", init_scale=1024.0) for _ in range(2)]
    for step in range(10):
        x, losses = rows(), []
        for call, module, optimizer, scaler in zip((model, compiled), (model, own), optimizers, scalers, strict=True):
            with torch.autocast("cuda", torch.float16):
                value = call(x).float().square().mean()
            scaler.scale(value * (float("inf") if step == 6 else 1)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(value.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)
        assert step != 3 or torch_rtx.wait(60)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    assert replays() > 0


def test_sparse_gradients() -> None:
    model = Layers(nn.Embedding(50, 64, sparse=True), nn.Linear(64, 64)).cuda()
    own = copy.deepcopy(model)
    compiled = torch.compile(own, backend=rtx)
    optimizers = [torch.optim.SparseAdam([one[0].weight]) for one in (model, own)]
    for step in range(6):
        ids = torch.randint(0, 50, (16,), device="cuda")
        for call, optimizer in zip((model, compiled), optimizers, strict=True):
            call(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert step != 3 or torch_rtx.wait(60)
    torch.testing.assert_close(own[0].weight, model[0].weight, rtol=1e-3, atol=1e-4)


def test_a_closure_that_is_called_many_times() -> None:
    model, x = small(), rows()
    own = copy.deepcopy(model)
    compiled, found = torch.compile(own, backend=rtx), []
    for call, module in ((model, model), (compiled, own)):
        optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=10)

        def closure(call: Call = call, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = (call(x) - x).square().mean()
            value.backward()
            return value

        found.append(optimizer.step(closure))
        assert torch_rtx.wait(60)
        found.append(optimizer.step(closure))
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-2, atol=1e-3)
    assert replays() > 0


def test_compiled_autograd() -> None:
    model = small()
    own = copy.deepcopy(model)
    for one in (model, own):
        one[0].weight.register_hook(lambda grad: 2 * grad)

    def step(module: nn.Module, x: Tensor) -> None:
        module(x).square().mean().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(partial(step, own), backend=rtx)
        for index in range(6):
            x = rows()
            compiled(x)
            step(model, x)
            close(own, model, rtol=1e-3, atol=1e-4)
            for one in (model, own):
                one.zero_grad()
            assert index != 3 or torch_rtx.wait(60)


OPTIMIZERS = ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "ASGD", "Adagrad"]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_optimizers(name: str, foreach: bool) -> None:
    """Those that can be captured have a learning rate on the device, which a scheduler changes."""
    kind = getattr(torch.optim, name)
    capturable = "capturable" in inspect.signature(kind.__init__).parameters
    model = small()
    own = copy.deepcopy(model)
    optimizers = [
        kind(
            one.parameters(),
            lr=torch.tensor(0.01, device="cuda") if capturable else 0.01,
            foreach=foreach,
            **({"capturable": True} if capturable else {}),
        )
        for one in (model, own)
    ]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, 0.9) for one in optimizers] if capturable else []
    compiled = torch.compile(optimizers[1].step, backend=rtx)
    for step in range(8):
        grads = [torch.randn_like(parameter) for parameter in model.parameters()]
        for module, act in ((model, optimizers[0].step), (own, compiled)):
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter.grad = grad.clone()
            act()
        for scheduler in schedulers:
            scheduler.step()
        assert step != 3 or torch_rtx.wait(60)
    close(own, model, rtol=1e-3, atol=1e-5)


# ---- wrappers of PyTorch ---------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, whose buckets of gradients are smaller than its models."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1 << 14)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def bucketed(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend=rtx)
    return DistributedDataParallel(compiled, device_ids=[0], bucket_cap_mb=0.05, gradient_as_bucket_view=True)


def copied_buckets(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend=rtx), device_ids=[0], bucket_cap_mb=0.05)


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model, device_ids=[0], bucket_cap_mb=0.05), backend=rtx)


def sharded(model: nn.Module) -> nn.Module:
    for block in model:
        block.forward = torch.compile(block.forward, backend=rtx)
    for block in (*model, model):
        fully_shard(block, mesh=init_device_mesh("cuda", (1,)))
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallel", [bucketed, copied_buckets, compiled_whole, sharded])
def test_data_parallel(parallel: Callable[[nn.Module], nn.Module]) -> None:
    model = Layers(small(), small())
    own = copy.deepcopy(model)
    call = parallel(own)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (model, own)]
    for step in range(10):
        x = rows()
        model(x).square().mean().backward()
        if step % 3 == 1 and parallel is not sharded:
            with getattr(call, "_orig_mod", call).no_sync():
                call(x).square().mean().backward()
        else:
            call(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert step != 4 or torch_rtx.wait(60)
    for (name, expected), got in zip(model.state_dict().items(), own.state_dict().values(), strict=True):
        whole = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(whole, expected, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert replays() > 0 or parallel is sharded
