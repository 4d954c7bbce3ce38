"""What a chip's parts take: energies, times, areas, each with its unit in its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from analogfx.errors import ConfigError, Conflict


@dataclass(frozen=True)
class Hardware:
    """A chip of crossbars, for :func:`analogfx.cost`.

    A number that is not known is None, and everything that needs it is absent from the result. 0
    means that it costs nothing, or is part of another number. A chip of your own is a Hardware of
    your own; ``dataclasses.replace`` changes some numbers of a preset.

    Raises:
        ConfigError: a number below 0 or not finite, or a field that must be positive and is not.

    Example:
        >>> chip = Hardware("mine", 256, 256, read_energy_pj=900.0, read_time_ns=40.0)
    """

    name: str
    crossbar_rows: int
    """Of the crossbar that the numbers are for."""
    crossbar_columns: int
    phases: int = 1
    """Reads for one input vector: the input's bits over the DAC's."""
    read_energy_pj: float | None = None
    """One read of a crossbar in one phase, whatever part of it is used."""
    cell_energy_pj: float | None = 0.0
    """One cell that holds a weight, in one read."""
    dac_energy_pj: float | None = None
    """Driving one row in one read."""
    adc_energy_pj: float | None = None
    """Converting one column in one read."""
    digital_op_energy_pj: float | None = None
    """Adding one result of an ADC to others: of phases, slices, and parts along the inputs."""
    byte_energy_pj: float | None = None
    """One byte into a crossbar, or out of it."""
    input_bytes: float = 1.0
    """Of one input of a crossbar."""
    output_bytes: float = 1.0
    """Of one output of a part."""
    read_time_ns: float | None = None
    """One read in one phase, until the columns can be converted."""
    adc_time_ns: float | None = None
    """One conversion; 0 where the read's time has all conversions in it."""
    adcs_per_crossbar: int | None = None
    """Converters of one crossbar; its columns share them."""
    parallel_crossbars: int | None = None
    """Crossbars that can be read at one time; None: all."""
    crossbar_area_mm2: float | None = None
    """One crossbar with its converters and its share of all else on the chip."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each number is from, by the field's name."""

    def __post_init__(self) -> None:
        conflicts = []
        positive = (
            "crossbar_rows", "crossbar_columns", "phases", "adcs_per_crossbar",
            "parallel_crossbars",
        )  # fmt: skip
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in positive:
                if value is not None and (type(value) is not int or value < 1):
                    conflicts.append(Conflict(item.name, value, "a whole number above 0"))
            elif item.name not in ("name", "sources", *positive) and value is not None:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not math.isfinite(value) or value < 0:
                    conflicts.append(Conflict(item.name, value, "a number from 0 on, or None"))
        if conflicts:
            raise ConfigError(conflicts, f"Hardware {self.name!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Read fields by name, as a JSON file has them.

        Raises:
            ConfigError: unknown fields, missing ones, or values that cannot be.
        """
        names = [item.name for item in fields(cls)]
        conflicts = [
            Conflict(str(name), value, f"one of {', '.join(names)}")
            for name, value in data.items()
            if name not in names
        ]
        needed = ("name", "crossbar_rows", "crossbar_columns")
        conflicts += [Conflict(name, None, "a value") for name in needed if name not in data]
        if conflicts:
            raise ConfigError(conflicts, "Hardware")
        return cls(**data)


@dataclass(frozen=True)
class DigitalReference:
    """What the same products would take in a digital processor, by operations alone."""

    name: str
    mac_energy_pj: float
    """One multiplication and one addition."""
    source: str = field(default="", compare=False, repr=False)
