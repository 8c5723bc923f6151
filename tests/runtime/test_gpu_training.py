"""Training steps under CUDA graphs on a GPU: gradients are eager's in whatever order forwards and backwards come."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_rtx
from tests.runtime.pools import graph_pools
from torch_rtx.backend import capture
from torch_rtx.backend.entry import rtx
from torch_rtx.runtime.convolve import convolve

pytestmark = pytest.mark.gpu
WORDS = 50


class Decoder(nn.Module):
    """A transformer block between an embedding and a head: library calls, kernels, and an input that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(WORDS, 64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(x))


Call = Callable[[Tensor], Tensor]


def batch(size: int = 4) -> Tensor:
    return torch.randint(0, WORDS, (size, 32), device="cuda")


def loss(call: Call, ids: Tensor) -> Tensor:
    return F.cross_entropy(call(ids).flatten(0, 1), ids.flatten())


class Pair:
    """A model, and a compiled copy whose forward and backward replay as CUDA graphs."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Decoder().cuda()
        self.own = copy.deepcopy(self.model)
        self.compiled: Call = torch.compile(self.own, backend=rtx)
        for _ in range(2):
            for _ in range(4):
                self.same(lambda call, module: loss(call, self.ids).backward(), batch())
            assert torch_rtx.wait(60)  # code that is not final is not captured
        assert self.replays() >= 2

    def same(self, work: Callable[[Call, nn.Module], object], ids: Tensor) -> None:
        """`work` leaves equal gradients in both."""
        self.ids = ids
        for call, module in ((self.model, self.model), (self.compiled, self.own)):
            work(call, module)
        for (name, expected), got in zip(self.model.named_parameters(), self.own.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        self.model.zero_grad()
        self.own.zero_grad()

    def replays(self) -> int:
        """Of all graphs with pinned parameters that are alive, which are those of this pair."""
        return sum(pool.replays for pool in graph_pools() if pool.pinned)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_steps(pair: Pair) -> None:
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (pair.model, pair.own)]
    before = pair.replays()
    for _ in range(5):
        ids = batch()
        losses = [loss(call, ids) for call in (pair.model, pair.compiled)]
        for one, optimizer in zip(losses, optimizers, strict=True):
            one.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    assert pair.replays() == before + 10
    pair.own.load_state_dict(pair.model.state_dict())
    pair.same(lambda call, module: loss(call, pair.ids).backward(), batch())


def test_a_known_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that comes from the engine cache replays its graphs like the step that was captured."""

    def fail(*args: object) -> None:
        raise AssertionError("this was to be skipped")

    before = pair.replays()
    monkeypatch.setattr(capture, "capture", fail)
    again = Pair()
    again.same(lambda call, module: loss(call, again.ids).backward(), batch())
    assert pair.replays() >= before + 2


def test_gradients_are_accumulated(pair: Pair) -> None:
    """`.grad` of the first backward lies over saved tensors, and moves before the next forward replays."""
    batches, before = [batch() for _ in range(4)], pair.replays()

    def work(call: Call, _: nn.Module) -> None:
        for ids in batches:
            loss(call, ids).backward()

    for _ in range(3):
        pair.same(work, batch())
    assert pair.replays() == before + 24


def test_gradients_are_cleared_after_the_forward(pair: Pair) -> None:
    """They would move in each step, and so get memory of their own."""

    def work(call: Call, module: nn.Module) -> None:
        value = loss(call, pair.ids)
        module.zero_grad()
        value.backward()

    for step in range(10):
        before, pair.ids = pair.replays(), batch()
        work(pair.model, pair.model)
        work(pair.compiled, pair.own)
        for one, other in zip(pair.model.parameters(), pair.own.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=2e-3, atol=2e-4)
        assert step < 6 or pair.replays() == before + 2
    gradients = [p.grad for p in pair.own.parameters() if p.grad is not None]
    places = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(places) > len(gradients) / 2


