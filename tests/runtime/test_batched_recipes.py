"""Recipes of one form run together, and give the bits that each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_rtx
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.quantization import quantize
from torch_rtx.runtime import recipes
from torch_rtx.runtime.batched_recipes import batched
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.recipes import Recipes
from torch_rtx.runtime.watch import same_bits
from torch_rtx.runtime.weights import WeightStore

CPU = torch.device("cpu")
SETTINGS = torch_rtx.CompilationSettings(device="cuda", targets="later")
EDGES = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -3e38, 0.5, 2.5, -1.5])


def recipe(calls: str, given: str = "f32[5, 7]") -> Graph:
    """The graph that makes the last of these calls' results of one input, w."""
    last = calls.strip().splitlines()[-1].partition(":")[0].strip()
    return parse(f"graph import {{\n  input w: {given}\n{calls.strip()}\n  return [{last}]\n}}")


EXACT = {
    "scales": """
        a: f32[5, 7] = op aten.abs.default(self=w)
        m: f32[5, 1] = op aten.amax.default(self=a, dim=[-1], keepdim=True)
        c: f32[5, 1] = op aten.clamp.default(self=m, min=1e-30)
        s: f32[5, 1] = op aten.div.Tensor(self=c, other=127)
        q: f32[5, 7] = op aten.div.Tensor(self=w, other=s)
        r: f32[5, 7] = op aten.round.default(self=q)
        l: f32[5, 7] = op aten.clamp.default(self=r, min=-127, max=127)
        i: i8[5, 7] = op aten._to_copy.default(self=l, dtype='i8')
        t: i8[7, 5](1, 7) = op aten.t.default(self=i)""",
    "a scale of all, which has no dimensions": """
        a: f32[5, 7] = op aten.abs.default(self=w)
        m: f32[()] = op aten.amax.default(self=a)
        s: f32[()] = op aten.rsqrt.default(self=m)
        n: f32[()] = op aten.scalar_tensor.default(s=0.3, dtype='f32', device='main')
        b: bool[5, 7] = op aten.lt.Tensor(self=a, other=s)
        o: f32[5, 7] = op aten.where.self(condition=b, self=s, other=n)
        q: f32[5, 7] = op aten.mul.Tensor(self=w, other=o)""",
    "an operand with fewer dimensions": """
        a: f32[5, 7] = op aten.abs.default(self=w)
        m: f32[7] = op aten.amax.default(self=a, dim=[0])
        q: f32[5, 7] = op aten.sub.Tensor(self=w, other=m)
        e: f32[3, 5, 7](0, 7, 1) = op aten.expand.default(self=q, size=[3, -1, -1])
        f: f8e4m3fn[3, 5, 7] = op aten._to_copy.default(self=e, dtype='f8e4m3fn')""",
    "packed": """
        i: i32[5, 7] = op aten._to_copy.default(self=w, dtype='i32')
        p: i32[5, 8] = op aten.constant_pad_nd.default(self=i, pad=[0, 1], value=3)
        s: i32[5, 4](8, 2) = op aten.slice.Tensor(self=p, dim=1, start=0, end=8, step=2)
        f: i32[5, 4] = op aten.flip.default(self=s, dims=[0])
        h: i32[5, 4] = op aten.__lshift__.Scalar(self=f, other=4)
        o: i32[5, 4] = op aten.bitwise_or.Tensor(self=f, other=h)
        k: i32[5, 2, 4] = op aten.stack.default(tensors=[o, f], dim=-2)
        x: i32[4, 5, 2](1, 8, 4) = op aten.permute.default(self=k, dims=[-1, 0, 1])
        c: i32[4, 5, 2] = op aten.clone.default(self=x, memory_format='contiguous_format')
        v: i32[40] = op aten.view.default(self=c, size=[-1])
        b: u8[160] = op aten.view.dtype(self=v, dtype='u8')""",
    "sums of integers": """
        i: i8[5, 7] = op aten._to_copy.default(self=w, dtype='i8')
        s: i64[7] = op aten.sum.dim_IntList(self=i, dim=[0])
        l: i64[()] = op aten.amin.default(self=s, dim=0)
        u: i64[1] = op aten.unsqueeze.default(self=l, dim=0)
        c: i64[8] = op aten.cat.default(tensors=[s, u])""",
    "channels last": """
        v: f32[1, 5, 7, 1] = op aten.view.default(self=w, size=[1, 5, 7, 1])
        x: f32[7, 5, 1, 1](1, 7, 35, 1) = op aten.transpose.int(self=v, dim0=0, dim1=-2)
        n: f32[7, 5, 1, 1](1, 7, 35, 1) = op aten.neg.default(self=x)
        c: f32[7, 5, 1, 1](5, 1, 5, 5) = op aten.clone.default(self=n, memory_format='channels_last')""",
}


