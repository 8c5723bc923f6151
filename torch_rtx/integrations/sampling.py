"""The choice of the next token from a model's scores, as programs that run on the device of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sampler(nn.Module):
    """Repetition penalty, temperature, top-k, top-p and the draw, in the order and with the meaning of transformers.

    It has no weights. All settings are tensors with an entry for each of the `batch` sequences, so that one engine
    serves them all. A draw compares a uniform number with the cumulated probabilities: which token a number yields is
    defined, and numbers of one seed yield one text. With 0 for both number and `least` this is the best token, and of
    several the first, as `argmax` has it.
    """

    def forward(
        self,
        logits: Tensor,
        token: Tensor,
        seen: Tensor,
        uniforms: Tensor,
        length: Tensor,
        least: Tensor,
        top_p: Tensor,
        temperature: Tensor,
        repetition_penalty: Tensor,
    ) -> Tensor:
        """Write the chosen token to `token` and to `seen`.

        Args:
            logits: the scores, float32 `[batch, vocabulary]`.
            token: int64 `[batch, 1]`.
            seen: which tokens the penalty is for, bool `[batch, vocabulary]`.
            uniforms: numbers from 0 to 1, without 1; the one at `length` is used. `[batch, positions]`
            length: int64, `[]`.
            least: the place of the last token to draw from, by score, int64 `[batch]`: 0 takes the best one.
            top_p: the probability that the tokens to draw from have together, float32 `[batch]`.
            temperature, repetition_penalty: float32 `[batch]`.

        Returns:
            The token, int64 `[batch]`.
        """
        penalty = repetition_penalty.unsqueeze(1)
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        scores, order = torch.sort(logits / temperature.unsqueeze(1), dim=-1, descending=True, stable=True)
        worst = scores.gather(1, least.unsqueeze(1))
        probabilities = torch.softmax(scores.masked_fill(scores < worst, -torch.inf), dim=-1)
        limit = top_p.unsqueeze(1)
        kept = ((probabilities.cumsum(-1) - probabilities < limit) | (limit >= 1)) & (probabilities > 0)
        mass = torch.where(kept, probabilities, 0).cumsum(-1)
        drawn = uniforms.index_select(1, length.view(1)) * mass[:, -1:]
        last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)  # where rounding makes `drawn` all there is
        chosen = order.gather(1, torch.minimum((mass <= drawn).sum(-1, keepdim=True), last))
        token.copy_(chosen)
        seen.scatter_(1, chosen, True)
        return chosen.squeeze(1)


class Timestamps(nn.Module):
    """Which tokens may follow where a text has timestamps, as `WhisperTimeStampLogitsProcessor` of transformers has it.

    A timestamp ends a phrase and another one begins the next: they come in pairs, never go back, and one comes first. A
    token of a text does not come where timestamps are likelier together than the best of these. The state is the last
    two tokens and the last timestamp, so that no step has to look at all earlier ones.

    Args:
        no_timestamps: the token before the first timestamp; all later ones are timestamps.
        end: the token that may follow the first timestamp of a pair, with those that come after it.
        most: how far from the first timestamp a text may begin; None: anywhere.
    """

    def __init__(self, no_timestamps: int, end: int, most: int | None) -> None:
        super().__init__()
        self.no_timestamps, self.end, self.most = no_timestamps, end, most

    def forward(self, logits: Tensor, token: Tensor, previous: Tensor, before: Tensor, latest: Tensor) -> Tensor:
        """Write the best token that may follow to `token`, and the state for the next step to `before` and `latest`.

        Args:
            logits: the scores, float32 `[batch, vocabulary]`.
            token: int64 `[batch, 1]`.
            previous: the new token before, int64 `[batch, 1]`; -1: there is none, and `before` and `latest` are
                `self.no_timestamps + 1` and -1.
            before: the one before that, int64 `[batch, 1]`.
            latest: the last timestamp before `previous`, int64 `[batch, 1]`; -1: there is none.

        Returns:
            The scores, -inf for tokens that may not follow.
        """
        begin = self.no_timestamps + 1
        numbers = torch.arange(logits.shape[1], device=logits.device)
        times, first = numbers >= begin, previous < 0
        ends, paired = previous >= begin, before >= begin
        last = torch.where(ends, previous, latest)
        reached = torch.where(ends & ~paired, last, last + 1)  # a pair may have one time twice, two pairs may not
        banned = (numbers == self.no_timestamps) | (first & ~times) | (ends & paired & times)
        banned = banned | (ends & ~paired & (numbers < self.end)) | ((last >= 0) & times & (numbers < reached))
        if self.most is not None:
            banned = banned | (first & (numbers > begin + self.most))
        scores = logits.masked_fill(banned, -torch.inf)
        together = scores.masked_fill(~times, -torch.inf).logsumexp(-1, keepdim=True)
        likely = together > scores.masked_fill(times, -torch.inf).amax(-1, keepdim=True)
        scores = scores.masked_fill(likely & ~times, -torch.inf)
        before.copy_(torch.where(first, before, previous))
        latest.copy_(last)
        token.copy_(scores.argmax(-1, keepdim=True))
        return scores
