"""The range at which the distribution of the inputs loses least."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 2048


def least_divergence(magnitudes: Tensor, inp_res: float) -> float:
    """The range whose quantised distribution diverges least from that of the clipped inputs.

    The candidates are the ends of the bins of a histogram. For each, P is the histogram up to
    there with all that lies beyond added to the last bin, and Q is the histogram up to there
    without it, averaged over the bins of each step of the DAC (those that P fills). The one with
    the smallest KL(P || Q) is taken, of equals the largest. Zeros, which every range represents
    exactly, are left out.

    Args:
        magnitudes: (N,) float32, not all zero.
        inp_res: the config's resolution. 0, no rounding, gives the largest magnitude.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, which takes 2048 bins.
    """
    largest = magnitudes.max().item()
    if not inp_res:
        return largest
    states = inp_res if inp_res > 1 else 1 / inp_res
    levels = int(states / 2) + 1  # of a magnitude, 0 included
    bins = max(_BINS, 8 * levels)
    counts = torch.histc(magnitudes[magnitudes > 0], bins, 0.0, largest).double()
    beyond = counts.sum() - counts.cumsum(0)
    best, least = bins, float("inf")
    for end in range(bins, levels - 1, -1):
        divergence = _divergence(counts[:end], beyond[end - 1], levels)
        if divergence < least:  # the first of equals, which is the largest range
            best, least = end, divergence
    return largest * best / bins


def _divergence(inside: Tensor, beyond: Tensor, levels: int) -> float:
    """KL(P || Q) of one candidate; infinite where Q is 0 and P is not."""
    p = inside.clone()
    p[-1] += beyond
    level = torch.arange(len(inside)) * levels // len(inside)
    filled = (p > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    number = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (total / number.clamp(min=1))[level] * filled
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    if bool((q[held] <= 0).any()):
        return float("inf")
    return (p[held] * (p[held] / q[held]).log()).sum().item()
