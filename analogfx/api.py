"""The verbs: make a model analog, make it digital again."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from tqdm.auto import tqdm

from analogfx.capture import default_pattern, forward_of, mentions_product
from analogfx.config import Resolved, TorchInferenceRPUConfig, as_config, resolve
from analogfx.errors import CaptureError, ConfigError, Conflict
from analogfx.module import (
    AnalogModule,
    Placement,
    Program,
    build,
    check_same_sites,
    close_fast_paths,
    open_fast_paths,
    swap,
    unswap,
)
from analogfx.passes.contract import Decision
from analogfx.report import Report, SiteReport, check_strict

ModelT = TypeVar("ModelT", bound=nn.Module)
Choice = Callable[[str, nn.Module], "tuple[Any, str]"]

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
            name, a glob, or ``re:`` and a regular expression for the whole name, the first match
            wins, and ``None`` or no match leaves a module digital; or a callable of (name,
            module) that returns a config or None. No config is changed or kept.
        inplace: change ``model`` itself; no weight is copied.
        strict: raise if a product with a parameter stays digital without being asked to.
        debug_dir: a folder to write the graph after every pass to, one subfolder for each kind
            of module.

    Returns:
        The analog model; ``model`` itself with ``inplace``.

    Raises:
        ConfigError: a config cannot run; all its conflicts are listed. ``model`` is untouched.
        PlacementError: with ``strict``; ``model`` is untouched.
        CaptureError: the model is analog already.
    """
    choose = _chooser(rpu_config)
    for name, module in model.named_modules():
        if isinstance(module, AnalogModule):
            raise CaptureError(
                f"{name or type(module).__name__} is analog already: pass the digital model, "
                "or what to_digital() gives"
            )
    plan = _plan(model, choose, Path(debug_dir) if debug_dir is not None else None)
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


# ------------------------------------------------------------------------------------ choosing


def _chooser(rpu_config: Any) -> Choice:
    """A function from (name, module) to (config or None, why None)."""
    asked = "left digital by the config"
    if callable(rpu_config):
        return lambda name, module: (rpu_config(name, module), asked)
    if isinstance(rpu_config, Mapping) and not _is_config_dict(rpu_config):
        rules = [(key, _matcher(key), rpu_config[key]) for key in rpu_config]

        def choose(name: str, module: nn.Module) -> tuple[Any, str]:
            for key, matches, config in rules:
                if matches(name):
                    return config, f"left digital by the pattern {key!r}"
            return None, "no pattern of the config matches"

        return choose
    return lambda name, module: (rpu_config, asked)


def _is_config_dict(mapping: Mapping[Any, Any]) -> bool:
    return bool(mapping) and set(mapping) <= {
        "schema",
        *TorchInferenceRPUConfig.__dataclass_fields__,
    }


def _matcher(key: Any) -> Callable[[str], bool]:
    if not isinstance(key, str):
        raise ConfigError([Conflict("rpu_config", key, "a module name, glob or 're:' pattern")])
    if key.startswith("re:"):
        try:
            pattern = re.compile(key[3:])
        except re.error as error:
            valid = f"a regular expression ({error})"
            raise ConfigError([Conflict("rpu_config", key, valid)]) from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: fnmatch.fnmatchcase(name, key)


class _Configs:
    """Configs resolved once each, whoever hands them in how often."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, TorchInferenceRPUConfig, Resolved]] = {}

    def resolve(self, config: Any, module: str) -> tuple[TorchInferenceRPUConfig, Resolved]:
        if id(config) not in self._known:
            try:
                own = as_config(config)
                self._known[id(config)] = (config, own, resolve(own))
            except ConfigError as error:
                raise ConfigError(error.conflicts, module) from None
        return self._known[id(config)][1:]


# ------------------------------------------------------------------------------------ planning


@dataclass
class _Plan:
    """All that analogize() will do, decided before anything is touched."""

    debug_dir: Path | None
    placements: dict[str, Placement] = field(default_factory=dict)
    sites: list[SiteReport] = field(default_factory=list)
    programs: dict[Any, Program | CaptureError] = field(default_factory=dict)


def _plan(model: nn.Module, choose: Choice, debug_dir: Path | None) -> _Plan:
    plan, configs = _Plan(debug_dir), _Configs()
    closed: set[nn.Module] = set()
    modules = list(model.named_modules())
    chosen = []
    for name, module in modules:
        config, reason = choose(name, module)
        resolved = None if config is None else configs.resolve(config, name)
        chosen.append((name, module, resolved, reason))
    for name, module, resolved, reason in tqdm(
        chosen, desc="analogize", unit="module", delay=2, leave=False
    ):
        if module in closed:
            continue
        refusal = next((why for kind, why in _CLOSED.items() if isinstance(module, kind)), None)
        if refusal is not None:
            closed.update(module.modules())
            _leave(plan, name, module, refusal if resolved else reason, asked=resolved is None)
        elif isinstance(module, _SITE_CLASSES) or mentions_product(module):
            _place(plan, name, module, resolved, reason)
    return plan


def _place(
    plan: _Plan,
    name: str,
    module: nn.Module,
    config: tuple[TorchInferenceRPUConfig, Resolved] | None,
    reason: str,
) -> None:
    """Decide about one module by its graph."""
    resolved = config[1] if config else None
    try:
        programs = {
            (training, default_pattern(module)): _program(plan, name, module, resolved, training)
            for training in (True, False)
        }
        check_same_sites(*programs.values())
    except CaptureError as error:
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            _leave(plan, name, module, reason if config is None else str(error), config is None)
        return
    train = programs[True, default_pattern(module)]
    several = len(train.decisions) > 1
    for decision in train.decisions:
        asked = config is None and decision.status == "digital"
        plan.sites.append(_site_report(name, decision, several, reason if asked else None))
    if config is not None and train.sites:
        placement = Placement(len(plan.placements), copy.deepcopy(config[0]))
        placement.adopt(module, programs)
        plan.placements[name] = placement


def _site_report(path: str, decision: Decision, several: bool, asked: str | None) -> SiteReport:
    """A pass's decision under the module's path."""
    named = several or decision.name != "weight"
    return SiteReport(
        name=".".join(filter(None, (path, decision.name if named else ""))) or decision.name,
        kind=decision.kind,
        weight_shape=decision.weight_shape,
        tile_grid=decision.tile_grid,
        status=decision.status,
        reason=asked or decision.reason,
        decided_by=decision.decided_by,
        asked=asked is not None,
    )


def _leave(plan: _Plan, path: str, module: nn.Module, reason: str, asked: bool) -> None:
    """Report every matrix of a module that stays digital as a whole."""
    closed = any(isinstance(module, kind) for kind in _CLOSED)
    for name, parameter in module.named_parameters(recurse=closed):
        shape = () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
        if len(shape) == 1:
            continue
        plan.sites.append(
            SiteReport(
                name=".".join(filter(None, (path, name))),
                kind=type(module).__name__,
                weight_shape=shape,
                tile_grid=(0, 0),
                status="digital",
                reason=reason,
                decided_by="capture",
                asked=asked,
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
