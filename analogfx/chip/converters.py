"""From the weights of one tile to the conductances of its devices, and back.

Formulas and names are those of AIHWKIT 1.1.0 (``aihwkit/inference/converter/conductance.py``).
A weight is held by n devices; conductances are (n, O, I) in microsiemens, positive and negative
device in turns. The scale is the tile's, or with ``per_channel`` each output's own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from analogfx.chip.record import Record

_SMALLEST = 1e-7
"""Largest weight that a tile is taken to have at least."""


class ConductanceConverter(Record):
    """Base of converters. One of your own defines ``devices`` and the three methods that raise.

    ``g_min`` and ``g_max`` say what a device can be programmed to, in microsiemens.
    """

    kind = "conductance converter"
    g_max: float
    g_min: float

    @property
    def devices(self) -> int:
        """How many hold one weight, n."""
        raise NotImplementedError

    def scale(self, weights: Tensor) -> Tensor:
        """What the other methods must know of a tile.

        Args:
            weights: (O, I) of the whole tile.

        Returns:
            Fewer than two dimensions for the tile, or (..., O, 1) with a row for every output.
        """
        raise NotImplementedError

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:
        """Target conductances (n, o, i), in microsiemens, of a part (o, i) of a tile's weights."""
        raise NotImplementedError

    def to_conductances(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Target conductances (n, O, I) of a tile, and its scale."""
        scale = self.scale(weights)
        return self.conductances(weights, scale), scale

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:
        """Weights (O, I) that conductances (n, O, I) stand for."""
        raise NotImplementedError

    def variance(self, deviations: Tensor, scale: Tensor) -> Tensor:
        """Variance of weights whose devices have independent deviations.

        For weights that are linear in the conductances, up to a constant.

        Args:
            deviations: (n, O, I) standard deviations of the conductances, in microsiemens.
            scale: what :meth:`to_conductances` returned.

        Returns:
            (O, I).
        """
        nothing = torch.zeros_like(deviations)
        constant = self.to_weights(nothing, scale)
        total = torch.zeros_like(constant)
        for device, deviation in enumerate(deviations):
            alone = nothing.clone()
            alone[device] = deviation
            total += self.to_weights(alone, scale).sub_(constant).square_()
        return total

    def _check_span(self) -> None:
        self.check_numbers(g_max=0.0, g_min=0.0)
        if self.g_min >= self.g_max:
            self.refuse("g_min", f"a conductance below g_max = {self.g_max}")


def _largest(weights: Tensor, per_channel: bool) -> Tensor:
    """Largest magnitude of a tile, (), or of each of its rows, (O, 1)."""
    if weights.numel() == 0:
        return weights.new_full((), _SMALLEST)
    peak = weights.abs().amax(-1, keepdim=True) if per_channel else weights.abs().amax()
    return peak.clamp_min(_SMALLEST)


@dataclass(frozen=True)
class SinglePairConductanceConverter(ConductanceConverter):
    """Two devices: one for positive weights, one for negative; the other one stays at g_min."""

    g_max: float = 25.0
    g_min: float = 0.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        self._check_span()

    devices = 2

    def scale(self, weights: Tensor) -> Tensor:  # noqa: D102
        return (self.g_max - self.g_min) / _largest(weights, self.per_channel)

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        target = weights * scale
        pair = torch.stack([target, -target]).clamp_(0.0, self.g_max)
        return pair.add_(self.g_min) if self.g_min else pair

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return (conductances[0] - conductances[1]).div_(scale)


@dataclass(frozen=True)
class NPairConductanceConverter(ConductanceConverter):
    """Several pairs with factors of significance; a later pair starts where the former is full."""

    f_lst: list[float] = field(default_factory=lambda: [1.0, 1.0])
    g_max: float = 25.0
    g_min: float = 0.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        self._check_span()
        if not self.f_lst or min(self.f_lst) <= 0:
            self.refuse("f_lst", "factors above 0, the least significant pair's first")

    @property
    def devices(self) -> int:  # noqa: D102
        return 2 * len(self.f_lst)

    def scale(self, weights: Tensor) -> Tensor:  # noqa: D102
        span = self.g_max - self.g_min
        return sum(f * span for f in self.f_lst) / _largest(weights, self.per_channel)

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        span = self.g_max - self.g_min
        target = weights * scale
        devices, full = [], 0.0
        for factor in self.f_lst:
            for side in (target, -target):
                rest = (side.clamp_min(0.0) - full) / factor + self.g_min
                devices.append(rest.clamp_(self.g_min, self.g_max))
            full += factor * span
        return torch.stack(devices)

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return _weighted(conductances, self.f_lst) / scale


@dataclass(frozen=True)
class DualPairConductanceConverter(NPairConductanceConverter):
    """Two pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.f_lst) != 2:
            self.refuse("f_lst", "two factors")


