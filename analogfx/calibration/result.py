"""What a calibration did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteCalibration:
    """The ranges of one site: one number for each of its tiles along the inputs."""

    name: str
    """The module's path, and the parameter's where the module has more than one product."""
    before: tuple[float, ...]
    after: tuple[float, ...]
    clipped: tuple[float, ...]
    """Share of the inputs beyond ``after``, of those that were kept; NaN where none were seen."""
    out_clipped: float | None = None
    """Share of the outputs beyond the ADC's bound, where that was chosen."""


@dataclass(frozen=True)
class Calibration:
    """What :func:`analogfx.calibrate` found. Printing it gives a table."""

    method: str
    batches: int
    sites: tuple[SiteCalibration, ...] = field(repr=False)
    out_bound: float | None = None
    """The ADCs' bound in units of input range x largest weight, if it was asked for."""
    out_clipped: float | None = None
    """Share of all outputs beyond it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: a number that is not known is None."""
        record = asdict(self)
        for site in record["sites"]:
            for name in ("before", "after", "clipped"):
                site[name] = [_known(value) for value in site[name]]
        return record | {"sites": list(record["sites"])}

    def __str__(self) -> str:
        header = ["site", "tiles", "before", "after", "clipped"]
        rows = [
            [s.name, str(len(s.after)), _span(s.before), _span(s.after), _share(s.clipped)]
            for s in self.sites
        ]
        if self.out_bound is not None:
            header.append("outputs clipped")
            for row, s in zip(rows, self.sites, strict=True):
                row.append("-" if s.out_clipped is None else _share([s.out_clipped]))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in (header, ["-" * w for w in widths], *rows)
        ]
        lines.append(f"{self.method}, from {self.batches} batches")
        if self.out_bound is not None and self.out_clipped is not None:
            lines.append(f"out_bound {self.out_bound:g} clips {self.out_clipped:.3%} of outputs")
        return "\n".join(lines)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers."""
    if not values:
        return "-"
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} .. {high}"


def _share(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{max(known):.3%}" if known else "-"
