"""What decides on a text beside the model: how a token is chosen, which may not be, and where the text ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rtx.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names and the meaning are those of transformers.

    Args:
        do_sample: draw it; False: take the best one, which `temperature`, `top_k` and `top_p` do not change.
        temperature: divides the scores before probabilities are computed, above 0.
        top_k: draw from so many of the best tokens; None: from all.
        top_p: draw from the fewest tokens that have this probability together, above 0 and at most 1.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely, below 1 more.

    Raises:
        InputError: a number is out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            given = getattr(self, name)
            if not isinstance(given, int | float) or not 0 < given < float("inf") or (name == "top_p" and given > 1):
                hint = "do_sample=False takes the best token" if name == "temperature" else None
                raise InputError(
                    f"{name} is {given!r}, not a number above 0{' up to 1' * (name == 'top_p')}", hint=hint
                )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k!r}, not a number of tokens", hint="top_k=None draws from all")

    @property
    def plain(self) -> bool:
        """The best token is taken as the model has it."""
        return not self.do_sample and self.repetition_penalty == 1


@dataclass(frozen=True)
class Rules:
    """Which tokens a text may not have, and which it must; the names and the meaning are those of transformers.

    Args:
        ends: tokens that end a sequence.
        suppress: tokens that no text has.
        begin_suppress: tokens that no text begins with, after the prompt and `forced_first`.
        least: a sequence does not end before it has so many new tokens.
        forced_first: the first new token; None: it is chosen.
        forced_last: the last of the most new tokens, of sequences that have not ended; None: it is chosen.
        timestamps: texts have them, see `Timestamps`.
    """

    ends: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    least: int = 0
    forced_first: int | None = None
    forced_last: int | None = None
    timestamps: bool = False

    def bans(self) -> dict[int, tuple[int, ...]]:
        """By the number of a new token, the first being 0: which ones may not be that, or later ones up to the next
        number here."""
        begins = int(self.forced_first is not None)

        def banned(step: int) -> tuple[int, ...]:
            return self.suppress + self.begin_suppress * (step == begins) + self.ends * (step < self.least)

        return {step: banned(step) for step in (0, begins, begins + 1, self.least)}


class End:
    """Sees sequences end, and pads them.

    Args:
        batch: sequences.
        count: the most tokens of a sequence.
        pad: what follows a sequence that has ended.

    Attributes:
        all: every sequence has ended.
    """

    def __init__(self, batch: int, count: int, pad: int, rules: Rules) -> None:
        self._ended, self._ends, self._pad = torch.zeros(batch, dtype=torch.bool), torch.tensor(rules.ends), pad
        self._left, self._last = count, rules.forced_last
        self.all = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens `[batch]` of a step, padding where a sequence has ended before."""
        self._left -= 1
        if self._last is not None and self._left == 0:
            tokens = torch.full_like(tokens, self._last)
        tokens = tokens.masked_fill(self._ended, self._pad)
        if len(self._ends):
            self._ended |= torch.isin(tokens, self._ends)
            self.all = bool(self._ended.all())
        return tokens


def tokens_of(name: str, given: int | Iterable[int] | None, vocabulary: int) -> tuple[int, ...]:
    """An option that names tokens, checked.

    Raises:
        InputError: there is no such token.
    """
    tokens = tuple(given or ()) if given is None or isinstance(given, Iterable) else (given,)
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise InputError(f"{name} is {given!r}, which must be numbers of tokens, below {vocabulary}")
    return tokens
