"""From a model's sites to the crossbars of a chip."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from torch import nn

from analogfx import files
from analogfx.errors import ConfigError, Conflict
from analogfx.modules.sites import unwrapped
from analogfx.tables import fold, fold_names, table, write_csv
from analogfx.tiles.count import input_vectors
from analogfx.tiles.cut import Part, cut
from analogfx.tiles.pack import one_each, shelves
from analogfx.tiles.page import write_page
from analogfx.tiles.picture import draw
from analogfx.tiles.rows import MappedSite, Tile
from analogfx.tiles.sites import named_sites

SCHEMA = 1
"""Version of what ``to_json`` writes."""

_NAMES = {
    "macs": "MACs a forward",
    "dac_conversions": "inputs to DACs",
    "adc_conversions": "outputs of ADCs",
}
FILLS = ("even", "first")
GROUPINGS = ("diagonal", "separate")


@dataclass(frozen=True)
class TileMap:
    """Where every weight of a model lies on a chip. Printing it gives a table of the sites."""

    crossbar: tuple[int, int]
    """Rows and columns of a crossbar, in cells."""
    differential: bool
    slices: int
    sites: tuple[MappedSite, ...] = field(repr=False)
    tiles: tuple[Tile, ...] = field(repr=False)

    @property
    def crossbars(self) -> int:
        """How many are used."""
        return len({tile.crossbar for tile in self.tiles})

    @property
    def devices(self) -> int:
        """Devices that hold weights."""
        return sum(tile.devices for tile in self.tiles)

    @property
    def utilisation(self) -> float:
        """Share of the cells of the crossbars used that hold weights."""
        cells = self.crossbars * self.crossbar[0] * self.crossbar[1]
        return sum(tile.cells for tile in self.tiles) / cells if cells else 0.0

    @property
    def macs(self) -> int | None:
        """Multiplications of weights in one forward; None if no inputs were given."""
        return _sum(site.macs for site in self.sites)

    @property
    def reads(self) -> int | None:
        """Reads of a part (one matrix-vector product each) in one forward, or None."""
        return self._forward(lambda tile: 1)

    @property
    def dac_conversions(self) -> int | None:
        """Inputs that drive a row in one forward, over all parts, or None."""
        return self._forward(lambda tile: tile.rows)

    @property
    def adc_conversions(self) -> int | None:
        """Columns that are read in one forward, over all parts, or None."""
        return self._forward(lambda tile: tile.columns)

    def _forward(self, each: Any) -> int | None:
        vectors = self.vectors
        known = [(vectors[tile.site], each(tile)) for tile in self.tiles]
        return _sum(None if count is None else count * value for count, value in known)

    @property
    def vectors(self) -> dict[str, int | None]:
        """Vectors that each site multiplies in one forward, by its name."""
        return {site.name: site.vectors for site in self.sites}

    @property
    def finer(self) -> tuple[str, ...]:
        """Sites with a tile that is larger than a crossbar, which the map cuts further."""
        return tuple(site.name for site in self.sites if site.finer)

    def totals(self) -> dict[str, Any]:
        """Sums over the model."""
        return {
            "crossbars": self.crossbars,
            "devices": self.devices,
            "utilisation": self.utilisation,
            "macs": self.macs,
            "reads": self.reads,
            "dac_conversions": self.dac_conversions,
            "adc_conversions": self.adc_conversions,
        }

    def _rows(self) -> list[tuple[str, tuple[str, ...]]]:
        """Name of every site, and the other cells of its row."""
        size = self.crossbar[0] * self.crossbar[1]
        return [
            (
                site.name,
                (
                    f"{site.outputs}x{site.inputs}",
                    str(site.groups),
                    f"{site.grid[0]}x{site.grid[1]}",
                    str(site.crossbars),
                    f"{site.cells * self.slices / (site.crossbars * size):.1%}",
                    str(site.devices),
                    _text(site.vectors),
                    _text(site.macs),
                ),
            )
            for site in self.sites
        ]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the sites, repeated layers as one row."""
        header = [
            "site", "weight", "groups", "tiles", "crossbars", "used", "devices", "vectors", "MACs",
        ]  # fmt: skip
        return header, [[name, *row] for name, _, row in fold(self._rows())]

    def _notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        if not self.finer:
            return []
        return [
            f"{len(self.finer)} of {len(self.sites)} sites have tiles larger than a crossbar: "
            "cut further here, while the model computes them whole; for the model to do as the "
            f"chip does, set mapping.max_input_size = {self.crossbar[0]} and "
            f"mapping.max_output_size = {self.crossbar[1]}"
        ]

    def __str__(self) -> str:
        lines = table(*self._table())
        lines.append(
            f"{self.crossbars} crossbars of {self.crossbar[0]}x{self.crossbar[1]} cells, "
            f"{self.utilisation:.1%} used, {self.devices} devices"
        )
        if self.macs is not None:
            lines.append(
                f"a forward: {self.macs} MACs, {self.reads} reads, "
                f"{self.dac_conversions} inputs to DACs, {self.adc_conversions} outputs of ADCs"
            )
        return "\n".join([*lines, *self._notes()])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One HTML file with the table and a picture, for a browser, without a network."""
        numbers = [
            (_NAMES.get(name, name), "not known" if value is None else f"{value:,}")
            for name, value in self.totals().items()
            if name != "utilisation"
        ]
        numbers.insert(1, ("cells used", f"{self.utilisation:.1%}"))
        size = f"{self.crossbar[0]}x{self.crossbar[1]}"
        numbers.insert(1, ("cells of each", size))
        header, rows = self._table()
        rows_of = fold_names(self._rows())
        write_page(numbers, header, rows, self._notes(), self.tiles, rows_of, self.crossbar, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``docs/tile-map.schema.json`` describes it; unknown numbers are None."""
        return {
            "schema": SCHEMA,
            "crossbar": list(self.crossbar),
            "differential": self.differential,
            "slices": self.slices,
            "totals": self.totals(),
            "sites": [asdict(site) | {"macs": site.macs} for site in self.sites],
            "tiles": [asdict(tile) for tile in self.tiles],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON, written to a file if one is named."""
        return files.json_text(self.to_dict(), path)

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Every tile, one a line, to a file or an open stream; spans as their two ends."""
        columns = list(Tile.__dataclass_fields__)
        rows = ([getattr(tile, name) for name in columns] for tile in self.tiles)
        write_csv(
            path,
            columns,
            (["-".join(map(str, v)) if isinstance(v, tuple) else v for v in row] for row in rows),
        )

    def plot(self, path: str | os.PathLike[str], limit: int = 64) -> None:
        """Draw the crossbars and what fills them; needs matplotlib.

        Args:
            path: a picture; its ending says of which kind.
            limit: crossbars to draw, the first ones.
        """
        rows_of = fold_names(self._rows())
        draw(self.tiles, rows_of, self.crossbar, self.utilisation, path, limit)


def tile_map(
    analog: nn.Module,
    crossbar: tuple[int, int] = (512, 512),
    differential: bool = True,
    slices: int = 1,
    fill: str = "even",
    pack: bool = False,
    grouping: str = "diagonal",
    inputs: Any = None,
) -> TileMap:
    """Cut the weights of an analog model into crossbars.

    A cell of a crossbar holds one slice of one weight: a pair of devices with ``differential``,
    else one device. A site's own tiles (``mapping`` in its config) are respected: no part crosses
    their borders. A tile that is larger than a crossbar is cut further, and the map says so: the
    model computes it whole, with one range and one ADC, which the chip cannot.

    Args:
        analog: what ``analogize`` or ``load`` returned, on any device, ``meta`` included.
        crossbar: rows (inputs) and columns (outputs), in cells.
        differential: a weight is the difference of two devices.
        slices: cells for each weight, each on a crossbar of its own; a read of one is a read of
            all.
        fill: ``"even"`` cuts into parts as equal as can be, ``"first"`` into full crossbars and a
            rest.
        pack: put several parts on one crossbar where they fit, each on rows and columns that no
            other part there uses both of. Parts of one crossbar are read one after another.
        grouping: a grouped convolution is a block-diagonal matrix: ``"diagonal"`` puts as many
            groups as fit on one crossbar, ``"separate"`` each on one of its own.
        inputs: what a forward takes, to count what one forward does: a tensor, a tuple, a dict, or
            ``(args, kwargs)``. The model runs once. None leaves the counts unknown.

    Raises:
        TypeError: the model has no analog layer.
        ConfigError: a crossbar, ``slices``, ``fill`` or ``grouping`` that cannot be.

    Example:
        >>> print(analogfx.tile_map(analog, (256, 256), inputs=images[:1]))
    """
    rows, columns = _checked(crossbar, slices, fill, grouping)
    named = list(named_sites(analog))
    counted = None if inputs is None else input_vectors(unwrapped(analog), inputs)
    parts: list[tuple[int, int, Part]] = [
        (number, part_slice, part)
        for number, one in enumerate(named)
        for part in cut(
            one.site.in_sizes,
            one.site.out_sizes,
            one.site.groups,
            (rows, columns),
            fill,
            grouping == "diagonal",
        )
        for part_slice in range(slices)
    ]
    sizes = [(part.rows, part.columns) for _, _, part in parts]
    places = shelves(sizes, (rows, columns)) if pack else one_each(len(parts))
    per_cell = 2 if differential else 1
    tiles = [
        Tile(
            site=named[number].name,
            tile_row=part.tile_row,
            tile_column=part.tile_column,
            slice=part_slice,
            crossbar=place.crossbar,
            row=place.row,
            column=place.column,
            rows=part.rows,
            columns=part.columns,
            cells=part.cells,
            devices=part.cells * per_cell,
            inputs=part.inputs,
            outputs=part.outputs,
            groups=part.groups,
            input_tile=part.input_tile,
        )
        for (number, part_slice, part), place in zip(parts, places, strict=True)
    ]
    by_site: dict[int, list[Tile]] = {}
    for (number, _, _), tile in zip(parts, tiles, strict=True):
        by_site.setdefault(number, []).append(tile)
    sites = []
    for number, one in enumerate(named):
        its, site = by_site[number], one.site
        outputs, per_group = sum(site.out_sizes), sum(site.out_sizes) // site.groups
        sites.append(
            MappedSite(
                name=one.name,
                outputs=outputs,
                inputs=sum(site.in_sizes),
                groups=site.groups,
                grid=(max(t.tile_row for t in its) + 1, max(t.tile_column for t in its) + 1),
                crossbars=len({t.crossbar for t in its}),
                cells=sum(t.cells for t in its) // slices,
                devices=sum(t.devices for t in its),
                vectors=None if counted is None else counted[one.module, one.number],
                finer=max(site.in_sizes) > rows or min(max(site.out_sizes), per_group) > columns,
            )
        )
    return TileMap((rows, columns), differential, slices, tuple(sites), tuple(tiles))


def _checked(crossbar: Any, slices: Any, fill: str, grouping: str) -> tuple[int, int]:
    conflicts = []
    sizes = tuple(crossbar) if isinstance(crossbar, (tuple, list)) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        conflicts.append(Conflict("crossbar", crossbar, "(rows, columns), whole numbers above 0"))
    if type(slices) is not int or slices < 1:
        conflicts.append(Conflict("slices", slices, "a whole number above 0"))
    choices: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "fill": (fill, FILLS),
        "grouping": (grouping, GROUPINGS),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            conflicts.append(Conflict(name, value, " or ".join(map(repr, known))))
    if conflicts:
        raise ConfigError(conflicts)
    return sizes[0], sizes[1]


def _sum(values: Any) -> int | None:
    """A sum, of which nothing is known if one of its terms is not."""
    first, second = itertools.tee(values)
    return None if any(v is None for v in first) else sum(second)


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)
