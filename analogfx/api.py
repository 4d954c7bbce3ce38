"""The verbs: make a model analog, make it digital again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from tqdm.auto import tqdm

from analogfx.capture import default_pattern, forward_of, mentions_product, reads_weights
from analogfx.choose import Chosen, choose
from analogfx.config import Resolved
from analogfx.errors import CaptureError
from analogfx.module import AnalogModule, close_fast_paths, open_fast_paths, swap, unswap
from analogfx.passes.contract import Decision
from analogfx.program import Placement, Program, build, check_same_sites
from analogfx.report import Report, SiteReport, check_strict, site_name

ModelT = TypeVar("ModelT", bound=nn.Module)

# Modules that read their weights in ways that no graph of theirs shows.
_CLOSED: dict[type[Any], str] = {
    nn.MultiheadAttention: "nn.MultiheadAttention reads its projections in one fused call",
    nn.RNNBase: "recurrent layers run in one fused call",
    nn.RNNCellBase: "recurrent cells run in one fused call",
    nn.Bilinear: "a bilinear form is not a matrix-vector product",
    _ConvTransposeNd: "transposed convolutions are not mapped to tiles",
    LazyModuleMixin: "a lazy module has no weight yet: run the model once, then analogize it",
}
_SITE_CLASSES = (nn.Linear, _ConvNd)


def analogize(
    model: ModelT,
    rpu_config: Any,
    inplace: bool = False,
    strict: bool = False,
    debug_dir: str | Path | None = None,
) -> ModelT:
    """Make every product with a parameter analog, as a config says.

    The result has the same module tree, classes (the swapped ones are subclasses of their own),
    parameter names, ties, frozen parameters, hooks, mode, dtype and device.

    Args:
        model: any module, on any device, ``meta`` included.
        rpu_config: a :class:`TorchInferenceRPUConfig` (or Lightning's, or its dict) for the whole
            model; or an ordered mapping from module names to configs, where a key is an exact
            name (which covers all modules inside it, too), a glob, or ``re:`` and a regular
            expression for the whole name, the first match wins, and ``None`` or no match leaves a
            module digital; or a callable of (name, module) that returns a config or None. No
            config is changed or kept.
        inplace: change ``model`` itself; no weight is copied.
        strict: raise if a product with a parameter stays digital without being asked to.
        debug_dir: a folder to write the graph after every pass to, one subfolder for each kind
            of module.

    Returns:
        The analog model; ``model`` itself with ``inplace``.

    Raises:
        TypeError: ``model`` is no module.
        ConfigError: a config cannot run; all its conflicts are listed. ``model`` is untouched.
        PlacementError: with ``strict``; ``model`` is untouched.
        CaptureError: the model is analog already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"analogize() takes a torch.nn.Module, found {type(model).__name__}")
    chosen = choose(model, rpu_config)
    for name, module in model.named_modules():
        if isinstance(module, AnalogModule):
            raise CaptureError(
                f"{name or type(module).__name__} is analog already: pass the digital model, "
                "or what to_digital() gives"
            )
    plan = _plan(model, chosen, Path(debug_dir) if debug_dir is not None else None)
    placed = Report(tuple(plan.sites))
    if strict:
        check_strict(placed)
    analog = model if inplace else copy.deepcopy(model)
    modules = dict(analog.named_modules())
    for name, placement in plan.placements.items():
        swap(modules[name], placement)
    close_fast_paths(analog)
    analog._analog_report = placed  # type: ignore[assignment]
    return analog


def to_digital(analog: ModelT, inplace: bool = False) -> ModelT:
    """The digital model back: classes, parameter names and ties as before analogize().

    Weights are what they are now; ranges and learned clips are dropped.

    Args:
        inplace: change ``analog`` itself; no weight is copied.
    """
    digital = analog if inplace else copy.deepcopy(analog)
    for module in list(digital.modules()):
        if isinstance(module, AnalogModule):
            unswap(module)
    open_fast_paths(digital)
    digital.__dict__.pop("_analog_report", None)
    return digital


# ------------------------------------------------------------------------------------ planning


@dataclass
class _Plan:
    """All that analogize() will do, decided before anything is touched."""

    debug_dir: Path | None
    placements: dict[str, Placement] = field(default_factory=dict)
    sites: list[SiteReport] = field(default_factory=list)
    programs: dict[Any, Program | CaptureError] = field(default_factory=dict)


def _plan(model: nn.Module, chosen: dict[str, Chosen], debug_dir: Path | None) -> _Plan:
    plan = _Plan(debug_dir)
    closed: set[nn.Module] = set()
    modules = list(model.named_modules())
    for name, module in tqdm(modules, desc="analogize", unit="module", delay=2, leave=False):
        if module in closed:
            continue
        refusal = next((why for kind, why in _CLOSED.items() if isinstance(module, kind)), None)
        if refusal is not None:
            closed.update(module.modules())
            _leave(plan, name, module, chosen[name], refusal)
        elif _may_multiply(module):
            _place(plan, name, module, chosen[name])
    return plan


