"""One pass over data that tells what the bound of the ADCs should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from analogfx.calibration import observe
from analogfx.config import Resolved
from analogfx.errors import CalibrationError
from analogfx.kernels import reference as ref
from analogfx.modules.analog_module import AnalogModule

_EDGES = 1 << 15
"""Positive bfloat16 numbers, the edges of the histogram: neighbours are less than 0.8 % apart."""


class Outputs:
    """How large outputs are, in units of input range x largest weight, as a histogram."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_EDGES, dtype=torch.int64)

    def see(self, y: Tensor, row_max: Tensor, input_range: Tensor) -> Tensor:
        """Take one tile's outputs in front of the ADC, and return them."""
        unit = ref.adc_bound(input_range, row_max, 1.0)
        size = (y.detach().abs() / unit).float()
        size = size[size.isfinite()]  # a row of zero weights has no unit
        # A positive float's bits are ordered as it is; the upper half is the bfloat16 below it.
        edge = (size.contiguous().view(torch.int32) + 0xFFFF) >> 16
        self.counts += torch.bincount(edge.flatten(), minlength=_EDGES).cpu()
        return y

    def clipped(self, bound: float) -> float:
        """Share of the outputs beyond a bound that is an edge; NaN if there were none."""
        edges = _edges()
        return (self.counts[edges > bound].sum() / self.counts.sum()).item()


def _edges() -> Tensor:
    return (torch.arange(_EDGES, dtype=torch.int32) << 16).view(torch.float32)


def smallest_bound(counts: Tensor, share: float) -> float:
    """The smallest edge beyond which lies at most a share of what was counted.

    Args:
        counts: (edges,) how many outputs lie between an edge and the one below it.
    """
    beyond = counts.sum() - counts.cumsum(0)
    enough = (beyond.double() <= share * counts.sum().double()).int()
    enough[0] = 0  # the edge at 0 is no bound
    return _edges()[int(enough.argmax())].item()


class OutputPass:
    """The observers of all sites that may have an ADC; see :class:`Outputs`."""

    def __init__(self) -> None:
        self.sites: dict[tuple[AnalogModule, int], Outputs] = {}

    def watching(self, modules: list[AnalogModule]) -> AbstractContextManager[None]:
        """The context in which the modules' outputs are seen, in front of their ADCs."""
        return observe.watching(modules, observe.outputs, self._observer, _unbounded)

    def _observer(self, module: AnalogModule, index: int) -> Callable[..., Any]:
        return self.sites.setdefault((module, index), Outputs()).see

    def total(self) -> Outputs:
        """Those of all sites together."""
        both = Outputs()
        both.counts = torch.stack([o.counts for o in self.sites.values()]).sum(0)
        return both

    def bound(self, share: float) -> float:
        """The smallest bound for all sites together.

        Raises:
            CalibrationError: every output was 0.
        """
        counts = self.total().counts
        if not counts[1:].any():
            raise CalibrationError("every output is 0: no bound of the ADCs follows from that")
        return smallest_bound(counts, share)


def _unbounded(config: Resolved) -> Resolved:
    """With the DAC, and an ADC's node to watch at the place where an ADC would be."""
    return dataclasses.replace(config, out_bound=1.0, out_res=0.0, out_noise=0.0)
