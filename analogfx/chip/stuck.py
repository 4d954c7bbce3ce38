"""Devices that cannot be programmed: some are stuck at g_min, some at g_max."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from analogfx.chip.model import Draw, NoiseModel, Reading
from analogfx.chip.pcm import PCMLikeNoiseModel
from analogfx.chip.record import read


@dataclass(frozen=True)
class StuckAtNoiseModel(NoiseModel):
    """Another model with faults: a share of its devices shows one conductance at all times."""

    model: NoiseModel = field(default_factory=PCMLikeNoiseModel)
    """What the sound devices follow."""
    at_g_min: float = 0.0
    """Share of devices stuck at the converter's g_min, 0 to 1."""
    at_g_max: float = 0.0
    """Share stuck at its g_max."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", read(NoiseModel, self.model, "model"))
        self.check_numbers(at_g_min=0.0, at_g_max=0.0)
        if self.at_g_min + self.at_g_max > 1:
            self.refuse("at_g_max", "shares that sum to 1 at most")
        object.__setattr__(self, "g_converter", self.model.g_converter)

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        return self._stuck(self.model.programmed(target, draw), draw)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        return self.model.drift(target, draw)

    def at(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Tensor:  # noqa: D102
        return self._stuck(self.model.at(programmed, drift, time, draw), draw)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:  # noqa: D102
        g, spread = self.model.reading(programmed, drift, time, draw)
        if spread is not None:
            spread = self._with_faults(spread, draw, 0.0, 0.0)
        return self._stuck(g, draw), spread

    def _stuck(self, g: Tensor, draw: Draw) -> Tensor:
        """Conductances with those of faulty devices."""
        return self._with_faults(g, draw, self.g_converter.g_min, self.g_converter.g_max)

    def _with_faults(self, value: Tensor, draw: Draw, low: float, high: float) -> Tensor:
        """What devices have, or what faulty ones do: the same ones whenever it is asked."""
        fault = draw(value, "faults")
        value = value.masked_fill(fault < _quantile(self.at_g_min), low)
        return value.masked_fill_(fault > -_quantile(self.at_g_max), high)


def _quantile(share: float) -> float:
    """Below which a standard normal value lies with that probability."""
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
