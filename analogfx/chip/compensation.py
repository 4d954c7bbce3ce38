"""What makes up for drift behind the ADC: factors from readings of a tile's weights.

Source: Joshi et al., "Accurate deep neural network inference using computational phase-change
memory", Nature Communications 2020; AIHWKIT 1.1.0 (``aihwkit/inference/compensation/``).

The factor is the reading after programming over the reading now. Readings are taken of the weights
themselves, at high precision, and not through the tile's converters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analogfx.chip.record import Record

_LEAST = 1e-4
"""Smallest reading, relative to the tile's largest weight: where a tile is 0 the factor is 1."""


class BaseDriftCompensation(Record):
    """Base of compensations. One of your own is a dataclass that defines :meth:`readout`."""

    kind = "drift compensation"

    def readout(self, weights: Tensor) -> Tensor:
        """What is read of a tile's weights (O, I): () for the tile, or (O,) for its outputs."""
        raise NotImplementedError

    def baseline(self, target: Tensor, programmed: Tensor) -> Tensor:
        """The reading that later ones are compared with, shaped like :meth:`readout`."""
        return self.readout(programmed)

    def factor(self, target: Tensor, programmed: Tensor, now: Tensor) -> Tensor:
        """What the tile's outputs are multiplied by, (O,).

        Args:
            target: (O, I) weights that the tile was to be programmed to.
            programmed: what it held after programming.
            now: what it holds now.
        """
        if target.numel() == 0:
            return target.new_ones(target.shape[0])
        least = target.abs().amax().mul(_LEAST).clamp_min(1e-30)
        baseline = self.baseline(target, programmed).clamp_min(least)
        return (baseline / self.readout(now).clamp_min(least)).expand(target.shape[0])


@dataclass(frozen=True)
class GlobalDriftCompensation(BaseDriftCompensation):
    """One factor for each tile, from its mean magnitude."""

    def readout(self, weights: Tensor) -> Tensor:  # noqa: D102
        sums, unit = _sums(weights)
        return sums.sum().double().div_(unit * weights.numel()).to(weights.dtype)


@dataclass(frozen=True)
class PerColumnDriftCompensation(BaseDriftCompensation):
    """One factor for each output of each tile, from its mean magnitude."""

    def readout(self, weights: Tensor) -> Tensor:  # noqa: D102
        sums, unit = _sums(weights)
        return sums.double().div_(unit * weights.shape[1]).to(weights.dtype)


@dataclass(frozen=True)
class GlobalDriftCompensationWithExactReference(GlobalDriftCompensation):
    """One factor for each tile, against the weights that it was to be programmed to."""

    def baseline(self, target: Tensor, programmed: Tensor) -> Tensor:  # noqa: D102
        return self.readout(target)


_BITS = 30
"""Of a reading, relative to the largest weight."""
_AT_ONCE = 1 << 16
"""Weights that are read at a time: what fits into a cache."""


def _sums(weights: Tensor) -> tuple[Tensor, float]:
    """Sums of magnitudes (O,), and how many units 1 has.

    Of integers, because sums of floats depend on their order.
    """
    peak = max(float(weights.max()), -float(weights.min()), 1e-20)
    unit = math.ldexp(1.0, _BITS - math.frexp(peak)[1])
    parts = weights.split(max(_AT_ONCE // weights.shape[1], 1))
    sums = [part.abs().mul_(unit).round_().to(torch.int64).sum(-1) for part in parts]
    return torch.cat(sums), unit
