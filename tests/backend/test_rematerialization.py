"""What the forward of a training step saves: what is cheap to compute again is not, and users may ask for less."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.helpers.compiled import compile_rtx, same
from torch_rtx.backend import capture as capture_module
from torch_rtx.backend.capture import _FakeCopies, capture
from torch_rtx.backend.rematerialization import _drop_generators

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
WIDTH, TOKENS = 256, 4096


class Block(nn.Module):
    """A transformer block without attention, whose results are large enough to be worth a kernel."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1024), nn.Linear(1024, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.mix(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


class Step:
    """The graphs of a training step of `model`, which is traced without data."""

    def __init__(self, model: nn.Module, *shape: int, function: Callable[..., Any] | None = None) -> None:
        self.graphs: list[fx.GraphModule] = []

        def compiler(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            self.graphs.append(graph)
            return graph.forward

        def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            return capture(gm, inputs, compiler, compiler, compiler)

        fakes = _FakeCopies(torch.device("cpu"))
        torch._dynamo.reset()
        with fakes.swapped_into(model), fakes.mode, config.patch(force_non_lazy_backward_lowering=True):
            torch.compile(function or model, backend=backend, fullgraph=True)(torch.empty(shape, requires_grad=True))
        forward, self.backward = self.graphs
        names = {node.name for node in self.backward.graph.find_nodes(op="placeholder")}
        results: Any = forward.graph.output_node().args[0]
        self.saved = [node for node in dict.fromkeys(results) if isinstance(node, fx.Node) and node.name in names]

    @property
    def ops(self) -> set[str]:
        """The operators whose results are saved, or views of which."""
        return {name(node) for node in self.saved if node.op == "call_function"}

    @property
    def nbytes(self) -> int:
        """Of what is saved, without what the caller has anyway."""
        memory = {}
        for node in self.saved:
            value = node.meta["val"]
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                memory[id(value.untyped_storage())] = value.numel() * value.element_size()
        return sum(memory.values())

    @property
    def again(self) -> Counter[str]:
        """What the backward calls."""
        return Counter(name_of(node.target) for node in self.backward.graph.nodes if node.op == "call_function")


def name(node: fx.Node) -> str:
    """The operator of a node, below views and items."""
    while node.op == "call_function" and ("getitem" in str(node.target) or "view" in str(node.target)):
        (node,) = node.all_input_nodes
    return name_of(node.target)


def name_of(target: Any) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]


def by_default(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *shape: int) -> Step:
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "partition", min_cut_rematerialization_partition)
        return Step(model, *shape)


@pytest.mark.quick
def test_results_of_norms_and_activations_are_computed_again(monkeypatch):
    step, default = Step(Block(), TOKENS, WIDTH), by_default(monkeypatch, Block(), TOKENS, WIDTH)
    assert {"native_layer_norm", "gelu"} <= default.ops
    assert step.ops <= {"add", "addmm"}
    assert step.nbytes < 0.6 * default.nbytes
    assert step.again["native_layer_norm"] == 2
    assert step.again["gelu"] == 1
    assert "addmm" not in step.again  # products are not


def test_small_results_are_not_worth_a_kernel():
    assert {"native_layer_norm", "gelu"} <= Step(Block(), 16, WIDTH).ops


def test_statistics_of_batch_norms_are_computed_once(monkeypatch):
    shape = 4, 3, 74, 74
    step, default = Step(Convolutions(), *shape), by_default(monkeypatch, Convolutions(), *shape)
    assert "relu" in default.ops
    assert step.ops == {"convolution", "_native_batch_norm_legit_functional"}
    assert "_native_batch_norm_legit_functional" not in step.again
    assert step.nbytes < 0.6 * default.nbytes


def test_gradients_of_a_batch_norm_that_is_computed_again():
    torch.manual_seed(0)
    model = Convolutions()
    reference, image = copy.deepcopy(model), torch.randn(4, 3, 74, 74)
    for call in (compile_rtx(model), reference):
        call(image).square().mean().backward()
    same(model.state_dict(), reference.state_dict())
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_a_budget_is_kept():
    sizes = []
    for budget in (1.0, 0.5, 0.0):
        with config.patch(activation_memory_budget=budget):
            sizes.append(Step(Block(), TOKENS, WIDTH).nbytes)
    assert sizes[0] > 1.5 * sizes[1] > 0
    assert sizes[2] == 0


