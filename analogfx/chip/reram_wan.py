"""Resistive memory: deviation from the target after a second, a day and two days.

Source: fits to Wan et al., "A compute-in-memory chip based on resistive random-access memory",
Nature 2022, made for AIHWKIT (``aihwkit/inference/noise/reram.py``): a quartic in g / g_max, in
microsiemens at a g_max of 40, for the spread around the target at each time.

Each time's deviation is a draw of its own, and programming leaves that of the first time. Between
two of the times the spread is interpolated over the logarithm of time; beyond them it stays.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, between
from analogfx.chip.model import Draw, NoiseModel, Reading, polynomial
from analogfx.chip.pcm import set_converter
from analogfx.chip.record import number_keys

_DAY = 86400.0
_MEASURED = {
    1.0: [0.348, 16.030, -43.853, 45.393, -16.815],
    _DAY: [0.701, 22.086, -50.773, 47.095, -16.458],
    2 * _DAY: [0.782, 20.274, -43.507, 37.062, -11.934],
}
_REFERENCE = 40.0


@dataclass(frozen=True)
class ReRamWan2022NoiseModel(NoiseModel):
    """Relaxation of resistive memory; there is no drift of the mean and no separate read noise."""

    coeff_dic: dict[float, list[float]] | None = None
    """Coefficients by time in seconds; None for the measured ones."""
    g_converter: ConductanceConverter = None  # type: ignore[assignment]
    g_max: float = None  # type: ignore[assignment]
    noise_scale: float = 1.0
    coeff_g_max_reference: float | None = None
    """The g_max of the fit; None: 40 for the measured ones, else ``g_max``."""

    def __post_init__(self) -> None:
        set_converter(self, 25.0)
        self.check_numbers(noise_scale=0.0)
        if self.coeff_dic is not None:
            object.__setattr__(self, "coeff_dic", number_keys(self.coeff_dic))
            if not self.coeff_dic or min(self.coeff_dic) <= 0:
                self.refuse("coeff_dic", "coefficients by times above 0")

    @classmethod
    def adopted(cls, attributes: dict[str, Any]) -> dict[str, Any]:
        """AIHWKIT keeps the reference of its own fit under a name that it never reads."""
        reference = attributes.get("prog_coeff_g_max_reference")
        return (
            attributes if reference is None else attributes | {"coeff_g_max_reference": reference}
        )

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        return self._deviated(target, min(self._table()), draw)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:
        """The target itself, around which later deviations are drawn."""
        return target

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:
        """What relaxation has left; there is no separate read noise."""
        return (programmed if time <= 0 else self._deviated(drift, time, draw)), None

    def _table(self) -> dict[float, list[float]]:
        return self.coeff_dic or _MEASURED

    def _deviated(self, target: Tensor, time: float, draw: Draw) -> Tensor:
        sigma = self._sigma(target / self.g_max, time).mul_(self.noise_scale)
        return sigma.mul_(draw(target)).add_(target).clamp_min_(0.0)

    def _sigma(self, relative: Tensor, time: float) -> Tensor:
        table = self._table()
        times = sorted(table)
        time = min(max(time, times[0]), times[-1])
        sigma = polynomial(table[times[0]], relative)
        for low, high in itertools.pairwise(times):
            if low < time <= high:
                share = math.log(time / low) / math.log(high / low)
                ends = polynomial(table[low], relative), polynomial(table[high], relative)
                sigma = between(*ends, share)
        reference = self.coeff_g_max_reference
        if reference is None:
            reference = _REFERENCE if self.coeff_dic is None else self.g_max
        return sigma.mul_(self.g_max / reference)
