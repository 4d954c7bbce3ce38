"""Which layer hurts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from torch import nn
from tqdm.auto import tqdm

from analogfx import files
from analogfx.journal import Journal, fingerprint
from analogfx.log import logger
from analogfx.measure import Metric, OverChips, chip_seed, mean, measure
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import required_sites, unwrapped
from analogfx.page.charts import bars
from analogfx.page.document import Document
from analogfx.ranges import warn_unset
from analogfx.search.perturb import as_perturbation
from analogfx.tables import table, write_csv

MODES = ("alone", "all_but")


@dataclass(frozen=True)
class ModuleSensitivity(OverChips):
    """What became of the metric when one module was perturbed, or all others."""

    name: str
    """The module's path."""
    weights: int
    """Elements of its analog weights."""
    values: tuple[float, ...]
    """The metric, of each chip."""
    effect: float
    """Mean of the values less that of what they are compared with."""


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found, the module that matters most first. ``print`` shows a table.

    With ``mode="alone"`` an effect is the change that a perturbed module makes to an exact model,
    and the first row hurts most. With ``"all_but"`` it is what is gained by leaving one module
    exact on a model that is perturbed everywhere else, and the first row helps most.
    """

    mode: str
    perturbation: str
    maximize: bool
    exact: float
    """The metric without perturbation."""
    everywhere: tuple[float, ...]
    """The metric with every module perturbed, of each chip."""
    rows: tuple[ModuleSensitivity, ...] = field(repr=False)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        total = sum(row.weights for row in self.rows)
        return ("module", "weights", "share", "mean", "std", "effect"), [
            (
                row.name or "(the model)",
                str(row.weights),
                f"{row.weights / total:.1%}",
                f"{row.mean:.4g}",
                "-" if math.isnan(row.std) else f"{row.std:.2g}",
                f"{row.effect if abs(row.effect) > 1e-6 * abs(self.exact) else 0.0:+.3g}",
            )
            for row in self.rows
        ]

    def _how(self) -> str:
        which = "all but one" if self.mode == "all_but" else "one"
        return f"{self.perturbation}; {which} module at a time, {len(self.everywhere)} chips"

    def __str__(self) -> str:
        lines = [*table(*self._table()), self._how()]
        lines.append(f"exact {self.exact:.4g}, everywhere {mean(self.everywhere):.4g}")
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One HTML file with the table and bars, for a browser, without a network."""
        page = Document("Sensitivity")
        page.numbers(
            [("exact", f"{self.exact:.4g}"), ("everywhere", f"{mean(self.everywhere):.4g}")]
        )
        page.text(self._how())
        names = [row.name or "(the model)" for row in self.rows]
        errors = [0.0 if math.isnan(row.std) else row.std for row in self.rows]
        effects = [row.effect for row in self.rows]
        page.picture(bars(names[:40], effects[:40], errors[:40], "effect, and spread over chips"))
        page.table(*self._table())
        page.write(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "schema": 1,
            "mode": self.mode,
            "perturbation": self.perturbation,
            "maximize": self.maximize,
            "exact": self.exact,
            "everywhere": list(self.everywhere),
            "rows": [
                {
                    "name": row.name,
                    "weights": row.weights,
                    "values": list(row.values),
                    "mean": row.mean,
                    "std": None if math.isnan(row.std) else row.std,
                    "effect": row.effect,
                }
                for row in self.rows
            ],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON, written to a file if one is named."""
        return files.json_text(self.to_dict(), path)

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Every measurement, one a line, to a file or an open stream."""
        rows = (
            [row.name, row.weights, chip, value]
            for row in self.rows
            for chip, value in enumerate(row.values)
        )
        write_csv(path, ["module", "weights", "chip", "value"], rows)

    def plot(self, path: str | os.PathLike[str], label: str = "metric") -> None:
        """Draw the effects as bars, one standard deviation to either side; needs matplotlib.

        Args:
            path: a picture; its ending says of which kind.
            label: what the metric is.
        """
        from matplotlib.figure import Figure

        rows = self.rows[:40][::-1]
        figure = Figure(figsize=(6.4, 1.2 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        errors = [0.0 if math.isnan(row.std) else row.std for row in rows]
        names = [row.name or "(the model)" for row in rows]
        axes.barh(names, [row.effect for row in rows], xerr=errors, color="tab:blue", ecolor="gray")
        axes.axvline(0.0, color="black", lw=0.8)
        whole = mean(self.everywhere) - self.exact
        what = "exact model" if self.mode == "alone" else "model perturbed everywhere"
        axes.set_xlabel(f"change of {label}, from the {what}; everywhere at once: {whole:+.3g}")
        axes.tick_params(axis="y", labelsize=8)
        figure.savefig(path, dpi=150)


def sensitivity(
    analog: nn.Module,
    metric: Metric,
    perturb: Any = None,
    mode: str = "alone",
    chips: int = 5,
    seed: int = 0,
    maximize: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure what perturbing one analog module, or all but one, does to a metric.

    Args:
        analog: the analog model, in eval mode. Untouched. A module with several products is
            perturbed as a whole.
        metric: a number for a model, from data that it knows: ``accuracy(model) -> float``. It
            runs without gradients; what it draws from torch's CPU generator is the same each time.
        perturb: programming noise (a model of :mod:`analogfx.chip`; None for the configs' own);
            fields of a config by dotted name, such as ``{"forward.inp_res": analogfx.bits(4)}``;
            ``"digital"``; or a perturbation of :mod:`analogfx.search.perturb`.
        mode: ``"alone"`` or ``"all_but"``.
        chips: for programming noise: how many, by seeds that ``seed`` gives. The same chips for
            every module, so that differences are not those of luck.
        maximize: whether a larger metric is better; False for a loss.
        file: measurements are added to it, and taken from it by a later run of the same model,
            perturbation and seed. One file for each metric.
        progress: show a bar.

    Raises:
        ValueError: no chips, another mode, or a model in training mode.
        ConfigError: a perturbation that cannot be, or a site without a noise model.
        CheckpointError: the file is of another run.
        TypeError: the model has no analog layer.

    Example:
        >>> found = analogfx.sensitivity(analog, accuracy, analogfx.chip.PCMLikeNoiseModel())
        >>> print(found)
    """
    analog = unwrapped(analog)
    if mode not in MODES or chips < 1:
        raise ValueError(f"mode = {mode!r}, chips = {chips}: expected 'alone' or 'all_but', 1 up")
    modules = analog_modules(analog)
    if analog.training:
        raise ValueError(f"{type(analog).__name__} is in training mode: call eval() first")
    warn_unset(analog, stacklevel=3)
    perturbation = as_perturbation(perturb)
    count = chips if perturbation.random else 1
    subject = {
        "perturbation": perturbation.describe(),
        "mode": mode,
        "chips": count,
        "seed": seed,
        "model": fingerprint(analog),
        "modules": list(modules),
    }
    journal = Journal(file, subject)
    jobs = list(_jobs(modules, mode, count))
    with tqdm(total=len(jobs), desc="sensitivity", disable=not progress) as bar:
        for name, chip, chosen in jobs:
            if name not in journal:
                its_seed = chip_seed(seed, chip)
                with perturbation.applied(analog, chosen, its_seed):
                    journal[name] = measure(metric, analog, seed)
                logger.debug("sensitivity: %s: %g", name, journal[name])
            bar.update()
    exact = journal[_EXACT]
    everywhere = tuple(journal[f"{_ALL}{chip}"] for chip in range(count))
    compared = exact if mode == "alone" else mean(everywhere)
    rows = []
    for name, module in modules.items():
        values = tuple(journal[f"{chip} {name}"] for chip in range(count))
        weights = module_weights(module)
        rows.append(ModuleSensitivity(name, weights, values, mean(values) - compared))
    better = 1.0 if maximize else -1.0
    direction = better if mode == "alone" else -better
    rows.sort(key=lambda row: (direction * row.effect, row.name))
    return Sensitivity(mode, str(perturbation), maximize, exact, everywhere, tuple(rows))


_EXACT, _ALL = "exact", "everywhere "


def _jobs(
    modules: dict[str, AnalogModule], mode: str, chips: int
) -> Iterator[tuple[str, int, list[AnalogModule]]]:
    """Every measurement: its key, its chip, the modules to perturb."""
    everything = list(modules.values())
    yield _EXACT, 0, []
    for chip in range(chips):
        yield f"{_ALL}{chip}", chip, everything
        for name, module in modules.items():
            others = [m for m in everything if m is not module]
            yield f"{chip} {name}", chip, [module] if mode == "alone" else others


def analog_modules(analog: nn.Module) -> dict[str, AnalogModule]:
    """The analog modules of a model, by path.

    Raises:
        TypeError: there are none.
    """
    return {path: module for path, module, _ in required_sites(analog)}


def module_weights(module: AnalogModule) -> int:
    """Elements of a module's analog weights."""
    return sum(sum(site.in_sizes) * sum(site.out_sizes) for site in module._analog.sites)
