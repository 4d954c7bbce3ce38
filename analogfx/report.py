"""What is analog in a model, what is not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.choose import Chosen
from analogfx.errors import PlacementError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.capture import mentions_product
from analogfx.modules.plan import make_plan, site_name
from analogfx.modules.sites import unwrapped
from analogfx.passes.contract import SiteReport


@dataclass(frozen=True)
class Report:
    """A model's products with parameters. Printing it gives the placement table."""

    sites: tuple[SiteReport, ...] = field(repr=False)
    passes: Mapping[str, int] = field(default_factory=dict, compare=False)
    """How much each whole-graph pass of the compiler changed, in all graphs compiled so far."""
    kernels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What computes each analog site as the model is now: a kernel, or torch and why."""

    @property
    def coverage(self) -> float:
        """Share of weight-stationary weight elements that are analog; 1.0 where there are none."""
        total = sum(prod(s.weight_shape) for s in self.sites)
        analog = sum(prod(s.weight_shape) for s in self.sites if s.status == "analog")
        return analog / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        sites = [asdict(s) for s in self.sites]
        counted = {"passes": dict(self.passes), "kernels": dict(self.kernels)}
        return {"coverage": self.coverage, "sites": sites, **counted}

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
        lines += [f"{n} computed by {how}" for how, n in Counter(self.kernels.values()).items()]
        if self.passes:
            counts = ", ".join(f"{name} {count}" for name, count in self.passes.items())
            lines.append(f"changed by whole-graph passes: {counts}")
        return "\n".join(lines)


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
        replace(s.site, name=site_name(s.module, s.site.name, count[s.module] > 1)) for s in sites
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
                decided_by="capture",
            )


def _multiplies(module: nn.Module) -> bool:
    home = type(module).__module__
    if home.startswith("torch.nn.modules."):
        return home not in _NO_PRODUCTS
    return mentions_product(module)


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
        return Report(_as_it_is(inner, chosen), passes, _kernels(inner))
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
