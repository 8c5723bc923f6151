"""Losses by chunks of rows: where they are right by the float64 criterion, and where a product stays whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.numerics import assert_right
from tests.lowering.test_training_graphs import OPTIONS, recorded
from torch_rtx.backend import row_chunks
from torch_rtx.ir import Graph, TensorType

BATCH, LENGTH, WIDTH, CLASSES = 4, 16, 16, 96
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "small_chunks")
Loss = Callable[[Tensor, Tensor], Any]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "LEAST_ROWS", 8)


class Model(nn.Module):
    """A language model of one norm, and its loss."""

    def __init__(self, loss: Loss, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.head, self.loss = nn.Linear(WIDTH, CLASSES, bias=bias), loss
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(self.norm(self.embedding(ids))), target)


def flat(function: Loss) -> Loss:
    """A loss of all rows."""
    return lambda logits, target: function(logits.reshape(-1, CLASSES), target.reshape(-1))


def cross_entropy(**options: Any) -> Loss:
    return flat(lambda logits, target: F.cross_entropy(logits, target, **options))


def ids() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given, target = torch.randint(0, CLASSES, (2, BATCH, LENGTH), generator=generator)
    target[:, -1] = -100
    return given, target


def weights(logits: Tensor) -> Tensor:
    return torch.linspace(0.1, 2, CLASSES, dtype=torch.promote_types(logits.dtype, torch.float32))


def weighted(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weights(logits), label_smoothing=0.1)


def masked(logits: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, target, reduction="none")
    mask = (target % 3 > 0).to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


def capped(logits: Tensor, target: Tensor) -> Tensor:
    """Logits between bounds, and a penalty for large sums, as large models have."""
    bent = 5 * torch.tanh(logits / 5)
    return F.cross_entropy(bent, target) + 0.01 * torch.logsumexp(bent.to(weights(bent).dtype), -1).square().mean()


def with_hits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, target), (logits.detach().argmax(-1) == target).sum()


LOSSES: dict[str, Loss] = {
    "mean": cross_entropy(),
    "sum": cross_entropy(reduction="sum"),
    "weights and label smoothing": flat(weighted),
    "mask": flat(masked),
    "capped": flat(capped),
    "hits": flat(with_hits),
    "positions as a dimension": lambda logits, target: F.cross_entropy(logits.transpose(1, 2), target),
    "part of it": lambda logits, target: 3 * cross_entropy()(logits, target) + 1,
}
WHOLE: dict[str, Loss] = {
    "logits are returned": flat(lambda logits, target: (F.cross_entropy(logits, target), logits)),
    "losses are returned": cross_entropy(reduction="none"),
    "rows are normalized": flat(lambda logits, target: F.cross_entropy(logits / logits.detach().norm(), target)),
    "gradients are clipped": flat(lambda logits, target: F.cross_entropy(Clipped.apply(logits), target)),
    "some rows": lambda logits, target: cross_entropy()(logits[:, :-1], target[:, 1:]),
    "dropout": flat(lambda logits, target: F.cross_entropy(F.dropout(logits, 0.1), target)),
}


class Clipped(torch.autograd.Function):
    """Its gradient is not linear in that of the loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.001, 0.001)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="rtx", fullgraph=True, options={**OPTIONS, "logits_chunk_bytes": 4096}, **options
    )


def step(model: nn.Module, call: Any, *args: Tensor, autocast: torch.dtype | None) -> list[Tensor]:
    """What a call returns, and the gradients of its first result."""
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found = call(*args)
    results = found if isinstance(found, tuple) else (found,)
    results[0].sum().backward()
    return [*(one.detach() for one in results), *(one.grad for one in model.parameters() if one.grad is not None)]


def compared(model: Model, *args: Tensor, autocast: torch.dtype | None = torch.bfloat16) -> list[Graph]:
    """The graphs of a step that is right."""
    eager, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    expected = step(eager, eager, *args, autocast=autocast)
    exact = step(wide, wide, *args, autocast=None)
    with recorded() as graphs:
        assert_right(step(model, compiled(model), *args, autocast=autocast), expected, exact)
    return graphs


def is_whole(graphs: list[Graph]) -> bool:
    """A value has as many elements as all logits."""
    types = [value.type for graph in graphs for value in (*graph.inputs, *(v for n in graph.nodes for v in n.results))]
    sizes = [type_.shape for type_ in types if isinstance(type_, TensorType) and CLASSES in type_.shape]
    return any(torch.Size(shape).numel() >= BATCH * (LENGTH - 1) * CLASSES for shape in sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_chunks(name: str) -> None:
    graphs = compared(Model(LOSSES[name]), *ids())
    assert is_whole(graphs) == (name == "positions as a dimension")  # these are no rows


@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str) -> None:
    model = Model(WHOLE[name])
    if name == "dropout":
        with recorded() as graphs:
            step(model, compiled(model), *ids(), autocast=torch.bfloat16)
    else:
        graphs = compared(model, *ids())
    assert is_whole(graphs)


@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_layers(tied: bool, bias: bool, autocast: torch.dtype | None) -> None:
    assert not is_whole(compared(Model(LOSSES["mean"], tied, bias), *ids(), autocast=autocast))


class Deep(Model):
    """With a layer before it that is as wide."""

    def __init__(self) -> None:
        super().__init__(LOSSES["mean"])
        self.layer = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH), nn.LayerNorm(WIDTH))

    def forward(self, ids: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(self.layer(self.embedding(ids))), target)


def test_another_wide_layer() -> None:
    assert not is_whole(compared(Deep(), *ids()))


def test_as_many_rows_as_columns() -> None:
    """Weights have the shapes of values for all rows, too."""
    given, target = ids()
    compared(Model(LOSSES["mean"], bias=True), given[:1], target[:1], autocast=None)


def test_a_frozen_layer() -> None:
    model = Model(LOSSES["mean"])
    model.head.requires_grad_(False)
    assert not is_whole(compared(model, *ids()))


def test_halves_of_a_narrow_range() -> None:
    """GradScaler multiplies the loss so that gradients stay in range: they are not computed without the factor."""
    assert is_whole(compared(Model(LOSSES["mean"]), *ids(), autocast=torch.float16))


def test_any_number_of_rows() -> None:
    model = Model(LOSSES["mean"])
    call, eager = compiled(model, dynamic=True), copy.deepcopy(model)
    given, target = ids()
    with recorded() as graphs:
        for batch in (4, 3):
            args = given[:batch].clone(), target[:batch].clone()
            found = step(model, call, *args, autocast=None)
            torch.testing.assert_close(found, step(eager, eager, *args, autocast=None))
    assert len(graphs) == 2
    assert sum("mm" in node.op for node in graphs[0].nodes) > 3


def test_nothing_counts() -> None:
    model = Model(LOSSES["mean"])
    given, target = ids()
    found = step(model, compiled(model), given, torch.full_like(target, -100), autocast=None)
    eager = copy.deepcopy(model)
    torch.testing.assert_close(
        found, step(eager, eager, given, torch.full_like(target, -100), autocast=None), equal_nan=True
    )
    assert found[0].isnan()


def test_two_backwards() -> None:
    """The gradients that the forward has computed are multiplied by each gradient of the loss."""
    model = Model(LOSSES["mean"])
    loss = compiled(model)(*ids())
    parameters = list(model.parameters())
    one = torch.autograd.grad(loss, parameters, retain_graph=True)
    two = torch.autograd.grad(loss, parameters, torch.tensor(-2.0))
    torch.testing.assert_close([-2 * gradient for gradient in one], list(two))
