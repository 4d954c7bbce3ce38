"""Which modules to leave digital, or to give a better config, to stay within a budget."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from analogfx import files
from analogfx.api import analogize
from analogfx.choose import choose
from analogfx.config import TorchInferenceRPUConfig, as_config
from analogfx.log import logger
from analogfx.measure import Metric, OverChips, chip_seed, mean, measure
from analogfx.modules.analog_module import AnalogModule
from analogfx.search.perturb import Perturbation, as_perturbation
from analogfx.search.sensitivity import analog_modules, module_weights
from analogfx.tables import table


@dataclass(frozen=True)
class Step(OverChips):
    """A state of the search."""

    module: str
    """Whose choice was changed last; empty for the start."""
    choice: str
    """``"digital"``, ``"choice N"``, or ``"base"`` where a change was taken back."""
    values: tuple[float, ...]
    """The metric of the whole model, of each chip."""
    cost: float
    exempted: float
    """Share of the analog weights that have not the base config."""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. ``print`` shows its steps."""

    mapping: dict[str, TorchInferenceRPUConfig | None]
    """For ``analogize``: every analog module by its path."""
    met: bool
    """Whether the metric is within the budget."""
    reference: float
    """The metric of the digital model."""
    budget: float
    steps: tuple[Step, ...] = field(repr=False)
    """From the base config to the plan, in order."""
    exempt: tuple[str, ...]
    """Modules that have not the base config."""
    measured: int
    """How many plans were measured."""

    def __str__(self) -> str:
        rows = [
            (
                s.module or "(base)",
                s.choice,
                f"{s.exempted:.1%}",
                f"{s.cost:.4g}",
                f"{s.mean:.4g}",
                "-" if math.isnan(s.std) else f"{s.std:.2g}",
            )
            for s in self.steps
        ]
        lines = table(("module", "becomes", "exempted", "cost", "mean", "std"), rows)
        word = "within" if self.met else "NOT within"
        lines.append(
            f"{word} {self.budget:g} of the digital {self.reference:.4g}; greedy, {self.measured} "
            "plans measured: a cheaper plan may exist"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "schema": 1,
            "met": self.met,
            "reference": self.reference,
            "budget": self.budget,
            "measured": self.measured,
            "exempt": list(self.exempt),
            "mapping": {name: c and c.to_dict() for name, c in self.mapping.items()},
            "steps": [
                {
                    "module": s.module,
                    "choice": s.choice,
                    "values": list(s.values),
                    "cost": s.cost,
                    "exempted": s.exempted,
                }
                for s in self.steps
            ],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON, written to a file if one is named."""
        return files.json_text(self.to_dict(), path)

    def plot(self, path: str | os.PathLike[str], label: str = "metric") -> None:
        """Draw the metric over the share of exempted weights; needs matplotlib.

        Args:
            path: a picture; its ending says of which kind.
            label: of the vertical axis.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = figure.subplots()
        x = [100 * s.exempted for s in self.steps]
        errors = [0.0 if math.isnan(s.std) else s.std for s in self.steps]
        axes.errorbar(x, [s.mean for s in self.steps], errors, marker="o", capsize=2)
        for place, step in zip(x, self.steps, strict=True):
            back = bool(step.module) and step.choice == "base"
            text = f"{step.module or 'base'}{' back' if back else ''}"
            offset = (-6, 6) if back else (6, -10)
            axes.annotate(
                text,
                (place, step.mean),
                offset,
                textcoords="offset points",
                fontsize=7,
                ha="right" if back else "left",
            )
        axes.axhline(self.reference, color="gray", ls="--", lw=1, label="digital")
        axes.set_xlabel("weights exempted, %")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def plan(
    model: nn.Module,
    base: Any,
    metric: Metric,
    budget: float,
    choices: Sequence[Any] = (None,),
    perturb: Any = None,
    prepare: Callable[[Any], Any] | None = None,
    cost: Callable[[Any], float] | None = None,
    chips: int = 5,
    seed: int = 0,
    maximize: bool = True,
    progress: bool = True,
) -> Plan:
    """Find the modules to exempt so that a metric stays within a budget, at little cost.

    Greedy: what gains most of the metric for its cost is changed first, and the gains are measured
    again, on the plan as it is, before the next change; at the end every change that has become
    needless is taken back. It finds a plan, not the best one: changes that help only together are
    not seen.

    Args:
        model: the digital model. Untouched.
        base: what ``analogize`` takes.
        metric: a number for a model; see :func:`analogfx.sensitivity`.
        budget: how much worse than the digital model's the metric may be, 0 or more.
        choices: what a module may have in the place of the base config: configs, and None for
            digital.
        perturb: what every analog module is under while the metric is measured: a noise model, None
            for the configs' own, or a perturbation; see :func:`analogfx.sensitivity`.
        prepare: called on every analog model before it is measured, to calibrate it or to train it:
            ``lambda analog: analogfx.calibrate(analog, batches, progress=False)``.
        cost: a number for an analog model, larger for what is to be avoided; None for the share of
            the weights that have not the base config.
        chips: as for :func:`analogfx.sensitivity`.

    Raises:
        ValueError: a budget below 0, no chips, or no choices.
        ConfigError: a config that cannot be, or a site without a noise model.
        TypeError: the base config makes nothing analog.

    Example:
        >>> found = analogfx.plan(model, config, accuracy, budget=0.01, prepare=calibrate)
        >>> analog = analogfx.analogize(model, found.mapping)
    """
    if not budget >= 0 or chips < 1 or not choices:
        raise ValueError(
            f"budget = {budget}, chips = {chips}, {len(choices)} choices: expected a budget from 0 "
            "on, one or more chips and choices"
        )
    configs = [None if choice is None else as_config(choice) for choice in choices]
    perturbation = as_perturbation(perturb)
    count = chips if perturbation.random else 1
    search = _Search(model, base, configs, metric, perturbation, prepare, cost, count, seed)
    with tqdm(desc="plan", unit="plan", disable=not progress) as bar:
        search.tick = bar.update
        return search.run(budget, 1.0 if maximize else -1.0)


_Assignment = tuple[int | None, ...]
"""For every module the number of its choice; None for the base config."""


class _Search:
    def __init__(
        self,
        model: nn.Module,
        base: Any,
        choices: list[TorchInferenceRPUConfig | None],
        metric: Metric,
        perturbation: Perturbation,
        prepare: Callable[[Any], Any] | None,
        cost: Callable[[Any], float] | None,
        chips: int,
        seed: int,
    ) -> None:
        self.model, self.choices, self.metric = model, choices, metric
        self.perturbation, self.prepare, self.own_cost = perturbation, prepare, cost
        self.chips, self.seed = chips, seed
        self.tick: Callable[[], Any] = lambda: None
        self.chosen = {name: c.config for name, c in choose(model, base).items()}
        modules = analog_modules(analogize(model, lambda name, _: self.chosen[name]))
        self.names = list(modules)
        weights = [module_weights(module) for module in modules.values()]
        self.share = [count / sum(weights) for count in weights]
        self.known: dict[_Assignment, tuple[tuple[float, ...], float]] = {}

    def mapping(self, plan: _Assignment) -> dict[str, TorchInferenceRPUConfig | None]:
        """Configs by path. A path covers what lies inside it, so what lies inside comes first."""
        own = {
            name: self.chosen[name] if choice is None else self.choices[choice]
            for name, choice in zip(self.names, plan, strict=True)
        }
        inside = {
            name: config
            for name, config in self.chosen.items()
            if name not in own and any(name.startswith(f"{path}.") for path in own if path)
        }
        both = own | inside
        return {name: both[name] for name in sorted(both, key=lambda n: (-n.count("."), n))}

    def measured(self, plan: _Assignment) -> tuple[tuple[float, ...], float]:
        """The metric on every chip, and the cost."""
        if plan not in self.known:
            mapping = self.mapping(plan)
            analog = analogize(self.model, lambda name, _: mapping.get(name))
            modules = [m for m in analog.modules() if isinstance(m, AnalogModule)]
            if self.prepare is not None and modules:
                self.prepare(analog)
            analog.eval()
            values = []
            for chip in range(self.chips):
                if not modules:
                    values.append(measure(self.metric, analog, self.seed))
                    continue
                own = chip_seed(self.seed, chip)
                with self.perturbation.applied(analog, modules, own):
                    values.append(measure(self.metric, analog, self.seed))
            price = self.exempted(plan) if self.own_cost is None else float(self.own_cost(analog))
            self.known[plan] = tuple(values), price
            logger.debug("plan: %s: %g at cost %g", plan, mean(values), price)
            self.tick()
        return self.known[plan]

    def exempted(self, plan: _Assignment) -> float:
        """Share of the weights that have not the base config."""
        return math.fsum(
            s for s, choice in zip(self.share, plan, strict=True) if choice is not None
        )

    def run(self, budget: float, better: float) -> Plan:
        """Change what helps most, until the budget is met; then take back what is not needed."""
        was_training = self.model.training
        self.model.eval()
        try:
            reference = measure(self.metric, self.model, self.seed)
        finally:
            self.model.train(was_training)
        plan: _Assignment = (None,) * len(self.names)
        steps = [self.step("", "base", plan)]

        def loss(candidate: _Assignment) -> float:
            return better * (reference - mean(self.measured(candidate)[0]))

        def merit(candidate: _Assignment) -> float:
            gain = loss(plan) - loss(candidate)
            extra = self.measured(candidate)[1] - self.measured(plan)[1]
            # A gain that costs nothing is the best; a loss stays one, however cheap.
            return gain / max(extra, 1e-12) if gain > 0 else gain

        queue: list[tuple[float, int, int, _Assignment]] = []

        def push(place: int, number: int) -> None:
            candidate = _with(plan, place, number)
            heapq.heappush(queue, (-merit(candidate), place, number, plan))

        if loss(plan) > budget:
            for place in range(len(plan)):
                for number in range(len(self.choices)):
                    push(place, number)
        while queue and loss(plan) > budget:
            _, place, number, seen = heapq.heappop(queue)
            if plan[place] == number:
                continue
            if seen != plan:  # its gain was that on an earlier plan
                push(place, number)
                continue
            plan = _with(plan, place, number)
            steps.append(self.step(self.names[place], self.named(number), plan))
        met = loss(plan) <= budget
        for place in sorted(range(len(plan)), key=lambda n: -self.share[n]) if met else ():
            fewer = _with(plan, place, None)
            if plan[place] is not None and loss(fewer) <= budget:
                plan = fewer
                steps.append(self.step(self.names[place], "base", plan))
        exempt = tuple(n for n, c in zip(self.names, plan, strict=True) if c is not None)
        mapping = self.mapping(plan)
        return Plan(mapping, met, reference, budget, tuple(steps), exempt, len(self.known))

    def step(self, module: str, choice: str, plan: _Assignment) -> Step:
        values, price = self.measured(plan)
        return Step(module, choice, values, price, self.exempted(plan))

    def named(self, number: int) -> str:
        return "digital" if self.choices[number] is None else f"choice {number}"


def _with(plan: _Assignment, place: int, choice: int | None) -> _Assignment:
    return (*plan[:place], choice, *plan[place + 1 :])
