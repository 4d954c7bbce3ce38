"""Resistive memory of conductive metal oxide and HfOx, one device for each weight.

Source: Falcone et al., "All-in-one analog AI hardware: on-chip training and inference with
conductive-metal-oxide/HfOx ReRAM devices", Adv. Funct. Mater. 2025, as AIHWKIT 1.1.0 has it.

    programming  g + (c0 + c1 g) n, in microsiemens, by acceptance range (0.2 % or 2 %)
    at time t    m = g - 0.08900206 ln t,  g_d = m + (0.04201137 ln t + 0.41183342) n,
                 plus 0.0277316483 log10(g_d) sqrt(ln((t + t_r) / (2 t_r))) n', t_r = 1 us,
                 within [g_min, g_max]

Relaxation starts a second after programming: before that ln t counts as 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, SingleDeviceConductanceConverter
from analogfx.chip.model import Draw, NoiseModel, Reading, accumulated, polynomial
from analogfx.chip.record import number_keys, read

_PROGRAMMING = {0.2: [0.00081107, 0.00106879], 2.0: [0.0112185391, 0.01129027418]}
_DECAY = {"mean": [-0.08900206], "std": [0.04201137, 0.41183342]}
_READ = {"K": 0.0277316483, "t_read": 1e-6}


@dataclass(frozen=True)
class ReRamCMONoiseModel(NoiseModel):
    """Programming noise by acceptance range, relaxation, and read noise."""

    coeff_dict: dict[float, list[float]] | None = None
    """Programming noise, c0 and c1, by acceptance range in percent."""
    g_max: float | None = None
    g_min: float | None = None
    prog_noise_scale: float = 1.0
    read_noise_scale: float = 1.0
    drift_scale: float = 1.0
    decay_dict: dict[str, list[float]] | None = None
    read_dict: dict[str, float] | None = None
    acceptance_range: float = 2.0
    """In percent of the target; a key of ``coeff_dict``."""
    g_converter: ConductanceConverter = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.coeff_dict is not None:
            object.__setattr__(self, "coeff_dict", number_keys(self.coeff_dict))
        if self.acceptance_range not in self._programming():
            keys = ", ".join(f"{key:g}" for key in self._programming())
            self.refuse("acceptance_range", f"one of {keys}, in percent")
        converter = vars(self)["g_converter"]
        if converter is None:
            high, low = (88.199997, 9.0)
            converter = SingleDeviceConductanceConverter(
                high if self.g_max is None else self.g_max,
                low if self.g_min is None else self.g_min,
            )
        converter = read(ConductanceConverter, converter, "g_converter")
        for name in ("g_max", "g_min"):
            if getattr(self, name) not in (None, getattr(converter, name)):
                self.refuse(name, f"{getattr(converter, name)}, which is the converter's, or None")
            object.__setattr__(self, name, getattr(converter, name))
        object.__setattr__(self, "g_converter", converter)
        self.check_numbers(prog_noise_scale=0.0, read_noise_scale=0.0, drift_scale=0.0)

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        sigma = polynomial(self._programming()[self.acceptance_range], target)
        return sigma.mul_(draw(target)).mul_(self.prog_noise_scale).add_(target)

    def drift(self, target: Tensor, draw: Draw) -> Tensor:
        """Nothing: relaxation is the same for all devices."""
        return target.new_empty(0)

    def at(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Tensor:  # noqa: D102
        if time <= 0:
            return programmed
        low, high = self.g_converter.g_min, self.g_converter.g_max
        return super().at(programmed, drift, time, draw).clamp_(low, high)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:  # noqa: D102
        if time <= 0:
            return programmed, None
        decay, reading = self.decay_dict or _DECAY, self.read_dict or _READ
        elapsed = math.log(max(time, 1.0))
        sigma = decay["std"][0] * elapsed + decay["std"][1]
        g = draw(programmed).mul_(sigma * self.drift_scale).add_(programmed)
        g.add_(decay["mean"][0] * elapsed * self.drift_scale)
        strength = reading["K"] * accumulated(max(time, 1.0), reading["t_read"])
        # The logarithm of a conductance that noise has taken below 0 is not a number.
        return g, g.clamp_min(1e-3).log10_().abs_().mul_(strength * self.read_noise_scale)

    def _programming(self) -> dict[float, list[float]]:
        return self.coeff_dict or _PROGRAMMING
