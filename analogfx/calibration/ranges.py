"""One pass over data that tells what the input ranges should be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from analogfx.calibration import observe
from analogfx.calibration.estimators import Estimator, Settings, make
from analogfx.config import Resolved
from analogfx.kernels.experts import spans
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite


class SiteInputs:
    """What one site was given."""

    def __init__(self, site: AnalogSite, estimators: Sequence[Estimator]) -> None:
        """A site whose ranges come from an estimator, or from one for each of its experts."""
        self.site = site
        self.estimators = estimators
        self.non_finite = 0
        """Number of infinite and NaN inputs so far."""

    def see(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Take one call's inputs; return what the product goes on with.

        Args:
            offsets: where the rows of each expert end; None for a site of one matrix.
        """
        if offsets is None or len(self.estimators) == 1:
            return self._see(x, self.estimators[0])
        seen = x.clone()
        for expert, rows in spans(offsets):
            seen[rows] = self._see(x[rows], self.estimators[expert])
        return seen

    def _see(self, x: Tensor, estimator: Estimator) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        told = (rows != 0).any(dim=1)  # an empty time step or a padded token tells nothing
        if not bool(told.all()):
            rows = rows[told]
        if len(rows):
            self.non_finite += int((~rows.isfinite()).sum())
            estimator.see(rows)
        return _clamped(x, estimator) if estimator.clamps else x

    def ranges(self) -> list[float]:
        """The range of each tile, expert by expert; NaN for a tile that has seen nothing."""
        return [r for estimator in self.estimators for r in estimator.ranges()]

    def clipped(self, ranges: Sequence[float]) -> list[float]:
        """Share of each tile's inputs that ranges clip; NaN for a tile that has seen nothing."""
        tiles = len(self.site.in_sizes)
        parts = [ranges[i : i + tiles] for i in range(0, len(ranges), tiles)]
        pairs = zip(self.estimators, parts, strict=True)
        return [c for estimator, part in pairs for c in estimator.clipped(part)]


def _clamped(x: Tensor, estimator: Estimator) -> Tensor:
    ranges = torch.tensor(estimator.ranges(), dtype=torch.float64)
    bound = ranges.nan_to_num(nan=torch.inf).repeat_interleave(torch.tensor(estimator.sizes))
    bound = bound.to(x.device, x.dtype if x.dtype == torch.float64 else torch.float32)
    return torch.minimum(torch.maximum(x, -bound), bound)


class InputPass:
    """The observers of all sites whose range is kept; see :class:`SiteInputs`."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.sites: dict[tuple[AnalogModule, int], SiteInputs] = {}
        self._settings = settings
        self._generator = torch.Generator().manual_seed(seed)

    def watching(self, modules: list[AnalogModule]) -> AbstractContextManager[None]:
        """The context in which the modules' inputs are seen, by products without converters."""
        return observe.watching(modules, observe.inputs, self._observer, _without_converters)

    def _observer(self, module: AnalogModule, index: int) -> Callable[..., Any]:
        site = module._analog.sites[index]
        config = module._analog.resolved
        estimators = [
            make(self._settings, config, site.in_sizes, self._generator)
            for _ in range(math.prod(site.range_shape[:-1]))
        ]
        seen = self.sites[module, index] = SiteInputs(site, estimators)
        return seen.see


def _without_converters(config: Resolved) -> Resolved:
    """The weights as the config has them, between exact inputs and outputs."""
    return dataclasses.replace(
        config, range_mode="none", inp_res=0.0, out_res=0.0, out_bound=0.0, out_noise=0.0
    )
