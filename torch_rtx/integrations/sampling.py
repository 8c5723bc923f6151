"""The choice of the next token from a model's scores, as a program that runs on the device of the model."""

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
