"""Gaussian programming noise of one strength, relative to the largest weight; no drift.

Source: the additive model of Büchel et al., "Analog Foundation Models", NeurIPS 2025, arXiv
2505.09663, which takes 5 % of the channel's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, SignedConductanceConverter
from analogfx.chip.model import Draw, NoiseModel, Reading
from analogfx.chip.record import read


@dataclass(frozen=True)
class AdditiveNoiseModel(NoiseModel):
    """g + std_dev * g_max * n, of the whole unit cell; zero weights are noisy, too."""

    std_dev: float = 0.05
    g_converter: ConductanceConverter = field(default_factory=SignedConductanceConverter)

    def __post_init__(self) -> None:
        self.check_numbers(std_dev=0.0)
        chosen = read(ConductanceConverter, self.g_converter, "g_converter")
        object.__setattr__(self, "g_converter", chosen)

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        return draw(target) * (self.std_dev * self.g_converter.g_max) + target

    def drift(self, target: Tensor, draw: Draw) -> Tensor:
        """Nothing: there is none."""
        return target.new_empty(0)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:
        """What was programmed: there is no read noise."""
        return programmed, None
