"""How the inputs of a site become the ranges of its tiles: the methods of ``calibrate``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analogfx.calibration.entropy import least_divergence
from analogfx.calibration.least_error import least_error
from analogfx.calibration.quantile import quantile
from analogfx.calibration.reservoir import Reservoir
from analogfx.config import Resolved
from analogfx.errors import CalibrationError

METHODS = ("max", "quantile", "moving_std", "moving_quantile", "mse", "entropy")

_LIGHTNING = {
    "Max": "max",
    "CacheQuantile": "quantile",
    "MovingStd": "moving_std",
    "MovingQuantile": "moving_quantile",
}
"""Values of aihwkit-lightning's ``InputRangeCalibrationType``."""


@dataclass(frozen=True)
class Settings:
    """What the methods are told, see :func:`analogfx.calibrate`."""

    method: str
    quantile: float
    max_samples: int
    std_alpha: float | None

    def __post_init__(self) -> None:
        name = getattr(self.method, "value", self.method)
        name = _LIGHTNING.get(name, name)
        if name not in METHODS:
            raise CalibrationError(
                f"method = {self.method!r}: expected one of {', '.join(METHODS)}"
            )
        object.__setattr__(self, "method", name)
        if not 0 < self.quantile <= 1:
            raise CalibrationError(f"quantile = {self.quantile!r}: expected a share above 0, to 1")
        if not isinstance(self.max_samples, int) or self.max_samples < 1:
            raise CalibrationError(f"max_samples = {self.max_samples!r}: expected 1 or more")
        if self.std_alpha is not None and not 0 < self.std_alpha < math.inf:
            raise CalibrationError(f"std_alpha = {self.std_alpha!r}: expected a number above 0")


class Estimator:
    """Ranges of one site's tiles, from the rows that they are given."""

    clamps = False
    """Whether the site clamps its inputs to the present ranges while it is being calibrated."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)

    def see(self, rows: Tensor) -> None:
        """Take one call's inputs, (N, I): N > 0 rows of which none is all zero."""
        raise NotImplementedError

    def ranges(self) -> list[float]:
        """The range of each tile; NaN for a tile that has seen nothing."""
        raise NotImplementedError

    def clipped(self, ranges: Sequence[float]) -> list[float]:
        """Share of each tile's inputs that ranges clip; NaN for a tile that has seen nothing."""
        raise NotImplementedError

    def tiles(self, rows: Tensor) -> list[Tensor]:
        """What each tile sees that is finite, as single numbers in at least float32."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return [_finite(tile.reshape(-1)) for tile in wide.split(self.sizes, dim=1)]


def _finite(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return values if bool(finite.all()) else values[finite]


class Maximum(Estimator):
    """The largest magnitude ever seen."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._largest = [math.nan] * len(sizes)

    def see(self, rows: Tensor) -> None:  # noqa: D102
        for tile, values in enumerate(self.tiles(rows)):
            if values.numel():
                largest = values.abs().max().item()
                self._largest[tile] = max(largest, self._largest[tile])  # the first beside a NaN

    def ranges(self) -> list[float]:  # noqa: D102
        return list(self._largest)

    def clipped(self, ranges: Sequence[float]) -> list[float]:  # noqa: D102
        return [math.nan if math.isnan(r) else 0.0 for r in self._largest]


class Sampled(Estimator):
    """A range chosen for a uniform sample of the rows."""

    def __init__(
        self, sizes: Sequence[int], sample: Reservoir, choose: Callable[[Tensor], float]
    ) -> None:
        """``choose`` gives the range for magnitudes (N,), of which some are not 0."""
        super().__init__(sizes)
        self._sample, self._choose = sample, choose

    def see(self, rows: Tensor) -> None:  # noqa: D102
        self._sample.add(rows)

    def _magnitudes(self) -> list[Tensor]:
        rows = self._sample.rows()
        if rows is None:
            return [torch.empty(0)] * len(self.sizes)
        return [values.abs() for values in self.tiles(rows)]

    def ranges(self) -> list[float]:  # noqa: D102
        return [self._choose(m) if bool(m.any()) else math.nan for m in self._magnitudes()]

    def clipped(self, ranges: Sequence[float]) -> list[float]:  # noqa: D102
        return [
            (m > r).double().mean().item() if m.numel() else math.nan
            for m, r in zip(self._magnitudes(), ranges, strict=True)
        ]


class Moving(Sampled):
    """The mean over all calls of a statistic of each; the sample is for the share clipped."""

    clamps = True

    def __init__(
        self, sizes: Sequence[int], sample: Reservoir, statistic: Callable[[Tensor], float]
    ) -> None:
        """``statistic`` is one of a call's values (N,), NaN where it has none."""
        super().__init__(sizes, sample, statistic)
        self._mean = [math.nan] * len(sizes)
        self._count = [0] * len(sizes)

    def see(self, rows: Tensor) -> None:  # noqa: D102
        super().see(rows)
        for tile, values in enumerate(self.tiles(rows)):
            new = self._choose(values) if values.numel() else math.nan
            n = self._count[tile]
            if not math.isnan(new):
                self._mean[tile] = (self._mean[tile] * n + new) / (n + 1) if n else new
                self._count[tile] = n + 1

    def ranges(self) -> list[float]:  # noqa: D102
        return list(self._mean)


def make(
    settings: Settings, config: Resolved, sizes: Sequence[int], generator: torch.Generator
) -> Estimator:
    """The estimator of one site.

    Args:
        config: of the site's layer.
        sizes: inputs of each tile.
    """
    if settings.method == "max":
        return Maximum(sizes)
    sample = Reservoir(settings.max_samples, generator)
    q, alpha = settings.quantile, settings.std_alpha or config.init_std_alpha
    if settings.method == "moving_std":
        return Moving(sizes, sample, lambda v: alpha * v.std().item() if len(v) > 1 else math.nan)
    if settings.method == "moving_quantile":
        return Moving(sizes, sample, lambda v: quantile(v.abs(), q))
    if settings.method == "quantile":
        return Sampled(sizes, sample, lambda m: quantile(m, q))
    choose = least_error if settings.method == "mse" else least_divergence
    return Sampled(sizes, sample, functools.partial(choose, inp_res=config.inp_res))
