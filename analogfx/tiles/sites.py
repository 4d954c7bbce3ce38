"""The analog products of a model, under the names that the report gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.plan import site_name
from analogfx.modules.program import AnalogSite, Lowered
from analogfx.modules.sites import required_sites, unwrapped


class Named(NamedTuple):
    """A site with its name and its module."""

    name: str
    path: str
    """Of the module."""
    module: AnalogModule
    number: int
    """Number of the site in its module."""
    site: AnalogSite

    @property
    def lowered(self) -> Lowered | None:
        """The fused op that computes it in evaluation; None for a chain that stayed explicit."""
        programs = self.module._analog.programs
        program = next(p for (training, _), p in programs.items() if not training)
        return program.lowered[self.number]


def named_sites(analog: Any) -> Iterator[Named]:
    """Every site of a model, or of what a wrapper made of it.

    Raises:
        TypeError: the model has none.
    """
    counts: dict[AnalogModule, int] = {}
    for path, module, site in required_sites(unwrapped(analog)):
        number = counts.get(module, 0)
        counts[module] = number + 1
        several = len(module._analog.decisions) > 1
        yield Named(site_name(path, site.name, several), path, module, number, site)
