"""What is analog in a model, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from torch import nn

from analogfx.errors import PlacementError


@dataclass(frozen=True)
class SiteReport:
    """Where one product with a parameter went."""

    name: str
    """Path of the module, and of the parameter where the module has more than one product."""
    kind: str
    weight_shape: tuple[int, ...]
    tile_grid: tuple[int, int]
    """Tiles along the inputs and along the outputs; (0, 0) for a digital product."""
    status: str
    """"analog" or "digital"."""
    reason: str
    decided_by: str
    """The pass, or "capture" for a module whose graph is not to be had."""
    asked: bool = False
    """Whether the config itself leaves the product digital."""


@dataclass(frozen=True)
class Report:
    """A model's products with parameters. Printing it gives the placement table."""

    sites: tuple[SiteReport, ...] = field(repr=False)

    @property
    def coverage(self) -> float:
        """Share of weight-stationary weight elements that are analog; 1.0 where there are none."""
        total = sum(prod(s.weight_shape) for s in self.sites)
        analog = sum(prod(s.weight_shape) for s in self.sites if s.status == "analog")
        return analog / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"coverage": self.coverage, "sites": [asdict(s) for s in self.sites]}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        header = ("site", "kind", "weight", "tiles", "status", "decided by", "reason")
        rows = [
            (
                s.name,
                s.kind,
                "x".join(map(str, s.weight_shape)),
                "x".join(map(str, s.tile_grid)) if s.status == "analog" else "-",
                s.status,
                s.decided_by,
                s.reason,
            )
            for s in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                 for row in (header, tuple("-" * w for w in widths), *rows)]  # fmt: skip
        analog = sum(s.status == "analog" for s in self.sites)
        lines.append(
            f"{analog} of {len(self.sites)} products analog, "
            f"{self.coverage:.1%} of the weight elements"
        )
        return "\n".join(lines)


def report(analog: nn.Module) -> Report:
    """The placement of an analogized model.

    Raises:
        PlacementError: the model was not analogized.
    """
    placed = getattr(analog, "_analog_report", None)
    if not isinstance(placed, Report):
        raise PlacementError(
            f"{type(analog).__name__} carries no placement: "
            "pass what analogize() or load() returned"
        )
    return placed


def check_strict(placed: Report) -> None:
    """Refuse products that stayed digital without being asked to.

    Raises:
        PlacementError: naming each of them.
    """
    missed = [s for s in placed.sites if s.status == "digital" and not s.asked]
    if missed:
        raise PlacementError(_listing(missed))


def _listing(missed: Iterable[SiteReport]) -> str:
    lines = [f"  {s.name} ({s.kind}, {list(s.weight_shape)}): {s.reason}" for s in missed]
    return "\n".join(
        ["strict: these products with parameters stayed digital without being asked to:", *lines]
    )
