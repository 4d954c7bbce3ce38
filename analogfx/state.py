"""What a site remembers between calls: the one table that all who keep or read such state use.

Modules register it, the compiler's backend keeps it beside a model, checkpoints and exporters
read it under these names, which are Lightning's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analogfx.config import Resolved
from analogfx.kernels import reference as ref


@dataclass(frozen=True)
class Variable:
    """One tensor of a site's state."""

    name: str
    """Lightning's name of it, and ours."""
    kept: Callable[[Resolved], bool]
    """Whether a site of a config has it."""
    initial: Callable[[Resolved], float] | None
    """The value before any data was seen; None for the largest weight of each row of a tile."""
    trained: Callable[[Resolved], bool] | None = None
    """Whether it asks for gradients; None for a buffer, which never does."""
    per_output: bool = False
    """Of shape (tiles, outputs), with the tiles along the inputs; else of that of the ranges."""
    counts: bool = False
    """Of dtype int64; else float64 for a weight in float64 and float32 for all others."""
    across_ranks: str = "mean"
    """What makes one value of those that data-parallel ranks saw: "mean", "min" or "max"."""

    def shape(self, ranges: tuple[int, ...], outputs: int) -> tuple[int, ...]:
        """Its shape for a site of some outputs.

        Args:
            ranges: shape of the site's ranges: (tiles,), or (experts, tiles).
        """
        return (ranges[-1], outputs) if self.per_output else ranges

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """Its dtype beside a weight of some dtype."""
        return torch.int64 if self.counts else precision(weight)


def precision(weight: torch.dtype) -> torch.dtype:
    """The dtype of ranges and clips beside a weight: never less than float32."""
    return torch.float64 if weight == torch.float64 else torch.float32


def _has_ranges(config: Resolved) -> bool:
    return config.has_state


def _learns_range(config: Resolved) -> bool:
    return config.learn_range


def _learns_clip(config: Resolved) -> bool:
    return config.learnable_clip


def _first_range(config: Resolved) -> float:
    return config.init_value


INPUT_RANGE = Variable("input_range", _has_ranges, _first_range, _learns_range)
COUNT = Variable(
    "input_range_update_idx", _has_ranges, lambda _: 0, counts=True, across_ranks="max"
)
X_MIN = Variable("x_min", _has_ranges, lambda _: -ref.UNTOUCHED, across_ranks="min")
X_MAX = Variable("x_max", _has_ranges, lambda _: ref.UNTOUCHED, across_ranks="max")
CLIP = Variable("learnable_weight_clip", _learns_clip, None, lambda _: True, per_output=True)

SEEN = "range_statistics"
"""What training forwards saw since the last step, (tiles, see ``kernels.seen``) in float64.

A plain attribute, neither parameter nor buffer: no wrapper shards, broadcasts or averages it, and
no checkpoint holds it. Only modules that ``prepare_training`` prepared have it."""

INITIALIZES = "range_initializes"
"""Whether a range may still follow the data, a bool () in host memory. As plain as ``SEEN``."""

RANGES = (INPUT_RANGE, COUNT, X_MIN, X_MAX)
"""Ranges and the statistics that set them, in the order in which ``update_range`` takes them."""
VARIABLES = (*RANGES, CLIP)
"""Everything that a site may remember, in the order of registration."""


@dataclass(frozen=True)
class StateNames:
    """Attributes of the module that hold a site's state."""

    prefix: str = ""
    """What tells the site from others of its module."""
    suffix: str = ""
    """The same behind the name, as Lightning has it for recurrent layers."""

    def of(self, variable: Variable) -> str:
        """The name of one variable."""
        return self.prefix + variable.name + self.suffix

    @property
    def input_range(self) -> str:  # noqa: D102
        return self.of(INPUT_RANGE)

    @property
    def clip(self) -> str:  # noqa: D102
        return self.of(CLIP)

    @property
    def seen(self) -> str:  # noqa: D102
        return self.prefix + SEEN

    @property
    def initializes(self) -> str:  # noqa: D102
        return self.prefix + INITIALIZES

    def ranges(self) -> tuple[str, ...]:
        """The names of ranges and their statistics, in the order of ``update_range``."""
        return tuple(map(self.of, RANGES))

    def all(self) -> tuple[str, ...]:
        """Names of all parameters and buffers, in the order of registration."""
        return tuple(map(self.of, VARIABLES))


_RECURRENT = re.compile(r"weight(_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)")
"""Names of the weights of recurrent layers and cells."""


def state_names(parameters: Sequence[str]) -> list[StateNames]:
    """Lightning's names for the only site of a module; several are told apart by their weight."""
    if len(parameters) == 1:
        return [StateNames()]
    recurrent = [_RECURRENT.fullmatch(parameter) for parameter in parameters]
    if all(recurrent) and len(set(parameters)) == len(parameters):
        return [StateNames(suffix=match[1]) for match in recurrent if match]
    names: list[StateNames] = []
    for parameter in parameters:
        stem, number = parameter.replace(".", "_") + "_", 1
        while StateNames(stem) in names:
            number += 1
            stem = f"{parameter.replace('.', '_')}_{number}_"
        names.append(StateNames(stem))
    return names


_CLOSED = float(1 << 31)
"""More batches than any: a calibrated range is not learned from data again."""


def as_state(value: Tensor, current: Any) -> Tensor:
    """A loaded value in the state's own dtype; the reference counts in floats, up to -inf."""
    if not current.is_floating_point() and value.is_floating_point():
        value = torch.nan_to_num(value.float(), nan=_CLOSED, posinf=_CLOSED, neginf=_CLOSED)
    return value.to(current.dtype)
