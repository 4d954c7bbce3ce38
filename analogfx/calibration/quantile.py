"""The range that a share of the inputs lies within."""

from __future__ import annotations

import math

from torch import Tensor


def quantile(magnitudes: Tensor, q: float) -> float:
    """``torch.quantile`` (linear interpolation) of any number of elements.

    torch's own refuses more than 2**24 elements; this selects the two neighbours of the rank.

    Args:
        magnitudes: (N,) of at least one element, none NaN.
        q: 0 to 1.
    """
    rank = q * (magnitudes.numel() - 1)
    low = math.floor(rank)
    below = magnitudes.kthvalue(low + 1).values.item()
    if rank == low:
        return below
    above = magnitudes.kthvalue(low + 2).values.item()
    return below + (above - below) * (rank - low)
