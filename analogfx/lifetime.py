"""How well a model does on chips, from a second to years after programming."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from analogfx import files
from analogfx.chip.compensation import BaseDriftCompensation
from analogfx.chip.model import NoiseModel
from analogfx.chip.record import read as read_record
from analogfx.device import program
from analogfx.journal import Journal, fingerprint
from analogfx.measure import chip_seed, measure
from analogfx.page.charts import band
from analogfx.page.document import Document
from analogfx.ranges import warn_unset
from analogfx.tables import write_csv

TIMES = (1.0, 3600.0, 86400.0, 31_536_000.0)
"""A second, an hour, a day, a year."""
_UNITS = (("y", 31_536_000.0), ("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


class Row(NamedTuple):
    """One measurement."""

    chip: int
    seed: int
    """Programs the same chip again: ``analogfx.program(analog, seed=seed)``."""
    seconds: float
    value: float


@dataclass(frozen=True)
class Lifetime:
    """What :func:`evaluate` found; ``print`` shows it as a table.

    Statistics are over chips, one number for each of ``times``.
    """

    times: tuple[float, ...]
    rows: tuple[Row, ...]
    exact: float
    """The metric of the model outside of any chip."""

    @property
    def chips(self) -> int:
        """How many chips were programmed."""
        return len({row.chip for row in self.rows})

    def at(self, seconds: float) -> list[float]:
        """The values of all chips at one of ``times``."""
        return [row.value for row in self.rows if row.seconds == seconds]

    @property
    def mean(self) -> list[float]:
        """Means over chips."""
        return [math.fsum(self.at(t)) / len(self.at(t)) for t in self.times]

    @property
    def std(self) -> list[float]:
        """Unbiased standard deviations over chips; NaN for a single chip."""
        return [
            math.sqrt(math.fsum((v - m) ** 2 for v in self.at(t)) / (len(self.at(t)) - 1))
            if len(self.at(t)) > 1
            else math.nan
            for t, m in zip(self.times, self.mean, strict=True)
        ]

    def quantile(self, q: float) -> list[float]:
        """Quantiles over chips, 0 <= q <= 1, linear between two of them."""
        values = [torch.tensor(self.at(t), dtype=torch.float64) for t in self.times]
        return [float(v.quantile(q)) for v in values]

    def __str__(self) -> str:
        lines = [f"{'time':>8}  {'mean':>10}  {'std':>10}  {'5 %':>10}  {'95 %':>10}"]
        columns = (self.mean, self.std, self.quantile(0.05), self.quantile(0.95))
        for time, *values in zip(self.times, *columns, strict=True):
            lines.append("  ".join([f"{named(time):>8}", *(f"{v:10.4g}" for v in values)]))
        return "\n".join([*lines, f"{self.chips} chips; without one: {self.exact:.4g}"])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All measurements and their statistics as JSON, written to a file if one is named."""
        record = {
            "schema": 1,
            "times": list(self.times),
            "chips": self.chips,
            "exact": self.exact,
            "mean": self.mean,
            "std": [None if math.isnan(v) else v for v in self.std],
            "rows": [row._asdict() for row in self.rows],
        }
        return files.json_text(record, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """All measurements, one a line: chip, seed, seconds, value."""
        write_csv(path, Row._fields, self.rows)

    def to_html(self, path: str | os.PathLike[str], label: str = "metric") -> None:
        """One HTML file with the table and a picture, for a browser, without a network."""
        page = Document(f"Lifetime: {label}")
        page.numbers([("chips", str(self.chips)), ("without a chip", f"{self.exact:.4g}")])
        names = [named(time) for time in self.times]
        low, high = self.quantile(0.05), self.quantile(0.95)
        axis = f"time after programming; {label}: mean, and 5 % to 95 % of chips"
        page.picture(band(names, self.mean, low, high, self.exact, axis))
        columns = zip(names, self.mean, self.std, low, high, strict=True)
        rows = [[name, *(f"{value:.4g}" for value in values)] for name, *values in columns]
        page.table(("time", "mean", "std", "5 %", "95 %"), rows)
        page.write(path)

    def plot(self, path: str | os.PathLike[str], label: str = "metric") -> None:
        """Draw mean and the band from 5 % to 95 % of chips over time; needs matplotlib.

        Args:
            path: a picture; its ending says of which kind.
            label: of the vertical axis.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = figure.subplots()
        # Time 0 has no place on a logarithmic axis: it stands at a second.
        times = [max(t, 1.0) for t in self.times]
        axes.fill_between(times, self.quantile(0.05), self.quantile(0.95), alpha=0.25, lw=0)
        axes.plot(times, self.mean, marker="o", label=f"mean of {self.chips} chips, 5 % to 95 %")
        axes.axhline(self.exact, color="gray", ls="--", lw=1, label="without a chip")
        axes.set_xscale("log")
        axes.set_xticks(times, [named(t) for t in self.times])
        axes.minorticks_off()
        axes.set_xlabel("time after programming")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def evaluate(
    analog: nn.Module,
    metric: Callable[[Any], Any],
    noise_model: Any = None,
    compensation: Any = None,
    times: Sequence[float] = TIMES,
    chips: int = 25,
    seed: int = 0,
    progress: bool = True,
    read_noise: str = "readout",
    output_noise: bool = False,
    file: str | os.PathLike[str] | None = None,
) -> Lifetime:
    """Measure a model on many chips, at several times after programming.

    Args:
        analog: the analog model, in eval mode. Untouched.
        metric: a number for a model, from data that it knows: ``accuracy(model) -> float``. It
            runs without gradients; what it draws from torch's CPU generator is the same each time.
        noise_model, compensation: see :func:`analogfx.program`; None: as the configs say.
        times: seconds after programming.
        chips: how many to program, each by a seed of its own that ``seed`` gives.
        progress: show a bar.
        read_noise, output_noise: see :meth:`analogfx.Device.at`.
        file: measurements are added to it, and taken from it by a later run of the same model,
            configs, noise and seed: one that was cut off goes on, and chips and times can be
            added. One file for each metric.

    Raises:
        ValueError: no times, no chips, or the model is in training mode.
        CheckpointError: the file is of another run.
        ConfigError, TypeError, ValueError: see :func:`analogfx.program` and
            :meth:`analogfx.Device.at`.
    """
    times = tuple(float(t) for t in times)
    if not times or chips < 1:
        raise ValueError(f"times = {times}, chips = {chips}: expected one or more of each")
    if analog.training:
        raise ValueError(f"{type(analog).__name__} is in training mode: call eval() first")
    warn_unset(analog, stacklevel=3)
    model = None if noise_model is None else read_record(NoiseModel, noise_model, "noise_model")
    if compensation is not None:
        compensation = read_record(BaseDriftCompensation, compensation, "compensation")
    subject = {
        "noise_model": str(model),
        "compensation": str(compensation),
        "read_noise": read_noise,
        "output_noise": output_noise,
        "seed": seed,
        "model": fingerprint(analog),
    }
    journal = Journal(file, subject)
    if "exact" not in journal:
        journal["exact"] = measure(metric, analog, seed)
    # A time that is asked for twice is read twice.
    readings = [(time, times[:place].count(time)) for place, time in enumerate(times)]
    rows = []
    with tqdm(total=chips * len(times), desc="chips", disable=not progress) as bar:
        for chip in range(chips):
            own = chip_seed(seed, chip)
            device = None
            for time, read in readings:
                name = f"chip {chip}, {time!r} s, reading {read}"
                if name not in journal:
                    device = device or program(analog, model, compensation, own)
                    with device.at(time, read, read_noise, output_noise):
                        journal[name] = measure(metric, analog, seed)
                rows.append(Row(chip, own, time, journal[name]))
                bar.update()
    return Lifetime(times, tuple(rows), journal["exact"])


def seconds(text: str) -> float:
    """A time such as ``90``, ``1min``, ``2h``, ``1d`` or ``10y``, in seconds.

    Raises:
        ValueError: naming what was found.
    """
    for unit, factor in _UNITS:
        if text.endswith(unit):
            text, scale = text[: -len(unit)], factor
            break
    else:
        scale = 1.0
    try:
        value = float(text) * scale
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{text!r}: expected a time from 0 on, such as 90, 2h, 1d or 10y")
    return value


def named(time: float) -> str:
    """A time in the largest unit that it reaches."""
    unit, factor = next(((u, f) for u, f in _UNITS if time >= f), ("s", 1.0))
    return f"{time / factor:.3g} {unit}"
