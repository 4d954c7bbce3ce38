"""What is analog in a model, what is not, and why."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx import terminal
from analogfx.choose import Chosen
from analogfx.config import TorchInferenceRPUConfig, described
from analogfx.errors import PlacementError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.capture import may_multiply
from analogfx.modules.plan import make_plan, site_name
from analogfx.modules.sites import sites, unwrapped
from analogfx.passes.contract import SiteReport
from analogfx.ranges import RangeState, range_states


@dataclass(frozen=True)
class Report:
    """A model's products with parameters. Printing it gives the placement table."""

    sites: tuple[SiteReport, ...] = field(repr=False)
    passes: Mapping[str, int] = field(default_factory=dict, compare=False)
    """How much each whole-graph pass of the compiler changed, in all graphs compiled so far."""
    kernels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What computes each analog site as the model is now: a kernel, or torch and why."""
    ranges: Mapping[str, RangeState] = field(default_factory=dict, compare=False)
    """The input ranges of each analog site as the model is now."""
    configs: Mapping[str, TorchInferenceRPUConfig] = field(default_factory=dict, compare=False)
    """The config of each analog site."""

    @property
    def coverage(self) -> float:
        """Share of weight-stationary weight elements that are analog; 1.0 where there are none.

        Weights whose shape is not known yet, as those of lazy modules, count only where there are
        no others: 0.0 then.
        """
        total = sum(_elements(s) for s in self.sites)
        analog = sum(_elements(s) for s in self.sites if s.status == "analog")
        if not total:
            return 1.0 if all(s.status == "analog" or s.weight_shape for s in self.sites) else 0.0
        return analog / total

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        sites = [asdict(s) for s in self.sites]
        counted = {"passes": dict(self.passes), "kernels": dict(self.kernels)}
        ranges = {name: asdict(state) for name, state in self.ranges.items()}
        as_it_is = {"ranges": ranges, "configs": self._numbers()}
        return {"coverage": self.coverage, "sites": sites, **counted, **as_it_is}

    def text(self, verbose: bool = False, width: int | None = None) -> str:
        """The placement as a table: what is digital first, layers that repeat in one row.

        Args:
            verbose: a row for every product, in the model's order, who decided, the values of the
                ranges, what the config says where there is one only, and what computes products.
            width: columns to wrap to; None to wrap nothing.
        """
        header, rows, _ = self._table(verbose)
        below = self._below(verbose)
        if width is not None:
            below = [part for line in below for part in textwrap.wrap(line, max(width, 24))]
        return "\n".join([terminal.text(header, rows, width), *below])

    def print(self, verbose: bool = False) -> None:
        """Print the table, in colours where stdout is a terminal."""
        terminal.show(*self._table(verbose), self._below(verbose))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.text(width=terminal.terminal_width())

    def columns(self, verbose: bool = False) -> dict[str, list[str]]:
        """The cells of the table, unfolded: a list for each column, in the order of ``sites``.

        Args:
            verbose: with who decided, and the values of the ranges.
        """
        columns = {
            "site": [s.name for s in self.sites],
            "kind": [s.kind for s in self.sites],
            "weight": ["x".join(map(str, s.weight_shape)) or "unknown" for s in self.sites],
            "tiles": [
                "x".join(map(str, s.tile_grid)) if s.status == "analog" else "-" for s in self.sites
            ],
        }
        numbers = self._numbers()
        if len(set(numbers.values())) > 1:
            columns["config"] = [str(numbers.get(s.name, "-")) for s in self.sites]
        if any(state.mode != "none" for state in self.ranges.values()):
            states = [self.ranges.get(s.name) for s in self.sites]
            columns["range"] = [_range(state, verbose) for state in states]
        columns["status"] = [s.status for s in self.sites]
        if verbose:
            columns["decided by"] = [s.decided_by for s in self.sites]
        columns["reason"] = [_why(s) if s.status == "digital" else "" for s in self.sites]
        return columns

    def _numbers(self) -> dict[str, int]:
        """The number of each analog site's config; equal configs have one number."""
        distinct: list[TorchInferenceRPUConfig] = []
        numbers = {}
        for name, config in self.configs.items():
            if config not in distinct:
                distinct.append(config)
            numbers[name] = distinct.index(config) + 1
        return numbers

    def _config_lines(self, verbose: bool) -> list[str]:
        """What each config says: the first beside the default, the others beside the first."""
        first: dict[int, TorchInferenceRPUConfig] = {}
        for name, number in self._numbers().items():
            first.setdefault(number, self.configs[name])
        if len(first) < 1 + (not verbose):
            return []
        plain = described(first[1], TorchInferenceRPUConfig()) or "the default"
        if len(first) == 1:
            return [f"config: {plain}"]
        others = [
            f"config {number}: as 1, but {described(config, first[1])}"
            for number, config in first.items()
            if number > 1
        ]
        return [f"config 1: {plain}", *others]

    def _table(self, verbose: bool) -> tuple[terminal.Row, list[terminal.Row], list[str]]:
        """The header, the rows and the style of each row."""
        columns = self.columns(verbose)
        cells = list(zip(*columns.values(), strict=True))
        ranks = [_rank(s) for s in self.sites]
        if verbose:
            return tuple(columns), cells, [_STYLES[rank] for rank in ranks]
        rows = [
            (row, style)
            for rank, style in enumerate(_STYLES)
            for row in terminal.counted(
                [c for c, own in zip(cells, ranks, strict=True) if own == rank]
            )
        ]
        return tuple(columns), [row for row, _ in rows], [style for _, style in rows]

    def _below(self, verbose: bool) -> list[str]:
        analog = sum(s.status == "analog" for s in self.sites)
        lines = [
            f"{analog} of {len(self.sites)} products analog, "
            f"{self.coverage:.1%} of the weight elements"
        ]
        lines += self._config_lines(verbose)
        lines += [
            f"{n} computed by {how}"
            for how, n in Counter(self.kernels.values()).items()
            if verbose or not how.startswith("torch: the tensors are on cpu")
        ]
        if self.passes:
            counts = ", ".join(f"{name} {count}" for name, count in self.passes.items())
            lines.append(f"changed by whole-graph passes: {counts}")
        return lines


