"""Histograms of magnitudes, and the amax that each method of calibration chooses of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rtx.quantization.formats import Format, codes_of, scale_of

BINS = 2048


@dataclass
class Histogram:
    """Counts of magnitudes in bins of equal width from 0 to `limit`, which doubles as larger ones come."""

    limit: float = 0.0
    counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the magnitudes of a tensor of finite numbers."""
        x = x.detach().abs().flatten().float()
        most = float(x.max()) if x.numel() else 0.0
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        if most == 0:
            self.counts[0] += x.numel()
            return
        if not self.limit:
            self.limit = most
        while most > self.limit:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat((pairs, torch.zeros_like(pairs)))
            self.limit *= 2
        self.counts += torch.histc(x, BINS, 0, self.limit).double().cpu()

    def edges(self) -> Tensor:
        """The upper ends of the bins, f64[BINS]."""
        return torch.arange(1, BINS + 1, dtype=torch.float64) * (self.limit / BINS)


def percentile_amax(histogram: Histogram, percent: float) -> float:
    """The upper end of the bin in which that percent of all magnitudes is reached."""
    assert histogram.counts is not None
    reached = histogram.counts.cumsum(0) / histogram.counts.sum()
    # Sums of counts are exact; the quotient is not.
    place = int((reached < percent / 100 - 1e-12).sum())
    return float(histogram.edges()[min(place, BINS - 1)])


def mse_amax(histogram: Histogram, form: Format) -> float:
    """The amax of least square error, of magnitudes at the centres of bins."""
    assert histogram.counts is not None
    centres = histogram.edges() - histogram.limit / BINS / 2
    candidates = histogram.limit * torch.arange(1, 201, dtype=torch.float64) / 200
    errors = []
    for amax in candidates:
        scale = scale_of(amax, form)
        values = codes_of(centres / scale, form).double() * scale
        errors.append(float((histogram.counts * (values - centres) ** 2).sum()))
    return float(candidates[errors.index(min(errors))])


def entropy_amax(histogram: Histogram, form: Format) -> float:
    """The amax whose quantized histogram has the least Kullback-Leibler divergence from the histogram with its tail
    added to the last bin. Levels cover equal numbers of bins; the count of a level spreads over its nonzero bins."""
    assert histogram.counts is not None
    levels = int(form.codes.most) + 1
    counts, best = histogram.counts, (float("inf"), BINS)
    places = torch.arange(BINS)
    for kept in range(levels, BINS + 1, max(1, levels // 16)):
        part = counts[:kept]
        reference = part.clone()
        reference[-1] += counts[kept:].sum()
        level = places[:kept] * levels // kept
        sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, part)
        filled = torch.zeros_like(sums).index_add_(0, level, (reference > 0).double())
        spread = torch.where(reference > 0, (sums / filled.clamp(min=1))[level], 0)
        p, q = reference / reference.sum(), spread / spread.sum()
        # A bin that the candidate gives nothing counts as if it had next to nothing.
        divergence = float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp(min=1e-12))).sum())
        best = min(best, (divergence, kept))
    return float(histogram.edges()[best[1] - 1])


def calibrated_amax(histogram: Histogram, form: Format) -> float:
    """What the format's method of calibration chooses; `max` needs no histogram."""
    if form.calibration == "percentile":
        return percentile_amax(histogram, form.percentile)
    return (mse_amax if form.calibration == "mse" else entropy_amax)(histogram, form)
