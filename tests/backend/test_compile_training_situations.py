"""What surrounds a compiled training step: hooks, checkpoints, wrappers, threads, errors. In float64, as eager.

Each situation is a function of `wrap`, which compiles or does nothing; what it returns is the same either way.
"""

import copy
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.helpers.compiled import compile_rtx, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
SITUATIONS = {}


def situation(function):
    SITUATIONS[function.__name__] = function
    return function


class Layers(nn.Sequential):
    """Dynamo compiles `forward` of a user's class wherever it is called from, but not that of nn.Sequential itself."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def made(*layers):
    return Layers(*(layers or (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)))).double()


def batch(rows=3):
    return torch.linspace(-1, 1, 4 * rows, dtype=torch.float64).view(rows, 4)


def loss(call, *args):
    return call(*args).square().sum()


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def descend(model, call, batches):
    """A step of SGD for each batch, and the state after them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in batches:
        loss(call, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


# ---- the order of calls ----------------------------------------------------------------------------------------------


@situation
def last_batch_is_smaller(wrap):
    model = made()
    return descend(model, wrap(model), map(batch, (3, 3, 2, 3, 1)))


@situation
def evaluation_between_forward_and_backward(wrap):
    model = made(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    call, seen = wrap(model), []
    for shift in range(2):
        pending = loss(call, batch() + shift)
        model.eval()
        with torch.no_grad():
            seen.append(call(batch()))
        with torch.inference_mode():
            seen.append(call(batch()).clone())
        model.train()
        pending.backward()
    return grads(model), state(model), [tensor.detach().clone() for tensor in seen]


@situation
def state_is_loaded(wrap):
    model, seen = made(), []
    call = wrap(model)
    for assign in (None, False, True):
        if assign is not None:
            model.load_state_dict({name: 2 * value for name, value in state(model).items()}, assign=assign)
        model.zero_grad()
        value = loss(call, batch())
        value.backward()
        seen.append((value.detach(), grads(model)))
    return seen


@situation
def parameters_are_frozen_and_thawed(wrap):
    model, seen = made(), []
    call = wrap(model)
    for layer, trains in ((0, False), (0, True), (2, False)):
        model[layer].requires_grad_(trains)
        model.zero_grad()
        loss(call, batch()).backward()
        seen.append(grads(model))
    return seen


@situation
def only_some_results_and_parameters(wrap):
    model = made()
    call = wrap(lambda x: (model[1](model[0](x)), model(x)))
    first, second = call(batch())
    one = torch.autograd.grad(first.sum(), [model[0].weight])
    two = torch.autograd.grad(call(batch())[1].sum(), [model[2].bias, model[0].weight])
    (2 * second.detach() + call(batch())[1]).backward(batch(4)[:, :3].T)
    return one, two, grads(model), second.detach()


@situation
def errors_between_forward_and_backward(wrap):
    model, raised = made(), []
    call = wrap(model)

    def fail(grad):
        raise KeyError

    for index in range(5):
        handle = model[2].bias.register_hook(fail) if index == 3 else None
        try:
            value = loss(call, batch() + index)
            if index == 1:
                raise KeyError
            value.backward()
        except KeyError:
            raised.append(index)
            model.zero_grad()  # how far the backward came is not said
        if handle is not None:
            handle.remove()
    return raised, grads(model)


@situation
def threads(wrap):
    model, seen = made(), {}
    call = wrap(model)

    def work(index):
        for _ in range(3):
            seen[index] = torch.autograd.grad(loss(call, batch() + index), list(model.parameters()))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [seen[index] for index in range(4)]


@situation
def whole_step(wrap):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad(set_to_none=False)
        loss(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    call = wrap(step, fullgraph=False)
    for shift in range(3):
        call(batch() + shift)
    return state(model)


@situation
def closure(wrap):
    model = made()
    call, optimizer = wrap(model), torch.optim.LBFGS(model.parameters(), max_iter=3)

    def evaluate():
        optimizer.zero_grad()
        value = loss(call, batch())
        value.backward()
        return value

    optimizer.step(evaluate)
    return state(model)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@situation
def hooks_of_parameters(wrap):
    model = made()
    call, seen = wrap(model), []
    loss(call, batch()).backward()
    model.zero_grad()

    def descends(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
        parameter.register_post_accumulate_grad_hook(descends)
    for _ in range(2):
        loss(call, batch()).backward()
    return state(model), len(seen)


@situation
def hooks_of_modules(wrap):
    model, seen = made(), []
    model[0].register_forward_hook(lambda module, args, result: 2 * result)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_full_backward_pre_hook(lambda module, given: tuple(3 * grad for grad in given))
    for module in (model, model[2]):
        module.register_full_backward_hook(lambda module, ours, theirs: seen.append(theirs[0].clone()))
    call, x = wrap(model, fullgraph=False), batch().requires_grad_()
    for _ in range(2):
        loss(call, x).backward()
    return grads(model), x.grad, seen


@situation
def hook_of_an_activation(wrap):
    model = made()

    def forward(x):
        hidden = model[0](x)
        hidden.register_hook(lambda grad: 5 * grad)
        return model[2](hidden.tanh())

    loss(wrap(forward), batch()).backward()
    return grads(model)


@situation
def hooks_of_saved_tensors(wrap):
    model = made()
    with torch.autograd.graph.save_on_cpu():
        value = loss(wrap(model), batch())
    value.backward()
    return grads(model)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpointed(reentrant, inside, wrap):
    """Dropout is drawn anew in each step, and drawn again as it was in the backward of that step."""
    model, seen = made(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)), []
    around = partial(checkpoint, use_reentrant=reentrant)
    call = wrap(partial(around, model)) if inside else partial(around, wrap(model))
    torch.manual_seed(5)
    for shift in range(2):
        x = (batch() + shift).requires_grad_()
        result = call(x)
        result.sum().backward()
        last = model[3]  # of whose weight each row of the gradient is the sum of what came through the dropout
        torch.testing.assert_close(result.sum(0), last.weight @ last.weight.grad[0] + 3 * last.bias)
        seen.append((result.detach(), grads(model), x.grad))
        model.zero_grad()
    assert not torch.equal(seen[0][1]["3.weight"] == 0, seen[1][1]["3.weight"] == 0)
    return seen


for reentrant in (False, True):
    for inside in (False, True):
        name = f"{'reentrant_' * reentrant}checkpoint_{'inside' if inside else 'around'}"
        SITUATIONS[name] = partial(checkpointed, reentrant, inside)


@situation
def selective_checkpoint(wrap):
    model = made()
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    loss(wrap(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)), batch()).backward()
    return grads(model)


# ---- wrappers --------------------------------------------------------------------------------------------------------


@situation
def scaled_gradients(wrap):
    model, norms = made(), []
    call, optimizer = wrap(model), torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for index in range(3):
        value = loss(call, batch()) * (float("inf") if index == 1 else 1)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return state(model), norms, scaler.get_scale()


@situation
def averaged_and_copied(wrap):
    model = made()
    call, average = wrap(model), torch.optim.swa_utils.AveragedModel(model)
    descend(model, call, [batch()])
    average.update_parameters(model)
    twin = copy.deepcopy(call)
    loss(twin, batch()).backward()
    return state(average), [parameter.grad for parameter in twin.parameters()]


@situation
def sparse_gradients(wrap):
    model = nn.ModuleList([nn.Embedding(6, 4, sparse=True), nn.Linear(4, 4)]).double()
    call = wrap(lambda ids: model[1](model[0](ids)))
    optimizer = torch.optim.SparseAdam([model[0].weight])
    for _ in range(2):
        loss(call, torch.tensor([0, 2, 2])).backward()
        optimizer.step()
    return state(model), model[0].weight.grad.is_sparse, model[0].weight.grad.to_dense()


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name, recorder):
    found = []
    for wrap in (lambda function, **_: function, compile_rtx):
        torch._dynamo.reset()
        torch.manual_seed(0)
        found.append(SITUATIONS[name](wrap))
    same(found[1], found[0])
    assert len(recorder) >= 2


@pytest.mark.filterwarnings("ignore:.*compiled_autograd:UserWarning")
def test_compiled_autograd(recorder):
    """The graph of the whole backward, with hooks and accumulation, is compiled as well."""
    model, reference = made(), made()
    reference.load_state_dict(model.state_dict())
    seen = []
    for one in (model, reference):
        one[0].weight.register_hook(lambda grad: 2 * grad)

    def step(model, x):
        loss(model, x).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        call = torch.compile(partial(step, model), backend="rtx")
        for shift in range(2):
            call(batch() + shift)
            step(reference, batch() + shift)
            seen.append((grads(model), grads(reference)))
    for own, expected in seen:
        same(own, expected)
    assert len(recorder) >= 3


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def buckets(model, wrap):
    """Compiled as a whole, which Dynamo cuts at the buckets of gradients."""
    return wrap(DistributedDataParallel(model, bucket_cap_mb=1e-4, gradient_as_bucket_view=True), fullgraph=False)


def inner(model, wrap):
    return DistributedDataParallel(wrap(model))


def sharded(model, wrap):
    """FSDP2 around compiled blocks, which is how PyTorch recommends it."""
    for block in model:
        block.forward = wrap(block.forward)
    for block in (*model, model):
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallel", [buckets, inner, sharded])
def test_data_parallel(parallel, monkeypatch, recorder):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 100)
    found = []
    for wrap in (lambda function, **_: function, compile_rtx):
        torch.manual_seed(0)
        model = Layers(made(), made())
        call = parallel(model, wrap)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for index in range(3):
            if index == 1 and parallel is not sharded:
                with getattr(call, "_orig_mod", call).no_sync():
                    loss(call, batch() + index).backward()
            else:
                loss(call, batch() + index).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append({name: getattr(v, "full_tensor", v.clone)() for name, v in model.state_dict().items()})
    same(found[1], found[0])
    assert len(recorder) >= 2


