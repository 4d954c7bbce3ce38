"""What a noise model is, and the laws that several share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from analogfx.chip.converters import ConductanceConverter, SinglePairConductanceConverter
from analogfx.chip.record import Record
from analogfx.errors import ConfigError, Conflict

Reading = tuple[Tensor, Tensor | None]
"""Conductances without read noise, and its standard deviation; None for no read noise."""


class Draw(Protocol):
    """Gives standard normal values of a tensor's shape."""

    def __call__(self, like: Tensor, name: str = "") -> Tensor:
        """New values with every call; with a name the same ones whenever a chip is asked."""
        ...


class NoiseModel(Record):
    """Base of noise models. One of your own is a dataclass that defines three methods.

    Those are ``programmed``, ``drift``, and ``at`` or :meth:`reading`. With ``reading`` read noise
    is known apart from the rest, so that it can be drawn in every product, too.

    Conductances are in microsiemens, (n, weights) for the n devices of each weight in a part of a
    tile: what becomes of a device depends on itself alone. Times are in seconds after
    programming. A method asks ``draw`` for its random numbers, so that a chip is the same whenever
    it is asked for::

        @dataclass(frozen=True)
        class Fading(NoiseModel):
            rate: float = 1e-6

            def programmed(self, target, draw):
                return (target + 0.5 * draw(target)).clamp_min(0.0)

            def drift(self, target, draw):
                return self.rate * draw(target).abs()

            def at(self, programmed, drift, time, draw):
                return programmed * torch.exp(-drift * time)
    """

    kind = "noise model"
    g_converter: ConductanceConverter = SinglePairConductanceConverter()
    """How weights become conductances: pairs of devices, for a model without such a field."""

    def programmed(self, target: Tensor, draw: Draw) -> Tensor:
        """Conductances that programming to a target leaves."""
        raise NotImplementedError

    def drift(self, target: Tensor, draw: Draw) -> Tensor:
        """What :meth:`at` must know of each device: a drift exponent, for example."""
        raise NotImplementedError

    def at(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Tensor:
        """Conductances as one reading finds them at a time: those of :meth:`reading`, with noise.

        Args:
            programmed: what :meth:`programmed` returned.
            drift: what :meth:`drift` returned.
            time: seconds after programming, 0 or more.
        """
        g, spread = self.reading(programmed, drift, time, draw)
        if spread is None:
            return g
        return spread.mul_(draw(g)).add_(g).clamp_min_(0.0)

    def reading(self, programmed: Tensor, drift: Tensor, time: float, draw: Draw) -> Reading:
        """Conductances at a time without read noise, and the standard deviation of that noise.

        Args:
            programmed, drift, time: see :meth:`at`.

        Returns:
            Two tensors of the shape of ``programmed``, the second a new one; None for no read
            noise.

        Raises:
            ConfigError: the model does not say what part of a reading is read noise.
        """
        valid = f"'readout': {type(self).__name__} does not define reading()"
        raise ConfigError([Conflict("read_noise", "product", valid)])


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """c0 + c1 x + c2 x^2 + ..."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total.mul_(x).add_(c)
    return total


def drifted(programmed: Tensor, exponent: Tensor, time: float, t_0: float) -> Tensor:
    """The power law g (t / t_0)^(-nu), where t counts from t_0 before the first reading."""
    if time <= 0:
        return programmed
    # exp of a product: a power with a tensor as its exponent takes three times as long.
    return exponent.mul(-math.log1p(time / t_0)).exp_().mul_(programmed)


def accumulated(time: float, t_read: float) -> float:
    """How far 1/f noise has accumulated: sqrt(ln((t + t_read) / (2 t_read))), at least 0."""
    return math.sqrt(max(math.log((time + t_read) / (2 * t_read)), 0.0))


def below_or_above(x: Tensor, edge: float, below: Tensor, above: Tensor) -> Tensor:
    """One law below an edge, another from there on."""
    return torch.where(x < edge, below, above)


def log_law(x: Tensor, slope: float, offset: float, low: float, high: float) -> Tensor:
    """Slope ln x + offset, within bounds; x of 0 counts as 1e-7."""
    return x.clamp_min(1e-7).log_().mul_(slope).add_(offset).clamp_(low, high)
