"""What remains a library call or a fallback of operators of sequence models: a table that may only shrink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from tests.doubles.interpreter import begin, run
from torch_rtx import aten
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph, TensorType, attr_values
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.module import CompiledModule
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode=mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bag(x))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x)[0])


class Steps(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.relu(state if isinstance(state, torch.Tensor) else state[0])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def below(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def built(model: nn.Module, args: tuple[Any, ...], dynamic: Any = None) -> CompiledModule:
    """The model for a GPU, without its kernels."""
    settings = CompilationSettings(device="cuda", targets="sm_90", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(model.eval(), args, dynamic_shapes=dynamic, settings=settings)


def fused(model: nn.Module, args: tuple[Any, ...], dynamic: Any = None) -> Graph:
    """The graph that the model has for a GPU."""
    return built(model, args, dynamic).engine.graph


def left(graph: Graph) -> dict[str, int]:
    """The calls and the fallbacks in a graph, by name; those on numbers of the host aside."""
    nodes = [node for node in graph.nodes if node.kind in ("extern", "fallback")]
    return dict(Counter(f"{'fallback ' * (node.kind == 'fallback')}{node.op.split('.')[1]}" for node in nodes))


X = drawn(6, 12)
GROUPS = torch.tensor([2, 2, 5], dtype=torch.int32)
# By operator, between two others: the module, its inputs, and the calls that remain.
TABLE: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, int]]] = {
    "torch.tensor(c)": (Call(lambda x: x.relu() * torch.tensor(0.5) + 1), (X,), {}),
    "the root of a size": (Call(lambda x: x.relu() / torch.tensor(x.shape[0]).sqrt()), (X,), {}),
    "a fill with a number": (Call(lambda x: x.relu().masked_fill(x > 1, torch.tensor(-3.0)) + 1), (X,), {}),
    "cumsum": (Call(lambda x: (x * 2).cumsum(-1).relu()), (X,), {}),
    "cumsum of a long row": (Call(lambda x: (x * 2).cumsum(-1).relu()), (drawn(2, 9000),), {}),
    "cumsum of masks": (Call(lambda x: (x > 0).cumsum(0) * 2), (drawn(9000, 3),), {}),
    "cumprod": (Call(lambda x: (x * 2).cumprod(0).relu()), (X,), {}),
    "logcumsumexp": (Call(lambda x: (x * 2).logcumsumexp(-1).relu()), (X,), {}),
    "a lone flip": (Call(lambda x: x.flip(0)), (X,), {}),
    "a lone roll": (Call(lambda x: x.roll((1, -3), (0, 1))), (X,), {}),
    "index_put": (Call(lambda x, i, v: (x * 2).index_put((i,), v * 2).relu()), (X, torch.randperm(6)[:3], X[:3]), {}),
    "index_put of a mask": (Call(lambda x: (x * 2).index_put((x > 0,), torch.tensor(1.0)).relu()), (X,), {}),
    "index_copy": (Call(lambda x, i, v: (x * 2).index_copy(0, i, v).relu()), (X, torch.randperm(6)[:3], X[:3]), {}),
    "index_fill": (Call(lambda x, i: (x * 2).index_fill(0, i, 3.0).relu()), (X, torch.randperm(6)[:3]), {}),
    "scatter": (Call(lambda x, i: (x * 2).scatter(1, i, x * 3).relu()), (X, X.argsort(1)[:, :4]), {}),
    "sort": (Call(lambda x: torch.sort(x * 2)[0].relu()), (X,), {}),
    "argsort": (Call(lambda x: torch.argsort(x * 2, 0) + 1), (X,), {}),
    "topk": (Call(lambda x: torch.topk(x.softmax(-1), 2)[0] * 2), (X,), {}),
    "histc": (Call(lambda i: torch.histc((i + 1).int(), 8, 0, 7) * 2), (below(7, 30),), {}),
    "bucketize": (Call(lambda x, e: torch.bucketize(x * 2, e) + 1), (X, torch.linspace(-2, 2, 9)), {}),
    "empty_like": (Call(lambda x: torch.empty_like(x).fill_(2) + x), (X,), {}),
    "embedding_bag, sum": (Bag("sum"), (below(20, 4, 3),), {}),
    "embedding_bag, mean": (Bag("mean"), (below(20, 4, 3),), {}),
    "embedding_bag, max": (Bag("max"), (below(20, 4, 3),), {}),
    "embedding_bag of any sizes": (
        Call(lambda i, o, w: nn.functional.embedding_bag(i, w, o).relu()),
        (below(6, 9), torch.tensor([0, 2, 7]), X),
        {"embedding_bag": 1},
    ),
    "_grouped_mm": (
        Call(lambda x, w, o: torch._grouped_mm(x.relu(), w, o) + 1),
        (drawn(6, 16).bfloat16(), drawn(3, 16, 8).bfloat16(), GROUPS),
        {},
    ),
    "LSTM": (Recurrent(nn.LSTM), (drawn(2, 3, 8),), {}),
    "GRU": (Recurrent(nn.GRU), (drawn(2, 3, 8),), {}),
    "LSTM of many steps": (Recurrent(nn.LSTM), (drawn(2, 80, 8),), {"lstm": 1}),
    "LSTM cells": (Steps(nn.LSTMCell), (drawn(2, 9, 8),), {}),
    "GRU cells": (Steps(nn.GRUCell), (drawn(2, 9, 8),), {}),
    "scatter_reduce": (
        Call(lambda x, i: x.scatter_reduce(1, i, x, "amax")),
        (X, below(12, 6, 3)),
        {"scatter_reduce": 1},
    ),
    "masked_scatter": (Call(lambda x: x.masked_scatter(x > 0, x * 2) + 1), (X,), {"masked_scatter": 1}),
    "cummax": (Call(lambda x: (x * 2).cummax(-1)[0].relu()), (X,), {}),
    "kthvalue": (Call(lambda x: (x * 2).kthvalue(3)[0] + 1), (X,), {"kthvalue": 1}),
    "bincount": (
        Call(lambda i: torch.bincount(i, minlength=8) + 1),
        (below(7, 30),),
        {"fallback bincount": 1, "_assert_scalar": 1},
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_calls_that_remain(name: str) -> None:
    model, args, calls = TABLE[name]
    assert left(fused(model, args)) == calls


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTM cells", "GRU cells"])
def test_steps_share_their_kernels(name: str) -> None:
    """Of the first step, of those between, and of the last one; and one product of all inputs."""
    model, args, _ = TABLE[name]
    nodes = [node for node in fused(model, args).nodes if node.kind == "kernel"]
    assert len({node.op for node in nodes}) <= 7


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_of_a_file_take_other_weights(kind: type[nn.Module], tmp_path: Path) -> None:
    """Such cells are fused calls on CUDA, one of which has no formula in PyTorch."""
    model, other, x = Steps(kind), Steps(kind), drawn(2, 9, 8)
    torch_rtx.save(built(model, (x,)), tmp_path / "cells.rtx")
    engine = torch_rtx.load(tmp_path / "cells.rtx", device="cpu")
    engine.refit(other.state_dict())
    torch.testing.assert_close(engine(x), other(x))


def test_distances_are_a_product() -> None:
    """Of more than 25 rows, for which PyTorch computes them so, too."""
    x, y = drawn(2, 30, 12), drawn(2, 7, 12) - 1
    module = built(Call(lambda x, y: torch.cdist(x, y) + 1), (x, y))
    assert left(module.engine.graph) == {}
    torch.testing.assert_close(module(x, y), torch.cdist(x, y) + 1)


def interpreted(graph: Graph, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What `graph`, which has no parameters, returns with its kernels in Triton's interpreter."""
    store = WeightStore(graph, CPU, {})
    store.attach({})
    weights = (weight.value.name for weight in graph.weights)
    values = dict(zip([value.name for value in graph.inputs], inputs, strict=True))
    values |= dict(zip(weights, store.values, strict=True))
    for node in graph.nodes:
        given = [values[value.name] for value in node.inputs]
        if node.body is None:
            calls = Graph("fused", tuple(dict.fromkeys(node.inputs)), nodes=(node,), outputs=tuple(node.results))
            made = compile_graph(calls, CPU)([values[value.name] for value in calls.inputs], ())
        else:
            kernel = generate(node.body, node.op, arch_of(90), 0)
            assert kernel is not None
            types = [value.type for value in node.results if isinstance(value.type, TensorType)]
            made = [torch.empty_strided(t.shape, t.strides, dtype=aten.DTYPES[t.dtype]) for t in types]  # type: ignore[arg-type]
            begin(node.body, given, made)
            run(kernel, [*given, *made])
        values.update(zip((value.name for value in node.results), made, strict=True))
    return [values[value.name] for value in attr_values(graph.outputs)]


