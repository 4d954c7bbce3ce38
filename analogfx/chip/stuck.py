"""Devices that cannot be programmed: some are stuck at g_min, some at g_max."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from analogfx.chip.model import Draw, NoiseModel
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

    def _stuck(self, g: Tensor, draw: Draw) -> Tensor:
        """Conductances with those of faulty devices, the same ones whenever it is asked."""
        fault = torch.special.ndtr(draw(g, "faults"))  # uniform in (0, 1)
        low, high = self.g_converter.g_min, self.g_converter.g_max
        g = g.masked_fill(fault < self.at_g_min, low)
        return g.masked_fill_(fault > 1 - self.at_g_max, high)