_STYLES = ("bold red", "yellow", "")
"""Of what nobody asked to stay digital, of what the config leaves digital, of what is analog."""


def _rank(site: SiteReport) -> int:
    """The position of a site's style."""
    return 2 if site.status == "analog" else 1 if site.asked else 0


def _range(state: RangeState | None, verbose: bool) -> str:
    if state is None:
        return "-"
    values = f": {state.values}" if verbose and state.values else ""
    return f"{state}{values}"


def _why(site: SiteReport) -> str:
    """Why a product is digital, where, and what to do about it."""
    if site.asked:
        return site.reason
    where = f" ({site.where})" if site.where else ""
    advice = _ADVICE.get(site.decided_by, "")
    return f"{site.reason}{where}{advice}"


_ADVICE = {"capture": '; torch.compile(model, backend="analogfx") sees what runs'}
"""What to do about a product, by who left it digital."""


def _elements(site: SiteReport) -> int:
    """Elements of a site's weight, 0 if its shape is not known."""
    return prod(site.weight_shape) if site.weight_shape else 0


@dataclass(frozen=True)
class CompiledSite:
    """A product of a graph of a compiled model."""

    module: str
    """Path of the module that multiplies."""
    derivation: str
    """How the weight is computed: a module may multiply by several parts of a parameter."""
    site: SiteReport
    """Under the parameter's name from the module."""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other products; a graph that is compiled again says it again."""
        return self.module, self.site.name, self.derivation, self.site.kind


@dataclass
class _Compiled:
    """What is known of a digital model that a compiler makes analog graph by graph."""

    sites: dict[tuple[str, ...], CompiledSite] = field(default_factory=dict)
    seen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """The parameters that graphs contain."""
    passes: Counter[str] = field(default_factory=Counter)

    def report(self, model: nn.Module) -> Report:
        """The products of all graphs so far, and those that none has contained."""
        sites = *_named(self.sites.values()), *_unseen(model, self.seen)
        return Report(sites, dict(self.passes))


_compiled: WeakKeyDictionary[nn.Module, _Compiled] = WeakKeyDictionary()


def note_compiled(
    model: nn.Module | None, sites: Iterable[CompiledSite], parameters: Iterable[Tensor]
) -> None:
    """Add what was decided about one graph of a compiled digital model.

    Args:
        model: None for a bare function, of which nothing is kept.
        parameters: those that the graph contains.
    """
    if model is not None:
        known = _compiled.setdefault(model, _Compiled())
        known.sites.update((s.key, s) for s in sites)
        known.seen.update((p, True) for p in parameters)


def note_passes(model: nn.Module | None, counts: Mapping[str, int]) -> None:
    """Add what the whole-graph passes changed in one graph, by the pass's name.

    Args:
        model: None for a bare function, of which nothing is kept.
    """
    if model is not None:
        _compiled.setdefault(model, _Compiled()).passes.update(counts)


def report_of_graph(
    model: nn.Module | None, sites: Collection[CompiledSite], counts: Mapping[str, int]
) -> Report:
    """The report of a model so far; of a bare function, that of the graph just compiled."""
    return Report(_named(sites), dict(counts)) if model is None else report(model)


def _named(sites: Collection[CompiledSite]) -> tuple[SiteReport, ...]:
    """Sites by the names that analogize() gives them."""
    count = Counter(s.module for s in sites)
    return tuple(
        replace(
            s.site,
            name=site_name(s.module, s.site.name, count[s.module] > 1),
            parameter=".".join(filter(None, (s.module, s.site.name))),
            module=s.module,
        )
        for s in sites
    )


def _unseen(model: nn.Module, seen: WeakTensorKeyDictionary) -> Iterator[SiteReport]:
    """Matrices of modules that multiply, of which no graph has heard."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or parameter in seen or not _multiplies(module):
                continue
            yield SiteReport(
                name=".".join(filter(None, (path, "" if name == "weight" else name))) or name,
                kind=type(module).__name__,
                weight_shape=tuple(parameter.shape),
                tile_grid=(0, 0),
                status="digital",
                reason="in none of the graphs so far: not called, or left to run as it is",
                decided_by="compile",
                parameter=".".join(filter(None, (path, name))),
                module=path,
            )


