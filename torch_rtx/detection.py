"""Which boxes of a detector stay, as an operator of the IR that files can hold: `torch_rtx.suppressed`."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKED = 8  # steps between looks at whether boxes are left, each of which waits for the device


def _suppressed(low: Tensor, high: Tensor, scores: Tensor, limit: Tensor, count: int) -> Tensor:
    """The boxes that stay when those go that overlap a better one, best first.

    Args:
        low, high: corners (N, boxes, 2).
        scores: (N, classes, boxes), minus infinity for boxes that are none.
        limit: the largest intersection over union that stays, without axes.
        count: the most boxes of a class.

    Returns:
        Places of boxes (N, classes, count), int64; -1 behind the last one.
    """
    torch._check(low.dim() == 3 and scores.dim() == 3 and low.shape == high.shape, lambda: "these are no boxes")
    torch._check(low.shape == (scores.shape[0], scores.shape[2], 2), lambda: "scores are not those of the boxes")
    torch._check(count == 0 or scores.shape[2] > 0, lambda: "there are no boxes to choose from")
    places = torch.arange(scores.shape[-1], device=scores.device)
    chosen: list[Tensor] = []
    captured = scores.is_cuda and torch.cuda.is_current_stream_capturing()
    while len(chosen) < count:
        if len(chosen) % CHECKED == 0 and not captured and not bool((scores > -torch.inf).any()):
            break
        best = scores.argmax(-1, keepdim=True)  # (N, classes, 1); the first of equal ones
        found = torch.gather(scores, -1, best) > -torch.inf
        chosen.append(torch.where(found, best, -1))
        dropped = (_overlaps(low, high, best) > limit) | (places == best)
        scores = torch.where(dropped & found, -torch.inf, scores)
    rest = _room(scores, count - len(chosen)).fill_(-1)
    return torch.cat([*chosen, rest], -1)


def _room(scores: Tensor, count: int) -> Tensor:
    """Room for `count` places of each class."""
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int64)


def _overlaps(low: Tensor, high: Tensor, best: Tensor) -> Tensor:
    """The intersection over union of all boxes with one for each class: (N, classes, boxes)."""
    places = best.expand(*best.shape[:2], 2)
    own_low, own_high = torch.gather(low, 1, places)[:, :, None], torch.gather(high, 1, places)[:, :, None]
    low, high = low[:, None], high[:, None]
    shared = (torch.minimum(high, own_high) - torch.maximum(low, own_low)).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (own_high - own_low).prod(-1) - shared
    return torch.where(union > 0, shared / union, 0)


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define("suppressed(Tensor low, Tensor high, Tensor scores, Tensor limit, SymInt count) -> Tensor")
_LIBRARY.impl("suppressed", _suppressed, "CompositeExplicitAutograd")
_LIBRARY.impl("suppressed", lambda low, high, scores, limit, count: _room(scores, count), "Meta")
suppressed = torch.ops.torch_rtx.suppressed.default