def _may_multiply(module: nn.Module) -> bool:
    """Whether to look at a module's graph for products."""
    if isinstance(module, _SITE_CLASSES) or mentions_product(module):
        return True
    # A product may hide in code that its own does not name; torch's other layers are known.
    known = type(module).__module__.startswith("torch.nn.modules.")
    return not known and any(p.dim() > 1 for p in module.parameters(recurse=False))


def _place(plan: _Plan, name: str, module: nn.Module, chosen: Chosen) -> None:
    """Decide about one module by its graph."""
    try:
        train, evaluate = (
            _program(plan, name, module, chosen.resolved, training) for training in (True, False)
        )
        check_same_sites(train, evaluate)
        _check_names(module, train)
    except CaptureError as error:
        if mentions_product(module):
            _leave(plan, name, module, chosen, str(error))
        return
    several = len(train.decisions) > 1
    for decision in train.decisions:
        left = chosen.config is None and decision.status == "digital"
        plan.sites.append(_site_report(name, decision, several, chosen if left else None))
    if chosen.config is not None and train.sites:
        placement = Placement(name, copy.deepcopy(chosen.config))
        placement.adopt(module, train, evaluate)
        plan.placements[name] = placement


def _check_names(module: nn.Module, program: Program) -> None:
    """Refuse a module that has attributes of the names that its sites need.

    Raises:
        CaptureError: naming the attribute.
    """
    for site in program.sites:
        for name in site.state.all():
            if hasattr(module, name):
                raise CaptureError(f"it has an attribute {name} of its own")


def _site_report(path: str, decision: Decision, several: bool, left: Chosen | None) -> SiteReport:
    """A pass's decision under the module's path; ``left`` where the config decided before it."""
    return SiteReport(
        name=site_name(path, decision.name, several),
        kind=decision.kind,
        weight_shape=decision.weight_shape,
        tile_grid=decision.tile_grid,
        status=decision.status,
        reason=left.reason if left else decision.reason,
        decided_by=decision.decided_by,
        asked=left is not None and left.asked,
    )


def _leave(plan: _Plan, path: str, module: nn.Module, chosen: Chosen, refusal: str) -> None:
    """Report every matrix of a module that stays digital as a whole."""
    closed = any(isinstance(module, kind) for kind in _CLOSED)
    shapes = {
        name: () if nn.parameter.is_lazy(p) else tuple(p.shape)
        for name, p in module.named_parameters(recurse=closed)
    }
    matrices = {name: shape for name, shape in shapes.items() if len(shape) != 1}
    if not matrices and reads_weights(module):
        matrices = {"": ()}  # of a child, it seems; its shape is not to be known
    for name, shape in matrices.items():
        plan.sites.append(
            SiteReport(
                name=".".join(filter(None, (path, name))),
                kind=type(module).__name__,
                weight_shape=shape,
                tile_grid=(0, 0),
                status="digital",
                reason=chosen.reason if chosen.config is None else refusal,
                decided_by="capture",
                asked=chosen.asked,
            )
        )


# --------------------------------------------------------------------------- sharing of graphs


def _program(
    plan: _Plan, name: str, module: nn.Module, config: Resolved | None, training: bool
) -> Program:
    """The program of a module, shared with every module that looks alike."""
    key = (_signature(module), config, training)
    if key not in plan.programs:
        folder = None
        if plan.debug_dir is not None:
            mode = "train" if training else "eval"
            folder = plan.debug_dir / f"{name or type(module).__name__}.{mode}"
        try:
            plan.programs[key] = build(module, config, training, default_pattern(module), folder)
        except CaptureError as error:
            plan.programs[key] = error
    found = plan.programs[key]
    if isinstance(found, CaptureError):
        raise found
    return found


class _Same:
    """An object as part of a key: equal to itself alone, and kept alive by the key."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _signature(module: nn.Module) -> Any:
    """What a module's graph depends on: its code, and all that its code can bake in."""
    tensors = tuple((n, *_look(t)) for n, t in module.named_parameters()) + tuple(
        (n, *_look(t)) for n, t in module.named_buffers()
    )
    private = nn.Module().__dict__.keys()
    modules = tuple(
        (n, type(m), *((k, _constant(v)) for k, v in m.__dict__.items() if k not in private))
        for n, m in module.named_modules()  # a forward may read its children's attributes
    )
    return (forward_of(module), tensors, modules)


def _look(t: Any) -> tuple[Any, ...]:
    return (type(t), tuple(t.shape), tuple(t.stride()), t.dtype)


def _constant(value: Any) -> Any:
    """A value to compare by content where that is safe, by identity elsewhere."""
    if isinstance(value, (type(None), bool, int, float, str)):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_constant(v) for v in value))
    return _Same(value)