@pytest.mark.parametrize("calls", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("layout", ["f32[5, 7]", "f32[5, 7](1, 5)"])
def test_bits_of_each_alone(calls: str, layout: str) -> None:
    check_bits(calls, layout, CPU)


def check_bits(calls: str, layout: str, device: torch.device) -> None:
    """Those of a recipe whose input has this type."""
    single = recipe(calls, layout)
    graph = batched(single)
    assert graph is not None
    one, all_ = compile_graph(single, device), compile_graph(graph, device)
    members = [torch.randn(5, 7, device=device) * 10.0**power for power in (-6, 0, 0, 1, 30)]
    members[2].view(-1)[: len(EDGES)] = EDGES.to(device)
    if "(1, 5)" in layout:
        members = [member.t().contiguous().t() for member in members]
    (results,) = all_([recipes._stacked([[member] for member in members])], ())
    for member, found in zip(members, results.unbind(), strict=True):
        (own,) = one([member], ())
        assert own.stride() == found.stride()
        assert same_bits(own, found)


ROUNDED = {
    "a sum": "r: f32[5] = op aten.sum.dim_IntList(self=w, dim=[1])",
    "zeros of both signs": "r: f32[5] = op aten.amax.default(self=w, dim=[1])",
    "no single operation": "r: f32[5, 7] = op aten.exp.default(self=w)",
    "a factor": "r: f32[5, 7] = op aten.add.Tensor(self=w, other=w, alpha=0.3)",
    "numbers at random": "r: f32[5, 7] = op aten.rand_like.default(self=w)",
    "a product": "t: f32[7, 5](1, 7) = op aten.t.default(self=w)\n  r: f32[5, 5] = op aten.mm.default(self=w, mat2=t)",
    "memory of the parameter": "r: f32[7, 5](1, 7) = op aten.t.default(self=w)",
    "another dtype if the number had a dimension": """
        h: f16[5, 7] = op aten._to_copy.default(self=w, dtype='f16')
        a: f32[5, 7] = op aten.abs.default(self=w)
        m: f32[()] = op aten.amax.default(self=a)
        r: f16[5, 7] = op aten.div.Tensor(self=h, other=m)""",
    "the result of no parameter": """
        n: f32[()] = op aten.scalar_tensor.default(s=0.3, dtype='f32', device='main')
        r: f32[()] = op aten.neg.default(self=n)""",
}


@pytest.mark.parametrize("calls", ROUNDED.values(), ids=ROUNDED)
def test_others_run_one_by_one(calls: str) -> None:
    single = recipe(calls)
    compile_graph(single, CPU)([torch.ones(5, 7)], ())  # it is a recipe, however
    assert batched(single) is None


def test_expanded_parameters_are_not_stacked() -> None:
    negated = "n: f32[5, 7] = op aten.neg.default(self=w)"
    assert batched(recipe(negated)) is not None
    assert batched(recipe(negated, "f32[5, 7](0, 1)")) is None


class Calls(TorchDispatchMode):
    """Counts the calls that do work."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not all(r.alias_info for r in func._schema.returns) or "copy_" in str(func)
        return func(*args, **(kwargs or {}))


FORMATS = ["half", "fp8_dynamic", "int8", "int8_weight_only", "int4_weight_only", "nvfp4"]


@cache
def built(config: str) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    if config == "half":
        model, x = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4))), torch.randn(1, 8, 16, 16).half()
    else:
        model, x = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))), torch.randn(3, 128).half()
    model = model.half().eval()
    if config != "half":
        quantize(model, config, lambda model: model(x))
    return model, torch_rtx.compile(model, (x,), settings=SETTINGS).engine.graph


@pytest.fixture(params=FORMATS)
def layers(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph]:
    """Equal layers, and their graph."""
    return built(request.param)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_store_of_equal_layers(layers: tuple[nn.Module, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit, attached weights and changes in place give the bits of recipes one by one, in the calls of one layer."""
    model, graph = layers
    store, given = WeightStore(graph, CPU, {}), tensors_of(model)
    alone = [store._make(index, given) for index in range(len(graph.weights))]
    store.refit(given, strict=False)
    with Calls() as calls:
        store.refit(given, strict=False)
    assert all(map(same_bits, store.values, alone))
    single = max(len(one.recipe.nodes) for one in graph.weights if one.recipe)
    assert calls.count < 2.5 * single + 10

    store.attach(given)
    assert all(map(same_bits, store.values, alone))
    own = [value for value, owned in zip(store.values, store._owned, strict=True) if owned]
    assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in own)
    for name in ("1.weight", "3.weight"):
        given[name].mul_(-2)
    places = [value.data_ptr() for value in store.values]
    ran = list[int]()
    original = Recipes.run
    monkeypatch.setattr(Recipes, "run", lambda own, batch, *rest: ran.append(len(batch)) or original(own, batch, *rest))
    store.refresh()
    assert set(ran) == {2}  # the layers that changed, and no others
    assert [value.data_ptr() for value in store.values] == places
    assert all(map(same_bits, store.values, [store._make(index, given) for index in range(len(graph.weights))]))