def test_regions_of_checkpoint_are_kept():
    blocks = nn.ModuleList((Block(), Block()))

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    step = Step(blocks, TOKENS, WIDTH, function=run)
    assert step.nbytes <= TOKENS * WIDTH * 4  # what lies between the blocks
    assert step.again["addmm"] >= 4


def test_what_a_checkpoint_prefers_to_save_is_saved():
    """Attention, which PyTorch has in no list for the CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_SAVE if op == attention else CheckpointPolicy.PREFER_RECOMPUTE

    def inner(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x.sin(), x.cos(), x.exp()).tanh()

    def run(x: torch.Tensor) -> torch.Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(inner, x, use_reentrant=False, context_fn=contexts)

    step = Step(nn.Identity(), 2, 4, 64, 32, function=run)
    assert name_of(attention) in step.ops
    assert name_of(attention) not in step.again
    assert step.again["sin"] == 1


@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_dropout_drops_the_same_when_it_is_computed_again(budget):
    model = Block(dropout=0.5)
    x = torch.randn(8, WIDTH)
    found = []
    for given in (1.0, budget):
        torch._dynamo.reset()
        model.zero_grad()
        torch.manual_seed(3)
        with config.patch(activation_memory_budget=given):
            compile_rtx(model)(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    same(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_where_it_has_dropout_alone(dropout):
    """For attention under a checkpoint on a GPU, PyTorch adds a generator in either case."""
    attention, again = torch.ops.aten._scaled_dot_product_flash_attention.default, "graphsafe_run_with_rng_state"
    graph = fx.Graph()
    x, generator = graph.placeholder("x"), graph.placeholder("generator")
    with FakeTensorMode():
        x.meta["val"] = torch.empty(1, 2, 16, 8, device="meta")
    node = graph.call_function(
        getattr(torch.ops.higher_order, again), (attention, x, x, x, dropout), {"rng_state": generator}
    )
    graph.output((graph.call_function(operator.getitem, (node, 0)),))
    _drop_generators(fx.GraphModule({}, graph))
    if dropout:
        assert str(node.target) == again
        return
    assert (node.target, node.args, node.kwargs) == (attention, (x, x, x, 0.0), {})
    assert node.meta["val"][0].shape == x.meta["val"].shape


class Checkpointed(nn.Module):
    """Layers under autocast, each of which is a region of a checkpoint: all that is saved lies between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in zip(widths, widths[1:], strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = checkpoint(lambda x, layer=layer: layer(x).sin(), x, use_reentrant=False)
        return x


@pytest.mark.parametrize(
    ("widths", "rows", "casts"),
    [
        ((1024, 1024, 1024, 1024), 4, 2),
        ((1024, 1024, 1024, 1024), 4096, 0),  # activations take more than gradients
        ((1024, 1024, 4096), 4, 1),  # the largest gradient comes first, while all is saved
    ],
)
def test_casts_are_saved_where_gradients_take_the_memory_later(widths, rows, casts):
    step = Step(Checkpointed(*widths), rows, widths[0])
    weights = [node for node in step.saved if node.meta["val"].dim() == 2 and "primals" in str(node.all_input_nodes)]
    assert sum(node.meta["val"].shape[0] != rows for node in weights) == casts
    assert {node.name for node in weights} <= {node.name for node in step.backward.graph.find_nodes(op="placeholder")}


def test_gradients_beside_casts_that_are_saved():
    torch.manual_seed(0)
    model = Checkpointed(64, 64, 64, 64, 64)
    reference, x = copy.deepcopy(model), torch.randn(4, 64)
    for call in (compile_rtx(model), reference):
        call(x).float().square().mean().backward()
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=5e-2, atol=1e-4)


def test_what_depends_on_a_size_alone_is_not_saved_in_its_place():
    """Sizes come after all tensors."""

    def inner(x: torch.Tensor) -> torch.Tensor:
        return layer(x * torch.arange(x.shape[0], dtype=x.dtype).sin().unsqueeze(1)).sin()

    layer = nn.Linear(64, 64)
    compiled = compile_rtx(lambda x: checkpoint(inner, x, use_reentrant=False).sin(), dynamic=True)
    for rows in (3, 5):
        x, found = torch.randn(rows, 64), []
        for call in (compiled, lambda x: inner(x).sin()):
            layer.zero_grad()
            call(x).square().mean().backward()
            found.append(layer.weight.grad)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_parameter_that_is_cast_again_must_not_change_before():
    layer = nn.Linear(1024, 1024)
    layer.weight.requires_grad_(False)  # a gradient would take the memory of the cast
    compiled = compile_rtx(layer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(torch.randn(2, 1024, requires_grad=True)).float().sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
