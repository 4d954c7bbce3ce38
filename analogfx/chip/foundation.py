"""Phase-change memory as the evaluation of Analog Foundation Models takes it.

Source: Büchel et al., "Analog Foundation Models", NeurIPS 2025 (arXiv 2505.09663) and the code
published with it: two cubics in |g|, in microsiemens, up to 52.5 uS for cells that use one device
of each sign and above for cells that use two, at a g_max of 180, scaled by the largest weight of
each output in a tile. Cells below 0.6 uS are off. No drift.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, SignedConductanceConverter
from analogfx.chip.model import Draw, NoiseModel, Reading, polynomial
from analogfx.chip.record import read

_ONE = [2.5797410660159494, 0.22419685954327148, -0.00371581208142707, 2.939751381126213e-05]
_TWO = [2.110295720240385, 0.2453487119885723, -0.003054993405157235, 1.2329755395573392e-05]
_EDGE, _OFF = 52.5, 0.6


@dataclass(frozen=True)
class FoundationNoiseModel(NoiseModel):
    """Programming noise of unit cells of four devices."""

    prog_noise_scale: float = 1.0
    g_converter: ConductanceConverter = field(
        default_factory=lambda: SignedConductanceConverter(180.0)
    )

    def __post_init__(self) -> None:
        self.check_numbers(prog_noise_scale=0.0)
        chosen = read(ConductanceConverter, self.g_converter, "g_converter")
        object.__setattr__(self, "g_converter", chosen)

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        size = target.abs()
        sigma = torch.where(size > _EDGE, polynomial(_TWO, size), polynomial(_ONE, size))
        noisy = sigma.mul_(draw(target)).mul_(self.prog_noise_scale).add_(target)
        return noisy.masked_fill_(size < _OFF, 0.0)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:
        """Nothing: there is none."""
        return target.new_empty(0)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:
        """What was programmed: there is no read noise."""
        return programmed, None