INF, NAN = float("inf"), float("nan")
ROWS = torch.tensor([[2.0, NAN, 2, -INF, INF, 0], [-INF, -INF, 5, -INF, -INF, -INF], [3, 1, NAN, 1, NAN, -0.0]])


def routed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the two experts of each row: those in order, where groups end, the way back, and whether an expert is none."""
    experts, order = torch.sort(x.topk(2)[1].view(-1), stable=True)
    ends = torch.histc(experts.float(), 5, 0, 4).cumsum(0, dtype=torch.int32)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return experts * 2, ends + 1, back + 1, order.argsort() + 1, experts.masked_fill(experts >= 5, 7) + 1


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("function", "x"),
    [
        (routed, drawn(150, 5)),
        (lambda x: torch.sort(x, stable=True), ROWS),
        (lambda x: torch.sort(x, dim=0, descending=True, stable=True), ROWS.half()),
        (lambda x: torch.sort(x, stable=True), torch.tensor([2**40, -(2**40), 3, 2**40, 3])),
        (lambda x: torch.sort(x, dim=1, stable=True), below(4, 2, 33, 3).int()),
        (lambda x: torch.sort(x.topk(2)[1].view(-1), stable=True), drawn(1500, 5)),
        (lambda x: torch.sort(-x.topk(2)[1].int().view(-1), descending=True, stable=True), drawn(30, 5)),
        (lambda x: torch.bucketize(x, torch.arange(-1, 3, device=x.device).div(2), right=True), ROWS),
        (lambda x: torch.searchsorted(torch.arange(4.0, device=x.device) // 2, x, out_int32=True), ROWS),
    ],
    ids=[
        "routed",
        "rows",
        "columns",
        "large integers",
        "the middle axis",
        "experts",
        "counted down",
        "bucketize",
        "searchsorted",
    ],
)
def test_sorting_by_comparison(function: Callable[..., Any], x: torch.Tensor) -> None:
    graph = fused(Call(function), (x,))
    assert left(graph) == {}
    found, wanted = interpreted(graph, (x,)), function(x)
    for mine, right in zip(found, wanted if isinstance(wanted, tuple) else [wanted], strict=True):
        torch.testing.assert_close(mine, right, equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    "x", [ROWS, ROWS.bfloat16(), below(3, 5, 12), drawn(2, 40)], ids=["f32", "bf16", "i64", "more"]
)
def test_the_largest_elements(x: torch.Tensor) -> None:
    """Among equal ones any may be chosen, but none twice."""
    graph = fused(Call(lambda x: torch.topk(x, 4)), (x,))
    assert left(graph) == {}
    values, positions = interpreted(graph, (x,))
    torch.testing.assert_close(values, torch.topk(x, 4)[0], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(x.gather(1, positions), values, equal_nan=True, rtol=0, atol=0)
    assert all(len(set(row)) == 4 for row in positions.tolist())


@pytest.mark.parametrize("largest", [True, False])
def test_many_elements_are_those_of_a_sorted_row(largest: bool) -> None:
    x = drawn(20, 3)
    found = interpreted(graph := fused(Call(lambda x: torch.topk(x, 18, 0, largest)), (x,)), (x,))
    assert left(graph) == {}
    for mine, right in zip(found, torch.topk(x, 18, 0, largest), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0)


def test_integers_are_counted() -> None:
    """PyTorch has this histogram of integers on GPUs alone."""
    x = below(9, 50).int()
    (found,) = interpreted(fused(Call(lambda x: torch.histc(x, 5, 1, 5)), (x,)), (x,))
    assert found.tolist() == [int((x == number).sum()) for number in range(1, 6)]


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((1, 1), by), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.by


def test_numbers_of_models_are_parts_of_their_graphs() -> None:
    """Two that differ in a number are two graphs, also in the sign of a zero; whatever the number's shape."""
    texts = {str(fused(Call(lambda x, c=c: x / torch.tensor(c)), (X,))) for c in (0.0, -0.0, 0.5)}
    texts |= {str(fused(Scaled(by), (X,))) for by in (2.0, 3.0)}
    assert len(texts) == 5
    assert not any("constant" in text for text in texts)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * torch.randn(3, 32, 16))
        self.down = nn.Parameter(0.1 * torch.randn(3, 16, 16))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        gate, value = torch._grouped_mm(x, self.up.mT, offsets).chunk(2, -1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * value, self.down.mT, offsets)