@pytest.mark.parametrize("layers", ["fp8_dynamic"], indirect=True)
def test_batches_are_bounded(layers: tuple[nn.Module, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = layers
    taken: dict[int, list[int]] = {}
    for limit in (1, 500_000, 1 << 28):
        monkeypatch.setattr(recipes, "MAX_BYTES", limit)
        own = [index for index, one in enumerate(graph.weights) if one.recipe is not None and len(one.recipe.nodes) > 3]
        taken[limit] = [len(batch) for batch in Recipes(graph.weights, CPU).batches(own)]
        store = WeightStore(graph, CPU, {})
        store.refit(tensors_of(model), strict=False)
        alone = [store._make(index, tensors_of(model)) for index in range(len(graph.weights))]
        assert all(map(same_bits, store.values, alone))
    monkeypatch.setattr(recipes, "MAX_STACKED", 3000)  # of 32 KB, and about ten calls
    assert max(len(batch) for batch in Recipes(graph.weights, CPU).batches(own)) == 1
    assert taken == {1: [1] * 4, 500_000: [2, 2], 1 << 28: [4]}


def test_without_room_for_all_they_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = built("fp8_dynamic")
    store = WeightStore(graph, CPU, {})

    def fail(members: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(recipes, "_stacked", fail)
    store.refit(tensors_of(model), strict=False)
    assert all(map(same_bits, store.values, [store._make(i, tensors_of(model)) for i in range(len(graph.weights))]))


def test_bytes_at_one_time() -> None:
    """Inputs are free after their last use, views take nothing, and results stay."""
    calls = """
        h: f16[5, 7] = op aten._to_copy.default(self=w, dtype='f16')
        t: f16[7, 5](1, 7) = op aten.t.default(self=h)
        s: f32[7, 5](1, 7) = op aten._to_copy.default(self=t, dtype='f32')
        n: f32[7, 5](1, 7) = op aten.mul.Tensor(self=s, other=t)"""
    assert recipes.most_bytes(recipe(calls)) == 35 * (2 + 4 + 4)  # h, s and n
    assert recipes.most_bytes(recipe(calls.rpartition("\n")[0])) == 35 * (4 + 2)  # w and h, then h and s
    assert recipes.most_bytes(recipe("a: f32[5, 7] = op aten.abs.default(self=w)")) == 35 * (4 + 4)


@pytest.mark.parametrize("layers", ["fp8_dynamic"], indirect=True)
def test_a_batch_that_fails_changes_nothing(layers: tuple[nn.Module, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = layers
    monkeypatch.setattr(recipes, "MAX_BYTES", 1)  # of several batches
    store = WeightStore(graph, CPU, {})
    store.refit(tensors_of(model), strict=False)
    before, original, count = [value.clone() for value in store.values], Recipes.run, 0

    def run(own: Recipes, *given: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError("no room")
        return original(own, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Recipes, "run", run)
    others = {name: 2 * tensor for name, tensor in tensors_of(model).items()}
    give: Callable[..., None]
    for give in (store.refit, store.attach):
        count = 0
        with pytest.raises(torch.OutOfMemoryError):
            give(others, strict=False)
        assert all(map(same_bits, store.values, before))
    store.refit(others, strict=False)
    assert not all(map(same_bits, store.values, before))
