"""Training through torch.compile(backend="rtx"): losses, gradients and steps are eager's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.compiled import compile_rtx, same
from torch_rtx.runtime.session import Session

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A transformer block with dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(8), nn.LayerNorm(8), dropout
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + self.mlp(self.norm2(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh())


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (3, 8)),
    "conv_bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 8, 8)),
    "block": (Block, (2, 5, 8)),
    "tied": (Tied, None),
    "checkpointed": (Checkpointed, (2, 5, 8)),
}


def make(name):
    build, shape = MODELS[name]
    model = build()
    batches = [torch.randn(shape) if shape else torch.randint(0, 10, (2, 6)) for _ in range(3)]
    return model, batches


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def steps(model, call, optimizer, batches, accumulate=1):
    """Losses and gradients of each step, and the state after them."""
    seen = []
    for index, batch in enumerate(batches):
        loss = call(batch).square().mean()
        loss.backward()
        seen.append((loss.detach(), grads(model)))
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return seen, model.state_dict()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", MODELS)
def test_steps(name, kind, recorder):
    model, batches = make(name)
    reference = copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) if kind == "sgd" else torch.optim.Adam(m.parameters(), 0.01)
        for m in (reference, model)
    ]
    expected = steps(reference, reference, optimizers[0], batches)
    same(steps(model, compile_rtx(model), optimizers[1], batches), expected, atol=1e-5, rtol=1e-4)
    assert len(recorder) == 2  # a forward and a backward, for all steps
    assert recorder.fallbacks == []  # attention that a checkpoint repeats draws no random numbers


def test_gradient_accumulation():
    model, batches = make("mlp")
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (reference, model)]
    expected = steps(reference, reference, optimizers[0], batches, accumulate=3)
    same(steps(model, compile_rtx(model), optimizers[1], batches, accumulate=3), expected)


def test_dropout_draws_what_aot_eager_draws():
    results = []
    for backend in ("rtx", "aot_eager"):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = Block(dropout=0.5)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        results.append(steps(model, compiled, optimizer, [torch.randn(2, 5, 8) for _ in range(3)]))
    same(*results)


@pytest.mark.quick
def test_gradients_of_inputs_and_frozen_parameters():
    model, _ = make("mlp")
    model[0].weight.requires_grad_(False)
    compiled = compile_rtx(model)
    found = []
    for call in (compiled, model):
        model.zero_grad()
        x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        call(x).sum().backward()
        found.append((x.grad, grads(model)))
    same(*found)
    assert found[0][1]["0.weight"] is None


def test_used_twice_before_one_backward():
    model, (x, y, _) = make("block")
    compiled = compile_rtx(model)
    found = []
    for call in (compiled, model):
        model.zero_grad()
        (call(x).sum() + call(call(y)).square().sum()).backward()
        found.append(grads(model))
    same(*found, atol=1e-5, rtol=1e-4)


def test_retain_graph_and_freed_graph():
    model, (x, *_) = make("mlp")
    loss = compile_rtx(model)(x).sum()
    loss.backward(retain_graph=True)
    once = grads(model)
    loss.backward()
    same(grads(model), {name: 2 * grad for name, grad in once.items()})
    with pytest.raises(RuntimeError, match="second time|already been freed"):
        loss.backward()


def test_no_grad_inside():
    model, (x, *_) = make("mlp")

    def f(x):
        with torch.no_grad():
            scale = model(x).abs().amax()
        return model(x) / scale

    found = []
    for call in (compile_rtx(f), f):
        model.zero_grad()
        call(x).sum().backward()
        found.append(grads(model))
    same(*found)


def test_result_without_gradient():
    model, (x, *_) = make("mlp")
    compiled = compile_rtx(lambda x: (model(x), model(x).detach(), x + 1))
    same(compiled(x), (model(x), model(x).detach(), x + 1))


def test_train_eval_train():
    model, batches = make("conv_bn")
    reference = copy.deepcopy(model)
    compiled = compile_rtx(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (reference, model)]
    for batch in batches:
        for m in (model, reference):
            m.train()
        expected = steps(reference, reference, optimizers[0], [batch])
        same(steps(model, compiled, optimizers[1], [batch]), expected, atol=1e-5, rtol=1e-4)
        for m in (model, reference):
            m.eval()
        with torch.no_grad():
            same(compiled(batch), reference(batch), atol=1e-5, rtol=1e-4)


def test_autocast():
    model, (x, *_) = make("block")
    compiled = compile_rtx(model)
    found = []
    for call in (compiled, model):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().square().mean()
        loss.backward()
        found.append((loss.detach(), grads(model)))
    same(*found, atol=2e-2, rtol=2e-2)


def test_dynamic_batch(recorder):
    model, _ = make("mlp")
    compiled = compile_rtx(model, dynamic=True)
    for rows in (3, 5, 9):
        found, x = [], torch.randn(rows, 8)
        for call in (compiled, model):
            model.zero_grad()
            call(x).square().sum().backward()
            found.append(grads(model))
        same(*found, atol=1e-5, rtol=1e-4)
    assert len(recorder) == 2


def test_autograd_function():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(-1, 1)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 * (x.abs() < 1)

    found = []
    for call in (compile_rtx(lambda x: Clip.apply(x * 2).sum()), lambda x: Clip.apply(x * 2).sum()):
        x = torch.linspace(-1, 1, 7).requires_grad_()
        call(x).backward()
        found.append(x.grad)
    same(*found)


def test_double_backward_is_refused():
    """As with Inductor: what AOTAutograd compiled has one derivative."""
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(compile_rtx(lambda x: x.pow(3).sum())(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


def test_gradients_enabled_inside_a_call_without() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return self.fc(x).square().sum()

    model = Model()
    x = torch.randn(2, 4)
    with torch.no_grad():
        loss = torch.compile(model, backend="rtx", fullgraph=True)(x)
    loss.backward()
    got = model.fc.weight.grad
    model.fc.weight.grad = None
    model(x).backward()
    torch.testing.assert_close(got, model.fc.weight.grad)


def test_buffers_are_updated_at_once(recorder):
    """What a step writes to buffers, running statistics and numbers of batches, is one copy for each dtype."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    reference, image = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    for call in (compile_rtx(model), reference):
        call(image).square().mean().backward()
    same(model.state_dict(), reference.state_dict())
    assert recorder.ops.count("copy_") == 6
    assert recorder.sessions[0].source.count("_copies(") == 2


