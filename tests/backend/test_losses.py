"""Losses of classes in training: right by the float64 criterion, and without the logarithms of all probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.numerics import assert_right
from tests.lowering.test_kernel_models import check, kernels
from tests.lowering.test_training_graphs import OPTIONS, recorded
from torch_rtx.ir import Graph, TensorType

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ROWS, CLASSES = 40, 96
WEIGHTS = torch.linspace(0.1, 2.0, CLASSES)
Loss = Callable[[Tensor, Tensor], Tensor]
Function = Callable[..., Tensor]


def cross_entropy(**options: object) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        given = {key: v.to(logits.dtype) if isinstance(v, Tensor) else v for key, v in options.items()}
        return F.cross_entropy(logits, target, **given)  # type: ignore[arg-type]

    return loss


def widest(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def soft(target: Tensor, like: Tensor) -> Tensor:
    """Probabilities of all classes."""
    return (target[:, None] * torch.arange(like.shape[1]) / 100).to(like.dtype).softmax(1)


LOSSES: dict[str, Loss] = {
    "mean": cross_entropy(),
    "another index is ignored": cross_entropy(ignore_index=7),
    "weights": cross_entropy(weight=WEIGHTS),
    "sum": cross_entropy(reduction="sum"),
    "of each row": lambda logits, target: (cross_entropy(reduction="none")(logits, target) * WEIGHTS[:ROWS]).mean(),
    "label smoothing": cross_entropy(label_smoothing=0.1),
    "label smoothing, weights": cross_entropy(label_smoothing=0.1, weight=WEIGHTS),
    "soft targets": lambda logits, target: F.cross_entropy(widest(logits), soft(target, widest(logits))),
    "images": lambda logits, target: F.cross_entropy(logits.view(4, 10, -1).transpose(1, 2), target.view(4, 10)),
    "one row": lambda logits, target: F.nll_loss(F.log_softmax(logits[0], 0), target[0]),
    "with its logarithm of a sum": lambda logits, target: (
        F.cross_entropy(logits, target) + 0.1 * logits.logsumexp(1).square().mean()
    ),
    "divergence": lambda logits, target: F.kl_div(F.log_softmax(widest(logits), 1), soft(target, widest(logits))),
}


def step(
    loss: Loss, dtype: torch.dtype, call: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> list[Tensor]:
    """The loss and its gradients with respect to the operands of a product that makes the logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(32, CLASSES, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[3:6] = 7
    target[9] = -100 if loss is not LOSSES["another index is ignored"] else 7
    found = call(lambda x, weight, target: loss(x @ weight, target))(x, weight, target)
    found.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [found.detach(), x.grad, weight.grad]


def compiled(function: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, backend="rtx", fullgraph=True, options=OPTIONS)


def below_autocast(function: Function) -> Function:
    return torch.autocast("cpu", torch.bfloat16)(compiled(function))


@cache
def graphs_of(name: str) -> tuple[list[Graph], list[Tensor]]:
    """The forward and the backward graph below autocast, and what they give."""
    with recorded() as graphs:
        return graphs, step(LOSSES[name], torch.float32, below_autocast)


@pytest.mark.parametrize("name", LOSSES)
def test_right(name: str) -> None:
    loss = LOSSES[name]
    eager = step(loss, torch.float32, torch.autocast("cpu", torch.bfloat16))
    exact = step(loss, torch.float64, lambda function: function)
    assert_right(graphs_of(name)[1], eager, exact)


def wide(graph: Graph) -> list[str]:
    """The dtypes of values that have the size of the logits."""
    types = [value.type for node in graph.nodes for value in node.results if node.kind != "view"]
    return [type_.dtype for type_ in types if isinstance(type_, TensorType) and type_.shape == (ROWS, CLASSES)]


# A gradient of images is copied to the layout of a product.
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"one row", "images"}))
def test_nothing_but_logits_and_their_gradient_is_stored(name: str) -> None:
    (forward, backward), _ = graphs_of(name)
    assert wide(forward) == ["bf16"]
    assert wide(backward) == ["bf16"]
    assert not [node.op for graph in (forward, backward) for node in graph.nodes if node.kind in ("extern", "fallback")]


@pytest.mark.parametrize("name", LOSSES)
def test_kernels(name: str) -> None:
    for graph in graphs_of(name)[0]:
        for node in kernels(graph).values():
            if "mm" not in node.op:
                check(node, {})


def test_a_class_that_does_not_exist() -> None:
    """Eager raises an error on the CPU, and ends the process on a GPU."""
    logits = torch.randn(3, 5, requires_grad=True)
    loss = compiled(F.cross_entropy)(logits, torch.tensor([0, 5, 1]))
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert logits.grad[1].isnan().any()


def test_nothing_counts() -> None:
    """The mean of no targets is NaN, and its gradient is 0."""
    logits, target = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    loss = compiled(F.cross_entropy)(logits, target)
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    eager = logits.detach().requires_grad_()
    F.cross_entropy(eager, target).backward()
    torch.testing.assert_close(logits.grad, eager.grad, equal_nan=True)
