"""Input ranges that no data has set."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from analogfx.modules.plan import site_name
from analogfx.modules.sites import sites
from analogfx.state import COUNT


@dataclass(frozen=True)
class UnsetRange:
    """A site whose ranges have seen too little."""

    name: str
    seen: int
    """Batches that the tile with the fewest has followed."""
    wanted: int
    """``init_from_data`` of its config."""


def unset_ranges(analog: nn.Module) -> list[UnsetRange]:
    """The sites that have followed fewer batches than their config's ``init_from_data``.

    None are after training for that long, after :func:`analogfx.calibrate`, and where
    ``init_from_data`` is 0: there ``init_value`` is meant.
    """
    found = []
    for path, module, site in sites(analog):
        count = getattr(module, site.state.of(COUNT), None)
        wanted = module._analog.resolved.init_from_data
        if count is None or count.is_meta or (seen := int(count.min())) >= wanted:
            continue
        several = len(module._analog.sites) > 1
        found.append(UnsetRange(site_name(path, site.name, several), seen, wanted))
    return found


def warn_unset(analog: nn.Module, stacklevel: int = 1) -> None:
    """Warn, once for all layers, of ranges that data has not set; see :func:`unset_ranges`.

    Args:
        stacklevel: as that of ``warnings.warn``: 1 is the line that calls this function.
    """
    found = unset_ranges(analog)
    if not found:
        return
    shown = [f"{u.name} ({u.seen} of {u.wanted} batches)" for u in found[:_SHOWN]]
    if len(found) > _SHOWN:
        shown.append(f"and {len(found) - _SHOWN} more")
    warnings.warn(
        f"the input ranges of {len(found)} analog products were not set from data: "
        f"{', '.join(shown)}; call analogfx.calibrate(), or train for init_from_data batches, "
        "or set init_from_data = 0 to keep init_value",
        stacklevel=stacklevel + 1,
    )


_SHOWN = 8
