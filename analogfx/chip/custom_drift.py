"""Phase-change memory with a drift model of one's own, as lists over conductance.

Source: Li et al., Adv. Electron. Mater. 2023 (2201190), as AIHWKIT 1.1.0 has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from analogfx.chip.converters import interpolate, is_ascending
from analogfx.chip.model import Draw
from analogfx.chip.pcm import PCMLikeNoiseModel

_LISTS = {"g_lst", "nu_mean_lst", "nu_std_lst"}


@dataclass(frozen=True)
class CustomDriftPCMLikeNoiseModel(PCMLikeNoiseModel):
    """nu = |mean(g) + std(g) n|, each interpolated between the points of its list."""

    custom_drift_model: dict[str, list[float]] = field(default_factory=dict)
    """``g_lst`` in microsiemens, ascending, over all that the converter gives; ``nu_mean_lst``;
    ``nu_std_lst``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lists = self.custom_drift_model
        name = "custom_drift_model"
        if set(lists) != _LISTS or len({len(v) for v in lists.values()}) != 1:
            self.refuse(name, f"lists of one length under {', '.join(sorted(_LISTS))}")
        points = lists["g_lst"]
        if not is_ascending(points) or min(lists["nu_std_lst"]) < 0:
            self.refuse(name, "g_lst in ascending order, two points or more, nu_std_lst from 0 on")
        low, high = self.g_converter.g_min, self.g_converter.g_max
        if points[0] > low or points[-1] < high:
            self.refuse(name, f"g_lst from {low} to {high}, as far as the converter goes")

    def drift(self, target: Tensor, draw: Draw) -> Tensor:  # noqa: D102
        points, means, stds = (self.custom_drift_model[k] for k in sorted(_LISTS))
        mean, std = interpolate(target, points, means), interpolate(target, points, stds)
        return std.mul_(draw(target)).add_(mean).abs_().mul_(self.drift_scale)
