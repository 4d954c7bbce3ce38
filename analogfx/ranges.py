"""What the input ranges of a model's sites are set from, and which ones no data has set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from analogfx import shards
from analogfx.modules.plan import site_name
from analogfx.modules.sites import sites
from analogfx.state import COUNT


@dataclass(frozen=True)
class RangeState:
    """The input ranges of one site, as they are now."""

    name: str
    """The site's, as reports have it."""
    mode: str
    """``"none"``, ``"static"``, ``"fast"`` or ``"dynamic"``."""
    seen: int = 0
    """Batches that the tile with the fewest has followed."""
    wanted: int = 0
    """``init_from_data`` of its config."""
    smallest: float | None = None
    """Of the tiles' ranges, in units of the input; None if there are none to read."""
    largest: float | None = None

    @property
    def is_unset(self) -> bool:
        """Whether fewer batches than its config wants have set it."""
        return self.seen < self.wanted

    def __str__(self) -> str:
        if self.mode in ("none", "dynamic"):
            return {"none": "none", "dynamic": "each call"}[self.mode]
        return f"{self.seen} of {self.wanted} batches" if self.is_unset else "set"

    @property
    def values(self) -> str:
        """The tiles' ranges in a few digits, empty if there are none to read."""
        if self.smallest is None or self.largest is None:
            return ""
        low, high = f"{self.smallest:.4g}", f"{self.largest:.4g}"
        return low if low == high else f"{low} to {high}"


def range_states(analog: nn.Module) -> Iterator[RangeState]:
    """The input ranges of every site. Those on the meta device, which nothing is in, are left out.

    Values are read where a process holds them whole, so that no process waits for another.
    """
    for path, module, site in sites(analog):
        name = site_name(path, site.name, len(module._analog.sites) > 1)
        config = module._analog.resolved
        count = getattr(module, site.state.of(COUNT), None)
        if count is None:
            yield RangeState(name, config.range_mode)
        elif not count.is_meta:
            held = getattr(module, site.state.input_range).detach()
            ends = () if shards.is_sharded(held) or held.is_meta else held.aminmax()
            yield RangeState(
                name, config.range_mode, int(count.min()), config.init_from_data, *map(float, ends)
            )


def warn_unset(analog: nn.Module, stacklevel: int = 1) -> None:
    """Warn, once for all layers, of sites that followed fewer batches than ``init_from_data``.

    There are none after training for that long, after :func:`analogfx.calibrate`, and where
    ``init_from_data`` is 0: there ``init_value`` is meant.

    Args:
        stacklevel: as that of ``warnings.warn``: 1 is the line that calls this function.
    """
    found = [state for state in range_states(analog) if state.is_unset]
    if not found:
        return
    shown = [f"{state.name} ({state})" for state in found[:_SHOWN]]
    if len(found) > _SHOWN:
        shown.append(f"and {len(found) - _SHOWN} more")
    warnings.warn(
        f"the input ranges of {len(found)} analog products were not set from data: "
        f"{', '.join(shown)}; call analogfx.calibrate(), or train for init_from_data batches, "
        "or set init_from_data = 0 to keep init_value",
        stacklevel=stacklevel + 1,
    )


_SHOWN = 8
"""Names of layers in the warning."""