def _multiplies(module: nn.Module) -> bool:
    home = type(module).__module__
    if home.startswith("torch.nn.modules."):
        return home not in _NO_PRODUCTS
    return may_multiply(module)


_NO_PRODUCTS = {f"torch.nn.modules.{name}" for name in ("sparse", "normalization", "batchnorm")}


def report(analog: nn.Module) -> Report:
    """The placement of an analogized model as it is now, or what of a model was compiled so far.

    A layer that was put there after ``analogize()``, or made digital again, is digital here.
    Looks into what ``torch.compile`` and data-parallel wrappers made of a model.

    Raises:
        PlacementError: the model was not analogized.
    """
    model, inner = getattr(analog, "_orig_mod", analog), unwrapped(analog)
    chosen = getattr(inner, _CHOSEN, None)
    compiled = _compiled.get(model) if isinstance(model, nn.Module) else None
    if chosen is not None:
        passes = dict(compiled.passes) if compiled else {}
        ranges = {state.name: state for state in range_states(inner)}
        placed = _as_it_is(inner, chosen)
        return Report(placed, passes, _kernels(inner), ranges, _configs(inner))
    if compiled is not None:
        return compiled.report(model)
    raise PlacementError(
        f"{type(model).__name__} carries no placement: pass what analogize() or load() returned, "
        'or a model of which torch.compile(backend="analogfx") has compiled something'
    )


_CHOSEN = "_analog_chosen"


def remember_choice(analog: nn.Module, chosen: Mapping[str, Chosen]) -> None:
    """Keep on a model what its config said of every module, for reports."""
    setattr(analog, _CHOSEN, dict(chosen))


def update_choice(analog: nn.Module, chosen: Mapping[str, Chosen]) -> None:
    """Keep what another config says of some modules."""
    remember_choice(analog, {**getattr(analog, _CHOSEN, {}), **chosen})


def forget_choice(model: nn.Module) -> None:
    """Undo :func:`remember_choice`."""
    model.__dict__.pop(_CHOSEN, None)


def _as_it_is(model: nn.Module, chosen: Mapping[str, Chosen]) -> tuple[SiteReport, ...]:
    """The products of a model; those that would become analog, but are not, are digital."""
    plan = make_plan(model, chosen, None)
    for path in plan.placements:
        plan.reports[path] = [
            replace(s, status="digital", tile_grid=(0, 0), reason=_CHANGED, decided_by="report")
            if s.status == "analog"
            else s
            for s in plan.reports[path]
        ]
    return plan.sites


_CHANGED = "made digital again, or put there, after analogize()"


def _kernels(model: nn.Module) -> dict[str, str]:
    """What computes each site of an analog model, by the site's name."""
    return {
        site_name(path, site.name, len(placement.decisions) > 1): how
        for path, module in model.named_modules()
        if isinstance(module, AnalogModule) and (placement := module._analog)
        for site, how in zip(placement.sites, placement.computed_by(module), strict=True)
    }


def _configs(model: nn.Module) -> dict[str, TorchInferenceRPUConfig]:
    """The config of each site of an analog model, by the site's name."""
    return {
        site_name(path, site.name, len(module._analog.sites) > 1): module._analog.config
        for path, module, site in sites(model)
    }


def check_strict(placed: Report) -> None:
    """Refuse products that stayed digital without being asked to.

    Raises:
        PlacementError: naming each of them.
    """
    missed = Report(tuple(s for s in placed.sites if s.status == "digital" and not s.asked))
    if missed.sites:
        columns = missed.columns()
        header = ("site", "kind", "weight", "reason")
        rows = terminal.counted([*zip(*(columns[name] for name in header), strict=True)])
        raise PlacementError(
            "strict: these products with parameters stayed digital without being asked to\n"
            f"{terminal.text(header, rows)}"
        )
