"""Energy, time and area of a forward, rolled up from a description of the hardware."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from analogfx import files
from analogfx.errors import ConfigError, Conflict, shown
from analogfx.hardware import HOROWITZ_INT8, DigitalReference, Hardware
from analogfx.tables import fold, table, write_csv
from analogfx.tiles.known import product, ratio, total
from analogfx.tiles.rows import MappedSite, Tile
from analogfx.tiles.tile_map import TileMap

SCHEMA = 1
CAUSES = ("array", "DAC", "ADC", "additions", "data")
"""What takes energy: reading cells, driving rows, converting columns, adding, moving bytes."""


@dataclass(frozen=True)
class SiteCost:
    """What one analog product takes in one forward; None for what is not known."""

    name: str
    macs: int | None
    energy_pj: Mapping[str, float | None]
    """By cause."""
    time_ns: float | None
    """From its first input to its last output."""
    busy_ns: float | None
    """How long it keeps its busiest crossbar, where inputs come one after another."""
    crossbars: int

    @property
    def total_pj(self) -> float | None:
        """All causes; None if one of them is not known."""
        return total(self.energy_pj.values())


@dataclass(frozen=True)
class Cost:
    """What a forward takes on a chip. Printing it gives a table; None is what is not known."""

    hardware: Hardware
    reference: DigitalReference
    sites: tuple[SiteCost, ...] = field(repr=False)
    crossbars: int
    interval_ns: float | None
    """Time from one result to the next where every site works on a forward of its own."""

    @property
    def macs(self) -> int | None:
        """Multiplications of analog weights."""
        counts = [site.macs for site in self.sites]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def energy_pj(self) -> dict[str, float | None]:
        """By cause."""
        return {cause: total(site.energy_pj[cause] for site in self.sites) for cause in CAUSES}

    @property
    def total_pj(self) -> float | None:
        """All causes; None if one of them is not known."""
        return total(self.energy_pj.values())

    @property
    def known_pj(self) -> float:
        """The causes that are known."""
        return math.fsum(value for value in self.energy_pj.values() if value is not None)

    @property
    def latency_ns(self) -> float | None:
        """One forward, site after site."""
        return total(site.time_ns for site in self.sites)

    @property
    def area_mm2(self) -> float | None:
        """Of the crossbars used."""
        return product(self.crossbars, self.hardware.crossbar_area_mm2)

    @property
    def tops_per_watt(self) -> float | None:
        """Operations (two a multiplication) over energy: per picojoule."""
        return ratio(product(2, self.macs), self.total_pj)

    @property
    def tops(self) -> float | None:
        """Operations over time, with every site at work."""
        return ratio(product(2e-3, self.macs), self.interval_ns)

    @property
    def power_w(self) -> float | None:
        """Energy over time, with every site at work."""
        return ratio(product(1e-3, self.total_pj), self.interval_ns)

    @property
    def digital_pj(self) -> float | None:
        """The same multiplications by the digital reference, without its memory."""
        return product(self.macs, self.reference.mac_energy_pj)

    def totals(self) -> dict[str, Any]:
        """Sums over the model."""
        return {
            "macs": self.macs,
            "energy_pj": self.energy_pj,
            "total_pj": self.total_pj,
            "known_pj": self.known_pj,
            "latency_ns": self.latency_ns,
            "interval_ns": self.interval_ns,
            "area_mm2": self.area_mm2,
            "tops_per_watt": self.tops_per_watt,
            "tops": self.tops,
            "power_w": self.power_w,
            "digital_pj": self.digital_pj,
        }

    def __str__(self) -> str:
        header = ("site", *(f"{cause} nJ" for cause in CAUSES), "total nJ", "time us", "busy us")
        rows = [
            (
                site.name,
                (
                    *(_kilo(site.energy_pj[cause]) for cause in CAUSES),
                    _kilo(site.total_pj),
                    _kilo(site.time_ns),
                    _kilo(site.busy_ns),
                ),
            )
            for site in self.sites
        ]
        sums = (*map(_kilo, self.energy_pj.values()), _kilo(self.total_pj))
        rows.append(("all", (*sums, _kilo(self.latency_ns), _kilo(self.interval_ns))))
        lines = table(header, [(name, *row) for name, _, row in fold(rows)])
        lines.append(
            f"{self.hardware.name}: {_unit(self.tops_per_watt, 'TOPS/W')}, "
            f"{_unit(self.tops, 'TOPS')}, {_unit(self.power_w, 'W')}, "
            f"{_unit(self.area_mm2, 'mm2')}, {self.crossbars} crossbars"
        )
        unknown = [cause for cause, value in self.energy_pj.items() if value is None]
        if unknown:
            lines.append(
                f"not known: the energy of {', '.join(unknown)}; all else takes "
                f"{self.known_pj / 1e3:.4g} nJ"
            )
        lines.append(
            f"digital ({self.reference.name}), without memory: {_kilo(self.digital_pj)} nJ"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not known is None."""
        hardware = asdict(self.hardware)
        sites = [asdict(site) | {"total_pj": site.total_pj} for site in self.sites]
        return {
            "schema": SCHEMA,
            "hardware": hardware,
            "reference": asdict(self.reference),
            "crossbars": self.crossbars,
            "totals": self.totals(),
            "sites": sites,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON, written to a file if one is named."""
        return files.json_text(self.to_dict(), path)

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Every site, one a line, to a file or an open stream; what is not known is empty."""
        causes = [f"{cause}_pj" for cause in CAUSES]
        write_csv(
            path,
            ["site", "macs", *causes, "total_pj", "time_ns", "busy_ns"],
            (
                [s.name, s.macs, *s.energy_pj.values(), s.total_pj, s.time_ns, s.busy_ns]
                for s in self.sites
            ),
        )


def cost(mapped: TileMap, hardware: Hardware, reference: DigitalReference = HOROWITZ_INT8) -> Cost:
    """What one forward takes on a chip.

    The analog products of the map alone: what stays digital (activations, normalisation, attention
    scores, products without a weight) is not in it.

    *Energy.* One input vector of a part takes ``phases`` reads; each takes ``read_energy_pj``,
    ``cell_energy_pj`` for every weight, ``dac_energy_pj`` for every row and ``adc_energy_pj`` for
    every column. Every result of an ADC but one for each output costs an addition. Every part is
    sent its inputs, and sends its outputs (the slices of a weight together).

    *Time.* A read is followed by the conversions, ``ceil(columns / adcs)`` one after another, which
    overlap with the next read. The parts of a site work at the same time, except those on one
    crossbar, and those beyond ``parallel_crossbars``. ``latency_ns`` is for site after site; with
    ``interval_ns`` between results, every site works on a forward of its own, as its weights never
    move: the busiest crossbar decides.

    Args:
        mapped: what ``tile_map`` gave. Without ``inputs`` the area alone is known.
        hardware: of :mod:`analogfx.hardware`, or your own.
        reference: a digital processor to compare with.

    Raises:
        ConfigError: the map is for crossbars of another size than the hardware's.
        TypeError: the map is none, or the hardware is none, such as a preset's name.

    Example:
        >>> mapped = analogfx.tile_map(analog, (256, 256), inputs=images[:1])
        >>> print(analogfx.cost(mapped, analogfx.hardware.HERMES_ONE_PHASE))
    """
    for value, kind in ((mapped, TileMap), (hardware, Hardware), (reference, DigitalReference)):
        if not isinstance(value, kind):
            raise TypeError(f"expected a {kind.__name__}, found {shown(value)}")
    size = hardware.crossbar_rows, hardware.crossbar_columns
    if mapped.crossbar != size:
        valid = f"{size}, the crossbar of {hardware.name}"
        raise ConfigError([Conflict("tile_map.crossbar", mapped.crossbar, valid)])
    by_site: dict[str, list[Tile]] = defaultdict(list)
    for tile in mapped.tiles:
        by_site[tile.site].append(tile)
    sites = [_site(site, by_site[site.name], hardware) for site in mapped.sites]
    interval = _interval(mapped, hardware)
    return Cost(hardware, reference, tuple(sites), mapped.crossbars, interval)


def _site(site: MappedSite, tiles: Sequence[Tile], chip: Hardware) -> SiteCost:
    vectors = site.vectors
    reads = product(vectors, chip.phases)
    columns = sum(tile.columns for tile in tiles)
    results = sum(tile.columns for tile in tiles if tile.slice == 0)
    additions = None if reads is None else reads * columns - (vectors or 0) * site.outputs
    rows = sum(tile.rows for tile in tiles)
    moved = rows * chip.input_bytes + results * chip.output_bytes
    energy = {
        "array": total(
            (
                product(reads, len(tiles), chip.read_energy_pj),
                product(reads, sum(tile.cells for tile in tiles), chip.cell_energy_pj),
            )
        ),
        "DAC": product(reads, rows, chip.dac_energy_pj),
        "ADC": product(reads, columns, chip.adc_energy_pj),
        "additions": product(additions, chip.digital_op_energy_pj),
        "data": product(vectors, moved, chip.byte_energy_pj),
    }
    on_one = max(Counter(tile.crossbar for tile in tiles).values())
    rounds = math.ceil(site.crossbars / (chip.parallel_crossbars or site.crossbars))
    read, conversion, step = _times(max(tile.columns for tile in tiles), chip)
    steps = product(reads, on_one, rounds)
    time = None
    if steps is not None and read is not None and conversion is not None and step is not None:
        time = read + conversion + (steps - 1) * step if steps else 0.0
    return SiteCost(
        site.name, site.macs, energy, time, product(reads, on_one, step), site.crossbars
    )


def _times(columns: int, chip: Hardware) -> tuple[float | None, float | None, float | None]:
    """Of a read, of its conversions, and from one read to the next."""
    read, each = chip.read_time_ns, chip.adc_time_ns
    share = None if chip.adcs_per_crossbar is None else math.ceil(columns / chip.adcs_per_crossbar)
    conversion = product(each, share)
    known = read is not None and conversion is not None
    return read, conversion, max(read or 0.0, conversion or 0.0) if known else None


def _interval(mapped: TileMap, chip: Hardware) -> float | None:
    """Time from one result to the next: that of the busiest crossbar, or of all in turns."""
    vectors, busy = mapped.vectors, defaultdict[int, list[float | None]](list)
    for tile in mapped.tiles:
        _, _, step = _times(tile.columns, chip)
        busy[tile.crossbar].append(product(vectors[tile.site], chip.phases, step))
    each = [total(times) for times in busy.values()]
    known = [time for time in each if time is not None]
    if len(known) < len(each):
        return None
    turns = math.fsum(known) / chip.parallel_crossbars if chip.parallel_crossbars else 0.0
    return max([turns, *known])


def _kilo(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.4g}"


def _unit(value: float | None, unit: str) -> str:
    return f"{unit} not known" if value is None else f"{value:.4g} {unit}"
