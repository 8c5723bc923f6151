"""Recipes of the same parameters run together, and give what each gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.ir import Graph, Weight
from torch_rtx.irparse import parse
from torch_rtx.quantization import quantize
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.joint_recipes import groups_of, joint
from torch_rtx.runtime.recipes import Recipes
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings

CPU = torch.device("cpu")
SIZE = """\
a: f32[2, 2] = op aten.abs.default(self=w)
m: f32[2, 1] = op aten.amax.default(self=a, dim=[1], keepdim=True)"""
CODES = f"""{SIZE}
q: f32[2, 2] = op aten.div.Tensor(self=w, other=m)
r: f32[2, 2] = op aten.round.default(self=q)"""
DRAWN = """\
r: f32[2, 2] = op aten.rand_like.default(self=w)
s: f32[2, 2] = op aten.add.Tensor(self=w, other=r)"""
VIEW = "t: f32[2, 2](1, 2) = op aten.t.default(self=w)"
ROWS = f"{SIZE}\ns: f32[2] = op aten.select.int(self=m, dim=1, index=0)"


def weight(calls: str) -> Weight:
    """What these calls make of a parameter w, f32[2, 2]."""
    lines = calls.splitlines()
    name, _, rest = lines[-1].partition(": ")
    body = "".join(f"    {line}\n" for line in ("input w: f32[2, 2]", *lines, f"return [{name}]"))
    head = f"  parameter 'w': f32[2, 2]\n  weight {name}: {rest.split(' = ')[0]} = 'w' graph import {{\n"
    return parse(f"graph fused {{\n{head}{body}  }}\n  return [{name}]\n}}").weights[0]


def recipes_of(weights: Sequence[Weight]) -> list[Graph]:
    return [one.recipe for one in weights if one.recipe is not None]


def of_all(*calls: str) -> Graph:
    """The joint recipe of these weights."""
    made = joint(recipes_of(list(map(weight, calls))))
    assert made is not None
    return made


def test_equal_calls_run_once() -> None:
    made = [weight(SIZE), weight(CODES)]
    assert groups_of(made) == [(0, 1)]
    both = of_all(SIZE, CODES)
    assert [node.op.split(".")[1] for node in both.nodes] == ["abs", "amax", "div", "round"]
    w = torch.randn(2, 2)
    for mine, own in zip(compile_graph(both, CPU)([w], ()), recipes_of(made), strict=True):
        assert torch.equal(mine, compile_graph(own, CPU)([w], ())[0])


def test_zeros_of_both_signs_are_different_arguments() -> None:
    both = of_all(*(f"t: f32[2, 2] = op aten.add.Tensor(self=w, other={zero})" for zero in (0.0, -0.0)))
    results = compile_graph(both, CPU)([torch.full((2, 2), -0.0)], ())
    assert [result.signbit().all().item() for result in results] == [False, True]


def test_numbers_are_drawn_for_each() -> None:
    first, second = compile_graph(of_all(DRAWN, DRAWN), CPU)([torch.zeros(2, 2)], ())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("recipes", [(CODES, VIEW), (SIZE, ROWS), (SIZE, SIZE)])
def test_results_that_would_share_memory_stay_apart(recipes: tuple[str, ...]) -> None:
    assert joint(recipes_of(list(map(weight, recipes)))) is None
    assert groups_of([weight(CODES)]) == []


@pytest.mark.parametrize("config", ["int8_dynamic"])
def test_codes_and_scales_are_made_together(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit gives the bits that the recipes give one by one, and runs the joint one alone; so do changes in place."""
    model = quantize(nn.Sequential(nn.Linear(128, 32)).half(), config)
    settings = CompilationSettings(device="cuda", targets="later")
    graph = torch_rtx.compile(model, (torch.randn(3, 128).half(),), settings=settings).engine.graph
    compiled = list[str]()
    (group,) = groups_of(graph.weights)
    both = joint(recipes_of([graph.weights[index] for index in group]))

    def recorded(graph: Graph, *args: Any, **options: Any) -> Any:
        compiled.append("joint" if graph == both else "single")
        return compile_graph(graph, *args, **options)

    monkeypatch.setattr("torch_rtx.runtime.recipes.compile_graph", recorded)
    store = WeightStore(graph, CPU, {})
    parameters = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert not compiled  # a store that is made compiles no recipe of a parameter
    alone = [store._make(index, parameters) for index in range(len(graph.weights))]
    assert "joint" not in compiled
    monkeypatch.setattr(store, "_recipes", Recipes(graph.weights, CPU))
    compiled.clear()
    store.refit(parameters, strict=False)
    others = [one for index, one in enumerate(graph.weights) if one.recipe and one.names and index not in group]
    assert sorted(compiled) == ["joint", *["single"] * len(others)]
    assert all(map(torch.equal, store.values, alone))
    store.attach(parameters)
    parameters["0.weight"].mul_(2)
    store.refresh()
    scales = [index for index in group if not torch.equal(store.values[index], alone[index])]
    assert len(scales) == 1
    torch.testing.assert_close(store.values[scales[0]], 2 * alone[scales[0]])
