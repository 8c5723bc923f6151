"""Weights that engines of one model have in common, such as those that read a prompt and write its continuation.

Each engine computes weights from the model's parameters by its own recipes. Where two engines have the same recipe for
the same parameters, the second one borrows what the first one computed, and the device holds it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from torch_rtx.errors import RtxError
from torch_rtx.ir import Weight
from torch_rtx.runtime.recipe_forms import form_of


class Store(Protocol):
    """What a loan needs of a `WeightStore`."""

    ready: bool
    generation: int
    streamer: Any
    values: list[Tensor]

    def check_ready(self) -> None:
        """Raises RtxError if the weights are not there."""

    def refresh(self, wait: bool = False) -> Any:
        """Recompute what has to be."""

    def lendable(self) -> list[tuple[int, Weight]]:
        """What may be borrowed, by index."""


class Loan:
    """What a store takes from `lender`; by default nothing from nobody.

    Attributes:
        places: by the index of a borrowed weight, that of the lender's.
    """

    def __init__(self, lender: Store | None = None, places: Mapping[int, int] = MappingProxyType({})) -> None:
        self.places, self._lender, self._generation = places, lender, -1

    @classmethod
    def between(cls, lender: Store, borrower: Store) -> Loan:
        """The loan of all weights that both make in the same way."""
        own = {_origin(weight): index for index, weight in lender.lendable()}
        found = ((index, own.get(_origin(weight))) for index, weight in borrower.lendable())
        return cls(lender, {index: place for index, place in found if place is not None})

    def value(self, index: int) -> Tensor:
        """The borrowed weight; empty as long as the lender has none."""
        assert self._lender is not None
        return self._lender.values[self.places[index]]

    def moved(self) -> bool:
        """Make the lender's weights ready for a call; True if they are elsewhere than at the last one.

        Raises:
            RtxError: the lender has no weights at this time, or streams them.
        """
        lender = self._lender
        if lender is None:
            return False
        if not lender.ready:
            lender.check_ready()
        if lender.streamer is not None:
            hint = "set weight_streaming_budget before engines share weights"
            raise RtxError("another engine has these weights, and streams them now", hint=hint)
        lender.refresh(wait=True)
        before, self._generation = self._generation, lender.generation
        return before != self._generation


def _origin(weight: Weight) -> object:
    """Equal for weights of one value: what it is made of, and how."""
    return weight.names, weight.value.type, None if weight.recipe is None else form_of(weight.recipe)
