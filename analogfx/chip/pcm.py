"""Phase-change memory: the model of IBM's doped GST devices.

Source: Nandakumar et al., "Phase-change memory models for deep learning training and inference",
ICECS 2019, as AIHWKIT 1.1.0 has it (``aihwkit/inference/noise/pcm.py``). r is g / g_max.

    programming  g + (0.26348 + 1.9650 r - 1.1731 r^2) g_max / 25 * n, at least 0
    drift        nu = |mu(r) + sd(r) n|,  mu = clamp(-0.0155 ln r + 0.0244, 0.049, 0.1),
                 sd = clamp(-0.0125 ln r - 0.0059, 0.008, 0.045)
    at time t    g ((t + t_0) / t_0)^(-nu), times 1 + q sqrt(ln((t + t_0 + t_r) / (2 t_r))) n,
                 q = min(0.0088 / max(r^0.65, 0.001), 0.2)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, SinglePairConductanceConverter
from analogfx.chip.model import Draw, NoiseModel, Reading, accumulated, drifted, log_law, polynomial
from analogfx.chip.record import read

COEFFICIENTS = [0.26348, 1.9650, -1.1731]
"""Programming noise in microsiemens at a g_max of 25."""
REFERENCE = 25.0


@dataclass(frozen=True)
class PCMLikeNoiseModel(NoiseModel):
    """Programming noise, drift and read noise of phase-change memory."""

    prog_coeff: list[float] | None = None
    """Polynomial in g / g_max, in microsiemens; None for the measured one."""
    g_converter: ConductanceConverter = None  # type: ignore[assignment]
    """None: a single pair up to ``g_max``."""
    g_max: float = None  # type: ignore[assignment]
    """None: the converter's, or 25 without one."""
    t_read: float = 250e-9
    t_0: float = 20.0
    prog_noise_scale: float = 1.0
    read_noise_scale: float = 1.0
    drift_scale: float = 1.0
    prog_coeff_g_max_reference: float | None = None
    """The g_max that ``prog_coeff`` was fitted at; None: ``g_max`` for coefficients of one's own,
    25 for the measured ones."""

    def __post_init__(self) -> None:
        set_converter(self, 25.0)
        self.check_numbers(
            t_0=1e-12, t_read=1e-12, prog_noise_scale=0.0, read_noise_scale=0.0, drift_scale=0.0
        )
        if self.prog_coeff_g_max_reference is not None:
            self.check_numbers(prog_coeff_g_max_reference=1e-12)
        if self.prog_coeff is not None and not self.prog_coeff:
            self.refuse("prog_coeff", "one coefficient or more")

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        sigma = polynomial(self.prog_coeff or self._measured(), target / self.g_max)
        sigma.mul_(self.g_max / self._reference() * self.prog_noise_scale)
        return sigma.mul_(draw(target)).add_(target).clamp_min_(0.0)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        relative = target.abs() / self.g_max
        mean = log_law(relative, -0.0155, 0.0244, 0.049, 0.1)
        std = log_law(relative, -0.0125, -0.0059, 0.008, 0.045)
        return std.mul_(draw(target)).add_(mean).abs_().mul_(self.drift_scale)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:  # noqa: D102
        g = drifted(programmed, drift, time, self.t_0)
        spread = self.read_spread(programmed / self.g_max)
        strength = accumulated(time + self.t_0, self.t_read) * self.read_noise_scale
        return g, spread.mul_(strength).mul_(g)

    def read_spread(self, relative: Tensor) -> Tensor:
        """Strength q of the read noise at g / g_max."""
        # exp of a logarithm: a power takes twice as long.
        power = relative.clamp_min(1e-7).log_().mul_(-0.65).exp_().clamp_max_(1e3)
        return power.mul_(0.0088).clamp_max_(0.2)

    def _measured(self) -> list[float]:
        return COEFFICIENTS

    def _reference(self) -> float:
        if self.prog_coeff_g_max_reference is not None:
            return self.prog_coeff_g_max_reference
        return REFERENCE if self.prog_coeff is None else self.g_max


def set_converter(model: NoiseModel, g_max: float, per_channel: bool = False) -> None:
    """Fill in what a frozen model's ``g_converter`` and ``g_max`` were left to.

    Raises:
        ConfigError: a ``g_max`` that is not the converter's.
    """
    given, converter = getattr(model, "g_max", None), vars(model)["g_converter"]
    if converter is None:
        chosen: ConductanceConverter = SinglePairConductanceConverter(
            g_max if given is None else given, per_channel=per_channel
        )
    else:
        chosen = read(ConductanceConverter, converter, "g_converter")
    if given is not None and given != chosen.g_max:
        model.refuse("g_max", f"{chosen.g_max}, which is the converter's, or None")
    object.__setattr__(model, "g_converter", chosen)
    object.__setattr__(model, "g_max", chosen.g_max)
