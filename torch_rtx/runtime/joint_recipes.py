"""Weights that are made of the same parameters, such as the codes and the scales of a quantized one: their recipes have
most of their calls in common, which a joint recipe runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Node, Value, Weight, attr_map, attr_values
from torch_rtx.runtime.recipe_forms import call_form


def groups_of(weights: Sequence[Weight]) -> list[tuple[int, ...]]:
    """The weights, by index, that recipes make of the same parameters, where these are several."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        if weight.recipe is not None:
            found.setdefault(weight.names, []).append(index)
    return [tuple(indices) for indices in found.values() if len(indices) > 1]


def joint(recipes: Sequence[Graph]) -> Graph | None:
    """A recipe that takes the inputs of the first one and returns what each of them makes, each in memory of its own.
    None: some results would share memory with one another, or with a parameter."""
    recipe = _joined(recipes)
    return recipe if is_separate(recipe) else None


def _joined(recipes: Sequence[Graph]) -> Graph:
    """One graph with the results of all. Calls with equal arguments are one, unless they draw random numbers."""
    inputs, nodes, outputs = recipes[0].inputs, list[Node](), list[Attr]()
    known: dict[object, tuple[Value | None, ...]] = {}
    for recipe in recipes:
        now = {own.name: common for own, common in zip(recipe.inputs, inputs, strict=True)}
        for node in recipe.nodes:
            args = node.map_inputs(lambda value, now=now: now[value.name])  # type: ignore[misc]
            types = [None if value is None else value.type for value in node.outputs]
            found = call_form(replace(node, args=args), attrgetter("name"))
            key = found, None if _is_pure(node) else len(nodes)
            if key not in known:
                names = [f"joint{len(nodes)}_{place}" for place in range(len(types))]
                made = [None if type_ is None else Value(n, type_) for n, type_ in zip(names, types, strict=True)]
                known[key] = tuple(made)
                nodes.append(replace(node, args=args, outputs=known[key], loc=None))
            now |= {own.name: one for own, one in zip(node.outputs, known[key], strict=True) if own and one}
        outputs += [attr_map(output, lambda value, now=now: now[value.name]) for output in recipe.outputs]  # type: ignore[misc]
    return replace(recipes[0], inputs=inputs, nodes=tuple(nodes), outputs=tuple(outputs))


def is_separate(recipe: Graph) -> bool:
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
