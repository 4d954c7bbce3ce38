"""Phase-change memory of IBM's Hermes chip, unit cells of one device or of two in parallel.

Source: Le Gallo et al., "A 64-core mixed-signal in-memory compute chip based on phase-change
memory", Nature Electronics 2023, as AIHWKIT 1.1.0 has it (``aihwkit/inference/noise/hermes.py``):
a cubic for the programming noise, and laws in two branches for the exponent and the read noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from analogfx.chip.model import Draw, below_or_above, log_law, polynomial
from analogfx.chip.pcm import PCMLikeNoiseModel, set_converter


class _Law(NamedTuple):
    """slope ln r + offset, within bounds, below an edge; a polynomial from there on."""

    edge: float
    below: tuple[float, float, float, float]
    above: list[float]

    def of(self, r: Tensor) -> Tensor:
        return below_or_above(r, self.edge, log_law(r, *self.below), polynomial(self.above, r))


class _Cell(NamedTuple):
    """What was measured of one kind of unit cell."""

    g_max: float
    t_0: float
    programming: list[float]
    drift_std: _Law
    read: _Law


_MEAN = _Law(0.0945, (-0.0387, -0.0182, 0.072, 0.13), [0.0736, -0.0126, -0.0436])
_CELLS = {
    1: _Cell(
        10.35,
        200.0,
        [0.15781817, 2.32443916, -2.16310839, 0.68841818],
        _Law(0.3039, (-0.0120, -0.0023, 0.0124, 0.04), [0.0104, 0.0116, -0.0165]),
        _Law(0.1591, (-0.0078, 0.0038, 0.0179, 0.04), [0.0088, 0.0768, -0.1352, 0.0664]),
    ),
    2: _Cell(
        20.7,
        300.0,
        [0.16603222, 4.71806468, -8.48101252, 4.68961419],
        _Law(0.3055, (-0.0117, -0.0057, 0.0091, 0.04), [0.0073, 0.0093, -0.0118]),
        _Law(0.16, (-0.0117, -0.0069, 0.015, 0.04), [0.0123, 0.0211, -0.0280, 0.0069]),
    ),
}


@dataclass(frozen=True)
class HermesNoiseModel(PCMLikeNoiseModel):
    """Devices of the Hermes chip; ``t_0`` None and ``g_max`` None are those of the unit cell."""

    t_read: float = 512e-9
    t_0: float = None  # type: ignore[assignment]
    num_devices: int = 2
    """1 or 2 in parallel for each conductance."""

    def __post_init__(self) -> None:
        if self.num_devices not in _CELLS:
            self.refuse("num_devices", "1 or 2")
        cell = _CELLS[self.num_devices]
        if vars(self)["t_0"] is None:
            object.__setattr__(self, "t_0", cell.t_0)
        if self.g_max is not None and self.g_max > cell.g_max:
            self.refuse("g_max", f"at most {cell.g_max}, as far as devices were measured")
        set_converter(self, cell.g_max)
        super().__post_init__()

    def drift(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        relative = target.abs() / self.g_max
        std = _CELLS[self.num_devices].drift_std.of(relative)
        return std.mul_(draw(target)).add_(_MEAN.of(relative)).abs_().mul_(self.drift_scale)

    def read_spread(self, relative: Tensor) -> Tensor:  # noqa: D102
        return _CELLS[self.num_devices].read.of(relative)

    def _measured(self) -> list[float]:
        return _CELLS[self.num_devices].programming

    def _reference(self) -> float:
        if self.prog_coeff_g_max_reference is None and self.prog_coeff is None:
            return _CELLS[self.num_devices].g_max
        return super()._reference()
