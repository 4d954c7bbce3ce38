"""Devices whose programming noise and drift do not depend on their state.

Source: AIHWKIT 1.1.0 (``aihwkit/inference/noise/custom.py``).

    programming  g + (c0 + c1 r + c2 r^2) n, in microsiemens, at least 0
    drift        nu = |0.1 + 0.05 n|
    at time t    g_d = g ((t + t_0) / t_0)^(-nu), plus |g_d / g_max| sqrt(ln(...)) n, at least 0
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from analogfx.chip.converters import ConductanceConverter
from analogfx.chip.model import Draw, NoiseModel, Reading, accumulated, drifted, polynomial
from analogfx.chip.pcm import set_converter


@dataclass(frozen=True)
class StateIndependentNoiseModel(NoiseModel):
    """Constant programming noise, one distribution of drift, and read noise."""

    g_converter: ConductanceConverter = None  # type: ignore[assignment]
    g_max: float = None  # type: ignore[assignment]
    prog_coeff: list[float] | None = None
    """None for [0.2, 0, 0] microsiemens."""
    prog_noise_scale: float = 1.0
    drift_nu_mean: float = 0.1
    drift_nu_std: float = 0.05
    drift_scale: float = 1.0
    t_0: float = 20.0
    read_noise_scale: float = 1.0
    t_read: float = 250e-9

    def __post_init__(self) -> None:
        set_converter(self, 25.0)
        self.check_numbers(t_0=1e-12, t_read=1e-12, prog_noise_scale=0.0, read_noise_scale=0.0)
        self.check_numbers(drift_nu_std=0.0, drift_scale=0.0)

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        sigma = polynomial(self.prog_coeff or [0.2, 0.0, 0.0], target / self.g_max)
        sigma.mul_(self.prog_noise_scale)
        return sigma.mul_(draw(target)).add_(target).clamp_min_(0.0)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        exponent = draw(target) * self.drift_nu_std + self.drift_nu_mean
        return exponent.abs_().mul_(self.drift_scale)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:  # noqa: D102
        g = drifted(programmed, drift, time, self.t_0)
        strength = accumulated(time + self.t_0, self.t_read) * self.read_noise_scale
        return g, (g / self.g_max).mul_(strength)
