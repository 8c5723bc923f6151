"""Runs the recipes of weights: those of the same parameters as one, and those of one form together.

Each form is compiled once, when it first runs: an engine that has its weights compiles none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import Graph, TensorType, Value, Weight, attr_values
from torch_rtx.runtime.batched_recipes import batched
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.joint_recipes import groups_of, joint
from torch_rtx.runtime.recipe_forms import form_of
from torch_rtx.runtime.recipe_passes import fewer_passes, joined_inputs

# Bytes of all values at one time while recipes run together.
MAX_BYTES = 1 << 28
# Bytes of a recipe's inputs for each of its calls: to stack more takes a GPU longer than the host takes for the call.
MAX_STACKED = 1 << 22
Group = tuple[int, ...]  # weights, by index, that one recipe makes


class Form:
    """A recipe, and all others that differ in the names of values alone."""

    def __init__(self, recipe: Graph, device: torch.device) -> None:
        self._given, self._device = recipe, device
        self._recipe = recipe = self._lean(recipe)
        views = aten.bases(recipe)
        calls = sum(any(value.name not in views for value in node.results) for node in recipe.nodes)
        pays = sum(map(_bytes, recipe.inputs)) <= MAX_STACKED * calls
        self._most = max(1, MAX_BYTES // max(1, most_bytes(recipe))) if pays else 1

    @cached_property
    def code(self) -> Code:
        """Of one recipe."""
        return compile_graph(self._recipe, self._device, name="recipe")

    @cached_property
    def together(self) -> Callable[[Sequence[Sequence[torch.Tensor]]], list[torch.Tensor]] | None:
        """Of several, see `batched`: from the tensors of each to stacked results."""
        graph = batched(self._given)
        if graph is None:
            return None
        graph, joined = joined_inputs(self._lean(graph))
        code = compile_graph(graph, self._device, name="recipes")

        def run(inputs: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
            return code(Owned(_stacked([[own[i] for i in parts] for own in inputs]) for parts in joined), ())

        return run

    def _lean(self, graph: Graph) -> Graph:
        """For a GPU, with fewer passes over memory. On a CPU, calls work on pieces that are in a cache."""
        return fewer_passes(graph) if self._device.type == "cuda" else graph

    def batches(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """Those that run together, of about the same number each."""
        count = len(groups)
        if count > 1 and self._most > 1 and self.together is not None:
            parts = -(-count // self._most)
            ends = [count * part // parts for part in range(parts + 1)]
            yield from (groups[start:end] for start, end in pairwise(ends))
        else:
            yield from ([group] for group in groups)


class Recipes:
    """The recipes of weights, and joint ones: batches of joint ones, and of single ones of the other weights, make many
    weights. A weight is made alone by its own recipe."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._keys: dict[int, Hashable] = {}
        self._forms: dict[Hashable, Form | None] = {}
        self._known: dict[Group, Form | None] = {}

    def key(self, index: int) -> Hashable:
        """Equal for weights, which have recipes, that are made in the same way."""
        if index not in self._keys:
            self._keys[index] = form_of(self._recipe(index))
        return self._keys[index]

    def _recipe(self, index: int) -> Graph:
        recipe = self._weights[index].recipe
        assert recipe is not None
        return recipe

    def _form(self, group: Group) -> Form | None:
        """The form of the recipe that makes this group; None: no joint recipe does."""
        if group not in self._known:
            key = tuple(map(self.key, group))
            if key not in self._forms:
                recipes = list(map(self._recipe, group))
                recipe = joint(recipes) if len(recipes) > 1 else recipes[0]
                self._forms[key] = None if recipe is None else Form(recipe, self._device)
            self._known[group] = self._forms[key]
        return self._known[group]

    @cached_property
    def _joint(self) -> dict[int, Group]:
        """By index, all that the joint recipe of a weight makes."""
        return {index: group for group in groups_of(self._weights) if self._form(group) for index in group}

    def batches(self, indices: Iterable[int]) -> Iterator[Sequence[Group]]:
        """What makes these weights, which have recipes: one batch after another for `run`. A group has all weights that
        one recipe makes, which may be more."""
        forms: dict[Form, list[Group]] = {}
        for group in dict.fromkeys(self._joint.get(index, (index,)) for index in indices):
            if form := self._form(group):
                forms.setdefault(form, []).append(group)
        for form, groups in forms.items():
            yield from form.batches(groups)

    def run(self, batch: Sequence[Group], inputs: Sequence[Sequence[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """The weights of a batch, by index; those of several groups lie in common memory.

        Args:
            inputs: of each group, the tensors of its parameters.
        """
        form = self._form(batch[0])
        assert form is not None
        results = _together(form, inputs) if len(batch) > 1 else None
        if results is None:
            results = [form.code(own, ()) for own in inputs]
        return {i: one for group, made in zip(batch, results, strict=True) for i, one in zip(group, made, strict=True)}


def _together(form: Form, inputs: Sequence[Sequence[torch.Tensor]]) -> list[Sequence[torch.Tensor]] | None:
    """The results of each recipe; None: there is no room for what all of them need at one time."""
    assert form.together is not None
    try:
        return list(zip(*(made.unbind() for made in form.together(inputs)), strict=True))
    except torch.OutOfMemoryError:
        return None


def most_bytes(recipe: Graph) -> int:
    """Bytes of all values at one time, inputs and results included, while a recipe runs."""
    bases = aten.bases(recipe)
    last = {value.name: len(recipe.nodes) for value in attr_values(recipe.outputs)}
    last = {bases.get(name, name): end for name, end in last.items()}
    for step, node in reversed(list(enumerate(recipe.nodes))):
        for value in (*node.results, *node.inputs):
            last.setdefault(bases.get(value.name, value.name), step)
    made = [(-1, value) for value in recipe.inputs]
    made += [(step, value) for step, node in enumerate(recipe.nodes) for value in node.results]
    change = [0] * (len(recipe.nodes) + 2)  # of the bytes, at each step, the first of which takes the inputs
    for step, value in made:
        if value.name not in bases:
            change[step + 1] += _bytes(value)
            if last.get(value.name, step) + 2 < len(change):
                change[last.get(value.name, step) + 2] -= _bytes(value)
    return max(accumulate(change))


def _bytes(value: Value) -> int:
    type_ = value.type
    if not isinstance(type_, TensorType):
        return 0
    return aten.extent(type_.shape, type_.strides) * DTYPES[type_.dtype].bytes  # type: ignore[arg-type]


def _stacked(members: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The tensors, of one type, one after another in memory, each with its strides; if a member has several, which are
    contiguous, these are concatenated."""
    if len(members[0]) > 1:
        return torch.cat([tensor for parts in members for tensor in parts]).unflatten(0, (len(members), -1))
    tensors = [tensor for (tensor,) in members]
    first = tensors[0]
    if first.is_contiguous():
        return torch.stack(tensors)
    strides = aten.extent(first.shape, first.stride()), *first.stride()
    stack = torch.empty_strided((len(tensors), *first.shape), strides, dtype=first.dtype, device=first.device)
    return torch.stack(tensors, out=stack)