def test_running_statistics_are_not_saved(recorder):
    """No gradient needs them, although that of a batch norm has them as arguments: nothing keeps them from being
    updated in place."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    compile_rtx(model)(torch.randn(8, 3, 64, 64)).square().mean().backward()
    forward, backward = (session.graph for session in recorder.sessions)
    (statistics,) = {node.outputs[3:5] for node in forward.nodes if "batch_norm" in node.op}
    assert all(value is not None and value not in forward.outputs for value in statistics)
    assert "clone" not in recorder.ops
    assert [node.arg("running_mean") for node in backward.nodes if "batch_norm_backward" in node.op] == [None]


GRADIENTS = {
    "glu": lambda x: F.glu(x, 1),
    "prelu": lambda x: F.prelu(x, x[0, :, 0, 0].detach()),
    "indices": lambda x: x[:, [0, 0, 1]],
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "reflection": lambda x: F.pad(x[0], (1, 2), mode="reflect"),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_in_the_engine(name, recorder):
    function = GRADIENTS[name]
    eager, compiled = (torch.linspace(-0.9, 0.9, 128).view(2, 4, 4, 4).requires_grad_() for _ in range(2))
    function(eager).square().sum().backward()
    compile_rtx(function, options={"require_full_compilation": True})(compiled).square().sum().backward()
    same(compiled.grad, eager.grad)
    assert len(recorder) == 2


def test_activations_are_freed_after_their_last_use(monkeypatch):
    """The code has the only references to its inputs: the list that brought them is empty when it ends."""
    left, run = [], Session.run

    def recorded(session, code, inputs, weights):
        results = run(session, code, inputs, weights)
        left.append(len(inputs))
        return results

    monkeypatch.setattr(Session, "run", recorded)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    compile_rtx(model)(torch.randn(2, 4)).sum().backward()
    assert left == [0, 0]


def test_a_graph_that_is_kept_can_be_differentiated_again():
    model, (x, *_) = make("mlp")
    compiled = compile_rtx(copy.deepcopy(model))
    for call in (model, compiled):
        loss = call(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for parameter, own in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(own.grad, parameter.grad)


def test_gradients_are_new_tensors_whatever_the_settings(monkeypatch):
    """Under `static_outputs` the next backward would overwrite what `.grad` has taken."""
    static, run = [], Session.run

    def recorded(session, *given):
        static.append(session.settings.static_outputs)
        return run(session, *given)

    monkeypatch.setattr(Session, "run", recorded)
    compiled = compile_rtx(nn.Linear(4, 4), options={"static_outputs": True})
    compiled(torch.randn(2, 4)).sum().backward()
    assert static == [False, False]
    with torch.no_grad():
        compiled(torch.randn(2, 4))
    assert static == [False, False, True]