def test_gradients_of_experts() -> None:
    torch.manual_seed(0)
    model, offsets = Experts().bfloat16(), torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    tensors = [x, *model.parameters()]
    gradient = torch.randn(5, 16).bfloat16()
    found = torch.autograd.grad(torch.compile(model, backend="rtx")(x, offsets), tensors, gradient)
    for mine, right in zip(found, torch.autograd.grad(model(x, offsets), tensors, gradient), strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)


class First(nn.Module):
    def __init__(self, model: nn.Module, **kwargs: bool) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, **self.kwargs)[0]


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_of_transformers_are_kernels(dtype: torch.dtype) -> None:
    """In float16 transformers has an operator of its own for them, in bfloat16 it asks for the GPU's capability."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    graph = fused(First(transformers.MixtralModel(config).to(dtype), use_cache=False), (below(50, 2, 12),))
    assert left(graph) == {}
    assert sum("grouped_mm" in node.op for node in graph.nodes) == 2
    text = str(graph)
    assert text.count("whole=True") == 2  # all experts are here: no row is masked
    assert text.count("aten.cumsum.default") == 1  # one kernel sorts, and finds groups and the way back


def test_relative_positions_of_transformers_are_a_bias_of_attention() -> None:
    """Of any length, and with a mask that hides all keys of a query."""
    transformers = pytest.importorskip("transformers")
    positions = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    positions |= {"share_att_key": True, "position_biased_input": False, "max_position_embeddings": 32}
    config = transformers.DebertaV2Config(**SIZES, **positions, type_vocab_size=0)
    dynamic = {"x": {1: torch.export.Dim("n", min=2, max=32)}}
    graph = fused(First(transformers.DebertaV2Model(config).half()), (below(50, 2, 12),), dynamic)
    assert left(graph) == {}
    assert sum("attention" in node.op for node in graph.nodes) == 1