@pytest.mark.parametrize("late", [False, True])
def test_gradients_take_their_memory_once(late: bool) -> None:
    """Of few tokens little is saved, so that they lie over nothing; nothing copies those that products of a library
    write. `late`: the loop clears them after its forward."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(6))).cuda()
    own, x = copy.deepcopy(model), torch.randn(16, 4096, device="cuda")
    compiled = torch.compile(own, backend=rtx)

    def step(call: Call, module: nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            value = call(x).square().mean()
        if late:
            module.zero_grad()
        value.backward()

    for _ in range(2):
        for _ in range(6):
            own.zero_grad()
            step(compiled, own)
        assert torch_rtx.wait(60)
    step(model, model)
    for one, other in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=2e-2, atol=2e-2 * float(one.grad.abs().max()))  # type: ignore[union-attr]
    model.zero_grad()
    own.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(compiled, own)
    torch.cuda.synchronize()
    size = sum(p.nbytes for p in own.parameters())
    # Two models, gradients, workspaces, and casts of weights, over which gradients lie if they are cleared in time.
    assert torch.cuda.max_memory_reserved() - held < (3.9 if late else 3.5) * size


def test_gradients_that_the_caller_keeps(pair: Pair) -> None:
    """Those of `torch.autograd.grad` belong to no parameter: no later step changes them."""
    parameters = list(pair.own.parameters())
    kept = [torch.autograd.grad(loss(pair.compiled, batch()), parameters) for _ in range(3)]
    values = [[gradient.clone() for gradient in gradients] for gradients in kept]
    for _ in range(3):
        pair.same(lambda call, module: loss(call, pair.ids).backward(), batch())
    for gradients, expected in zip(kept, values, strict=True):
        torch.testing.assert_close(list(gradients), expected, rtol=0, atol=0)


def test_a_step_shares_memory(pair: Pair) -> None:
    """Gradients lie in the memory of the forward."""
    loss(pair.compiled, pair.ids).backward()
    (forward,) = (graph for pool in graph_pools() for graph in pool.captured.values() if graph.block is not None)
    block = forward.block
    assert block is not None
    gradients = [p.grad for p in pair.own.parameters() if p.grad is not None]
    inside = [g for g in gradients if g.untyped_storage().data_ptr() == block.storage.data_ptr()]
    assert inside
    handles = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()} - {(0, 0)}
    assert block.handle in handles


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_a_backward(pair: Pair, order: tuple[int, int]) -> None:
    other = batch()

    def work(call: Call, _: nn.Module) -> None:
        losses = loss(call, pair.ids), loss(call, other)
        for index in order:
            losses[index].backward()

    pair.same(work, batch())


def test_a_graph_is_kept(pair: Pair) -> None:
    other = batch()

    def work(call: Call, _: nn.Module) -> None:
        first = loss(call, pair.ids)
        first.backward(retain_graph=True)
        second = loss(call, other)
        first.backward()
        second.backward()

    pair.same(work, batch())


def test_a_backward_never_comes(pair: Pair) -> None:
    def work(call: Call, _: nn.Module) -> None:
        loss(call, batch())
        kept = loss(call, batch())
        loss(call, pair.ids).backward()
        del kept

    pair.same(work, batch())


def test_evaluation_between_and_a_last_batch_that_is_smaller(pair: Pair) -> None:
    def work(call: Call, module: nn.Module) -> None:
        first = loss(call, pair.ids)
        module.eval()
        with torch.no_grad():
            call(pair.ids)
        module.train()
        first.backward()
        loss(call, pair.ids[:3]).backward()
        loss(call, pair.ids).backward()

    pair.same(work, batch())


def test_results_that_the_caller_keeps(pair: Pair) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    before = pair.replays()
    for _ in range(4):
        pair.ids = batch()
        kept.append((pair.model(pair.ids).detach(), pair.compiled(pair.ids)))
        kept[-1][1].square().mean().backward()
    for expected, got in kept:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert pair.replays() == before + 8


def test_threads(pair: Pair) -> None:
    errors: list[Exception] = []

    def work(seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    ids = torch.randint(0, WORDS, (4, 32), device="cuda", generator=generator)
                    expected = torch.autograd.grad(loss(pair.model, ids), list(pair.model.parameters()))
                    got = torch.autograd.grad(loss(pair.compiled, ids), list(pair.own.parameters()))
                    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)
        except Exception as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_dropout_draws_new_numbers_that_backward_knows() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.5)).cuda()
    compiled = torch.compile(model, backend=rtx)
    x = torch.rand(8, 64, device="cuda") + 1
    seen = []
    for _ in range(8):
        result = compiled(x)
        result.sum().backward()
        # The gradient of the weights is the sum over rows of what the mask let through.
        mask = (result != 0).float() * 2
        torch.testing.assert_close(model[0].weight.grad, mask.T @ x, rtol=1e-3, atol=1e-3)
        model.zero_grad()
        seen.append(mask)
        assert len(seen) != 4 or torch_rtx.wait(60)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert sum(pool.replays for pool in graph_pools() if pool.pinned) >= 4


def test_results_that_no_loss_depends_on() -> None:
    """Their gradients are not computed, whichever they are in a step, and each set of them has its graph."""
    torch._dynamo.reset()
    model = Decoder().cuda()
    own = copy.deepcopy(model)

    def outputs(one: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = one(ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    compiled = torch.compile(outputs, backend=rtx)
    for step in range(16):
        ids = batch()
        for one, call in ((model, outputs), (own, compiled)):
            logits, mean = call(one, ids)
            (mean if step % 3 else logits.square().mean() + mean).backward()
        for (name, expected), got in zip(model.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        model.zero_grad()
        own.zero_grad()
        assert step not in (4, 9) or torch_rtx.wait(60)
    assert sum(pool.replays for pool in graph_pools() if pool.pinned) >= 6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_writes_into_given_memory(bias, layout):
    """Bit for bit what PyTorch's own call computes."""
    x = torch.randn(4, 16, 20, 20, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    weight = torch.randn(32, 16, 3, 3, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    given = torch.randn(32, device="cuda", dtype=torch.bfloat16) if bias else None
    rest = [2, 2], [1, 1], [1, 1], False, [0, 0], 1
    expected = torch.ops.aten.convolution(x, weight, given, *rest)
    out = torch.empty_like(expected)
    convolve(x, weight, given, *rest, out=out)
    assert torch._C._select_conv_backend(x, weight, given, *rest) == torch._C._ConvBackend.Cudnn
    assert torch.equal(out, expected)


class Head(nn.Module):
    """A head of a language model that returns its logits beside the loss; their rows do not begin with vectors."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.head = nn.Linear(768, words)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        return logits, F.cross_entropy(logits.float(), labels)


def test_logits_of_an_odd_vocabulary_that_the_caller_keeps() -> None:
    """They, the loss and all gradients are as near to those of float32 as eager's, and stay what they are."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Head(4099).cuda()
    own = copy.deepcopy(model)
    compiled = torch.compile(own, backend=rtx)
    x = torch.randn(4096, 768, device="cuda", requires_grad=True)
    labels = torch.randint(0, 4099, (4096,), device="cuda")

    def step(call: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, halves: bool = True) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=halves):
            logits, found = call(x, labels)
        found.backward()
        assert x.grad is not None
        grads = [x.grad, *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)]
        x.grad = None
        module.zero_grad()
        return [logits.detach(), found.detach(), *grads]

    for _ in range(2):
        for _ in range(4):
            kept = step(compiled, own)
        assert torch_rtx.wait(60)
    before = kept[0].clone()
    found, eager, exact = step(compiled, own), step(model, model), step(model, model, halves=False)
    assert torch.equal(kept[0], before)
    for one, other, right in zip(found, eager, exact, strict=True):
        error, allowed = ((result.float() - right).norm() for result in (one, other))
        assert error <= 2 * allowed + 1e-5 * right.norm()