# ---- errors, and tensors that are written ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["input", "parameter", "result"])
def test_a_saved_tensor_that_is_modified_is_an_error(what):
    model, x = made(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), batch()
    result = compile_rtx(model)(x)
    with torch.no_grad():
        {"input": x, "parameter": model[2].weight, "result": result}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


class Normalized(nn.Module):
    """Uses a buffer for what is differentiated, then writes it; `seen` is the part of the buffer that is used."""

    def __init__(self, seen, buffer):
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4).double(), seen
        self.register_buffer("mean", buffer.clone() if buffer.is_contiguous() else buffer)

    def forward(self, x):
        result = self.linear(x) * self.seen(self.mean)
        with torch.no_grad():
            self.mean.add_(x.mean(0))
        return result


WRITTEN = {
    "whole": (lambda mean: mean.exp(), torch.zeros(4)),
    "clone": (lambda mean: mean.clone().exp(), torch.zeros(4)),
    "views": (lambda mean: mean[1:].exp().sum() * mean.flip(0)[:3].cos().sum(), torch.zeros(4)),
    "expanded": (lambda mean: mean.expand(3, 4).sin(), torch.ones(4)),
    "with gaps": (lambda mean: mean.sum(0).sin() * mean.exp().sum(), torch.zeros(4, 8)[:, ::2]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_buffer_that_is_written_after_its_use(name):
    """The backward computes with what the buffer held when it was used, also where that is computed again."""
    seen, buffer = WRITTEN[name]
    model = Normalized(seen, buffer.double())
    reference = copy.deepcopy(model)
    compiled = compile_rtx(model)
    for shift in range(2):
        found = []
        for call in (compiled, reference):
            result = loss(call, batch() + shift)
            result.backward()
            found.append((result.detach(), grads(call)))
        same([*found[0][1].values()], [*found[1][1].values()])
    same(state(model), state(reference))
