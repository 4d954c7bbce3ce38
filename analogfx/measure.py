"""A metric of a model, on several chips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analogfx.device import key
from analogfx.errors import MetricError

Metric = Callable[[Any], Any]


def measure(metric: Metric, model: nn.Module, seed: int) -> float:
    """One number, without gradients. What the metric draws on the CPU is the same every time.

    Raises:
        MetricError: the metric returned something that is no number.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "metric"))
        found = metric(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        size = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise MetricError(
            f"the metric returned a {type(found).__name__}{size}: expected a number"
        ) from None


def chip_seed(seed: int, chip: int) -> int:
    """The number of one of several chips: the same for all that are compared."""
    return key(seed, "chip", chip)


def mean(values: Sequence[float]) -> float:
    """NaN for none."""
    return math.fsum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Unbiased standard deviation; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


class OverChips:
    """What was measured on several chips."""

    values: tuple[float, ...]
    """The metric, of each chip."""

    @property
    def mean(self) -> float:
        """Over chips."""
        return mean(self.values)

    @property
    def std(self) -> float:
        """Unbiased, over chips; NaN for one."""
        return spread(self.values)