@dataclass(frozen=True)
class CustomPairConductanceConverter(ConductanceConverter):
    """Pairs with a list of conductances each, interpolated from the smallest weight to the largest.

    ``g_lst`` holds two lists for every factor: of the positive device and of the negative one.
    """

    f_lst: list[float] = field(default_factory=lambda: [1.0])
    g_lst: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 25.0], [25.0, 0.0, 0.0]])
    g_max: float = 25.0
    g_min: float = 0.0
    invertibility_test: bool = True
    per_channel: bool = False

    def __post_init__(self) -> None:
        self._check_span()
        if 2 * len(self.f_lst) != len(self.g_lst) or not self.f_lst:
            self.refuse("g_lst", "two lists for every factor of f_lst")
        if len({len(g) for g in self.g_lst}) != 1 or len(self.g_lst[0]) < 2:
            self.refuse("g_lst", "lists of one length, two or more")
        if self.invertibility_test:
            weights = torch.linspace(-1.0, 1.0, 5).unsqueeze(0)
            back = self.to_weights(*self.to_conductances(weights))
            if not torch.allclose(weights, back, atol=1e-4):
                self.refuse("g_lst", "lists whose differences are linear in the weight")

    @property
    def devices(self) -> int:  # noqa: D102
        return len(self.g_lst)

    def scale(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self._highest(weights) / _largest(weights, self.per_channel)

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        lists = weights.new_tensor(self.g_lst)
        position = (weights * scale / self._highest(weights) + 1) / 2 * (lists.shape[1] - 1)
        return torch.stack([_interpolated(position, values) for values in lists])

    def _highest(self, like: Tensor) -> Tensor:
        """The largest difference of the lists."""
        return _weighted(like.new_tensor(self.g_lst), self.f_lst).abs().amax()

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return _weighted(conductances, self.f_lst) / scale


@dataclass(frozen=True)
class SingleDeviceConductanceConverter(ConductanceConverter):
    """One device, from g_min for a tile's smallest weight to g_max for its largest."""

    g_max: float = 88.199997
    g_min: float = 9.0
    per_channel: bool = False

    def __post_init__(self) -> None:
        self._check_span()

    devices = 1

    def scale(self, weights: Tensor) -> Tensor:  # noqa: D102
        if weights.numel() == 0:
            return weights.new_ones(2)
        axis: dict[str, object] = {"dim": -1, "keepdim": True} if self.per_channel else {}
        low, high = weights.amin(**axis), weights.amax(**axis)  # type: ignore[arg-type]
        return torch.stack([(self.g_max - self.g_min) / (high - low).clamp_min(_SMALLEST), low])

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return ((weights - scale[1]) * scale[0] + self.g_min).unsqueeze(0)

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return scale[1] + (conductances[0] - self.g_min) / scale[0]


@dataclass(frozen=True)
class SignedConductanceConverter(ConductanceConverter):
    """One value with a sign for a whole unit cell, for models that were fitted to such cells."""

    g_max: float = 1.0
    g_min: float = 0.0
    per_channel: bool = True

    def __post_init__(self) -> None:
        self._check_span()

    devices = 1

    def scale(self, weights: Tensor) -> Tensor:  # noqa: D102
        return self.g_max / _largest(weights, self.per_channel)

    def conductances(self, weights: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return (weights * scale).unsqueeze(0)

    def to_weights(self, conductances: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        return conductances[0] / scale


def _weighted(conductances: Tensor, factors: list[float]) -> Tensor:
    """Sum of factor times difference over the pairs."""
    total = torch.zeros_like(conductances[0])
    for number, factor in enumerate(factors):
        total += factor * (conductances[2 * number] - conductances[2 * number + 1])
    return total


def _interpolated(position: Tensor, values: Tensor) -> Tensor:
    """A list at fractional positions, its ends beyond them."""
    position = position.clamp(0.0, len(values) - 1)
    left = position.floor().clamp_max(len(values) - 2).long()
    return between(values[left], values[left + 1], position - left)


def interpolate(x: Tensor, points: list[float], values: list[float]) -> Tensor:
    """Piecewise linear through ascending points, constant beyond the first and the last."""
    grid, heights = x.new_tensor(points), x.new_tensor(values)
    right = torch.searchsorted(grid, x.contiguous()).clamp_(1, len(points) - 1)
    share = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
    return between(heights[right - 1], heights[right], share.clamp_(0.0, 1.0))


def between(low: Tensor, high: Tensor, share: Tensor | float) -> Tensor:
    """The value at a share of the way, of separate operations: ``lerp`` fuses where it can."""
    return (high - low).mul_(share).add_(low)


def is_ascending(points: list[float]) -> bool:
    """Whether there are two points or more, each above the one before."""
    return len(points) >= 2 and all(a < b for a, b in itertools.pairwise(points))
