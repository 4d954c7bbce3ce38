"""One pass over data that tells what the input ranges should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from analogfx.calibration import observe
from analogfx.calibration.estimators import Estimator, Settings, make
from analogfx.config import Resolved
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite


class SiteInputs:
    """What one site was given."""

    def __init__(self, site: AnalogSite, estimator: Estimator) -> None:
        self.site = site
        self.estimator = estimator
        self.non_finite = 0
        """Number of infinite and NaN inputs so far."""

    def see(self, x: Tensor) -> Tensor:
        """Take one call's inputs; return what the product goes on with."""
        rows = x.detach().reshape(-1, x.shape[-1])
        told = (rows != 0).any(dim=1)  # an empty time step or a padded token tells nothing
        if not bool(told.all()):
            rows = rows[told]
        if len(rows):
            self.non_finite += int((~rows.isfinite()).sum())
            self.estimator.see(rows)
        return self._clamped(x) if self.estimator.clamps else x

    def _clamped(self, x: Tensor) -> Tensor:
        ranges = torch.tensor(self.estimator.ranges(), dtype=torch.float64)
        bound = ranges.nan_to_num(nan=torch.inf).repeat_interleave(
            torch.tensor(self.estimator.sizes)
        )
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
        estimator = make(self._settings, module._analog.resolved, site.in_sizes, self._generator)
        seen = self.sites[module, index] = SiteInputs(site, estimator)
        return seen.see


def _without_converters(config: Resolved) -> Resolved:
    """The weights as the config has them, between exact inputs and outputs."""
    return dataclasses.replace(
        config, range_mode="none", inp_res=0.0, out_res=0.0, out_bound=0.0, out_noise=0.0
    )
