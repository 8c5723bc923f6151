"""Runs the recipes of weights: those of the same parameters as one, and those of one form together.

Each form is compiled once, when it first runs: an engine that has its weights compiles none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import Graph, TensorType, Weight
from torch_rtx.runtime.batched_recipes import batched
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.joint_recipes import joint_recipes
from torch_rtx.runtime.recipe_forms import form_of

# Bytes of all values of the recipes that run together. What larger recipes do takes longer than to launch it.
MAX_BYTES = 1 << 28
Group = tuple[int, ...]  # weights, by index, that one recipe makes


class Form:
    """A recipe, and all others that differ in the names of values alone."""

    def __init__(self, recipe: Graph, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        views = aten.bases(recipe)
        types = (v.type for v in recipe.values() if v.name not in views and isinstance(v.type, TensorType))
        sizes = (aten.extent(t.shape, t.strides) * DTYPES[t.dtype].bytes for t in types)  # type: ignore[arg-type]
        self._most = max(1, MAX_BYTES // max(1, sum(sizes)))

    @cached_property
    def code(self) -> Code:
        """Of one recipe."""
        return compile_graph(self._recipe, self._device, name="recipe")

    @cached_property
    def together(self) -> Code | None:
        """Of several, see `batched`."""
        graph = batched(self._recipe)
        return None if graph is None else compile_graph(graph, self._device, name="recipes")

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
        self._forms: dict[Hashable, Form] = {}
        self._known: dict[Group, Form] = {}

    @cached_property
    def _joint(self) -> dict[Group, Graph]:
        return dict(joint_recipes(self._weights))

    @cached_property
    def _beside(self) -> dict[int, Group]:
        return {index: group for group in self._joint for index in group}

    def batches(self, indices: Iterable[int]) -> Iterator[Sequence[Group]]:
        """What makes these weights, which have recipes: one batch after another for `run`. A group has all weights that
        one recipe makes, which may be more."""
        forms: dict[Form, list[Group]] = {}
        for group in dict.fromkeys(self._beside.get(index, (index,)) for index in indices):
            forms.setdefault(self._form(group), []).append(group)
        for form, groups in forms.items():
            yield from form.batches(groups)

    def run(self, batch: Sequence[Group], inputs: Sequence[Sequence[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """The weights of a batch, by index; those of several groups lie in common memory.

        Args:
            inputs: of each group, the tensors of its parameters.
        """
        form = self._form(batch[0])
        if len(batch) == 1:
            results: Iterable[Sequence[torch.Tensor]] = [form.code(inputs[0], ())]
        else:
            assert form.together is not None
            stacked = Owned(map(_stacked, zip(*inputs, strict=True)))
            results = zip(*(made.unbind() for made in form.together(stacked, ())), strict=True)
        return {i: one for group, made in zip(batch, results, strict=True) for i, one in zip(group, made, strict=True)}

    def _form(self, group: Group) -> Form:
        if group not in self._known:
            recipe = self._joint[group] if len(group) > 1 else self._weights[group[0]].recipe
            assert recipe is not None
            key = form_of(recipe)
            if key not in self._forms:
                self._forms[key] = Form(recipe, self._device)
            self._known[group] = self._forms[key]
        return self._known[group]


def _stacked(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The tensors, of one type, one after another in memory, each with its strides."""
    first = tensors[0]
    if first.is_contiguous():
        return torch.stack(tensors)
    strides = aten.extent(first.shape, first.stride()), *first.stride()
    stack = torch.empty_strided((len(tensors), *first.shape), strides, dtype=first.dtype, device=first.device)
    return torch.stack(tensors, out=stack)
