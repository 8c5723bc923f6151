"""Weights that are made of the same parameters, such as the codes and the scales of a quantized one: their recipes have
most of their calls in common, which a joint recipe runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Node, Value, Weight, attr_map, attr_values
from torch_rtx.runtime.code import Code, compile_graph


class Recipes:
    """The recipes of weights, and joint ones, as code. Each is compiled when it first runs: a refit and a store that is
    attached run joint recipes, and single ones of the other weights alone; an engine that has its weights runs none."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._code: dict[tuple[int, ...], Code] = {}

    @cached_property
    def _joint(self) -> dict[tuple[int, ...], Graph]:
        return dict(joint_recipes(self._weights))

    @cached_property
    def _groups(self) -> dict[int, tuple[int, ...]]:
        return {index: indices for indices in self._joint for index in indices}

    def beside(self, index: int) -> tuple[int, ...]:
        """The weights that the joint recipe of this one makes, it among them, by index; without one it alone."""
        return self._groups.get(index, (index,))

    def code(self, indices: tuple[int, ...]) -> Code:
        """What makes these weights: one that has a recipe, or those of a joint recipe."""
        if indices not in self._code:
            recipe = self._joint[indices] if len(indices) > 1 else self._weights[indices[0]].recipe
            assert recipe is not None
            self._code[indices] = compile_graph(recipe, self._device, name="recipes" if len(indices) > 1 else "recipe")
        return self._code[indices]


def joint_recipes(weights: Sequence[Weight]) -> list[tuple[tuple[int, ...], Graph]]:
    """The weights of which a recipe makes several, by index, with that recipe. It returns them in this order, each in
    memory of its own, and takes the parameters as the recipe of the first one does."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        if weight.recipe is not None:
            found.setdefault(weight.names, []).append(index)
    groups = (tuple(indices) for indices in found.values() if len(indices) > 1)
    recipes = {index: weight.recipe for index, weight in enumerate(weights) if weight.recipe is not None}
    joint = ((group, _joined([recipes[index] for index in group])) for group in groups)
    return [(group, recipe) for group, recipe in joint if _is_separate(recipe)]


def _joined(recipes: Sequence[Graph]) -> Graph:
    """One graph with the results of all. Calls with equal arguments are one, unless they draw random numbers."""
    inputs, nodes, outputs = recipes[0].inputs, list[Node](), list[Attr]()
    known: dict[object, tuple[Value | None, ...]] = {}
    for recipe in recipes:
        now = {own.name: common for own, common in zip(recipe.inputs, inputs, strict=True)}
        for node in recipe.nodes:
            args = node.map_inputs(lambda value, now=now: now[value.name])  # type: ignore[misc]
            types = [None if value is None else value.type for value in node.outputs]
            key = (node.op, args, tuple(types), None if _is_pure(node) else len(nodes))
            if key not in known:
                names = [f"joint{len(nodes)}_{place}" for place in range(len(types))]
                made = [None if type_ is None else Value(n, type_) for n, type_ in zip(names, types, strict=True)]
                known[key] = tuple(made)
                nodes.append(replace(node, args=args, outputs=known[key], loc=None))
            now |= {own.name: one for own, one in zip(node.outputs, known[key], strict=True) if own and one}
        outputs += [attr_map(output, lambda value, now=now: now[value.name]) for output in recipe.outputs]  # type: ignore[misc]
    return replace(recipes[0], inputs=inputs, nodes=tuple(nodes), outputs=tuple(outputs))


def _is_separate(recipe: Graph) -> bool:
    """No result shares memory with a parameter or another result."""
    bases, taken = aten.bases(recipe), {value.name for value in recipe.inputs}
    for value in attr_values(recipe.outputs):
        base = bases.get(value.name, value.name)
        if base in taken:
            return False
        taken.add(base)
    return True


def _is_pure(node: Node) -> bool:
    """A call that gives the same for the same arguments."""
    return node.kind == "op" and node.body is None and not aten.is_random(aten.overload(node.op))
