"""The range at which a DAC changes its inputs least."""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import reference as ref

_OCTAVES = 12
"""How far below the largest magnitude a range is looked for."""


def least_error(magnitudes: Tensor, inp_res: float) -> float:
    """The range with the smallest mean squared error of clamping and rounding.

    Looked for on a grid of half octaves below the largest magnitude, then four times as finely
    around the best, twice; of ranges that are as good the largest.

    Args:
        magnitudes: (N,) float32, not all zero.
        inp_res: the config's resolution. 0, no rounding, gives the largest magnitude: there
            clipping is the only error.
    """
    largest = magnitudes.max().item()
    if not inp_res:
        return largest

    def error(octave: float) -> float:
        bound = torch.tensor(largest * 2.0**-octave)
        return (ref.dac(magnitudes, bound, inp_res) - magnitudes).square().mean().item()

    best, step = 0.0, 0.5
    octaves = [i * step for i in range(int(_OCTAVES / step) + 1)]
    for _ in range(3):
        best = min(octaves, key=error)  # the first of equals, which is the largest range
        step /= 4
        octaves = [o for i in range(-4, 5) if (o := best + i * step) >= 0]
    return largest * 2.0**-best
