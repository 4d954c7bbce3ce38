"""What analogize() will do to a model, decided before anything is touched."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from tqdm.auto import tqdm

from analogfx.adapters import adapters_of, in_weight
from analogfx.choose import Chosen
from analogfx.config import Resolved
from analogfx.errors import CaptureError
from analogfx.modules import reads
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.capture import (
    default_pattern,
    forward_of,
    may_multiply,
    multiplied,
    reads_weights,
)
from analogfx.modules.closed import CALLING_ALONE, refusal
from analogfx.modules.inherited import inherited_layer, seen_as
from analogfx.modules.placement import Placement
from analogfx.modules.program import Program
from analogfx.modules.untraced import build_or_run, of_both_modes
from analogfx.passes.contract import Decision, SiteReport
from analogfx.passes.pipeline import Pass

_SITE_CLASSES = (nn.Linear, _ConvNd)
_LATER = Chosen(None, None, "put there after analogize()")


@dataclass
class Plan:
    """All that analogize() will do."""

    debug_dir: Path | None
    passes: tuple[Pass, ...] = ()
    """The caller's own."""
    placements: dict[str, Placement] = field(default_factory=dict)
    reports: dict[str, list[SiteReport]] = field(default_factory=dict)
    """What was decided about the products of each module, by its path."""
    programs: dict[Any, Program | CaptureError] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """What was decided about every product."""
        return tuple(report for reports in self.reports.values() for report in reports)


def make_plan(
    model: nn.Module,
    chosen: Mapping[str, Chosen],
    debug_dir: Path | None,
    passes: Sequence[Pass] = (),
) -> Plan:
    """Decide about every module of a model; nothing of it is touched.

    Args:
        chosen: by the module's path; modules that are not there were put there afterwards.
        debug_dir: where to write the graph after every pass.
        passes: the caller's own, for the graph with one node for every role.

    Raises:
        PassError: one of ``passes`` failed.
    """
    plan = Plan(debug_dir, tuple(passes))
    closed: set[nn.Module] = set()
    modules = list(model.named_modules())
    for name, module in tqdm(modules, desc="analogize", unit="module", delay=2, leave=False):
        if isinstance(module, ParametrizationList):
            closed.update(module.modules())  # they compute weights
        if module in closed:
            continue
        if in_weight(module):  # what it multiplies by is its base's, which is listed
            closed.update(adapter for _, adapter in adapters_of(module))
            continue
        its = chosen.get(name, _LATER)
        why = refusal(module)
        if why is not None:
            closed.update(module.modules())
            _leave(plan, name, module, its, why)
        elif isinstance(module, AnalogModule):
            module._analog.follow(module)
            _list(plan, name, module._analog.decisions, its)
            _list_left(plan, name, module._analog)
            for path, reason in module._analog.unforeseen.items():
                _leave(plan, name, module, its, reason, [path])
            _leave_others(plan, name, module, its, module.inherited)
        elif _may_multiply(module):
            _place(plan, name, module, its)
    return plan


def _may_multiply(module: nn.Module) -> bool:
    """Whether to look at a module's graph for products."""
    if forward_of(module) in CALLING_ALONE:
        return False
    if isinstance(module, _SITE_CLASSES) or may_multiply(module):
        return True
    # A product may hide in code that its own does not name; torch's other layers are known.
    known = type(module).__module__.startswith("torch.nn.modules.")
    own = any(p.dim() > 1 for p in module.parameters(recurse=False))
    return not known and (own or reads_weights(module))


def _place(
    plan: Plan,
    name: str,
    module: nn.Module,
    chosen: Chosen,
    inherited: type[nn.Module] | None = None,
) -> None:
    """Decide about one module by its graph, or by that of a layer whose forward its own calls."""
    seen = module if inherited is None else seen_as(module, inherited)
    try:
        train, evaluate = of_both_modes(
            *(program_of(plan, name, seen, chosen.resolved, training) for training in (True, False))
        )
        _check_names(module, train)
    except CaptureError as error:
        layer = inherited_layer(module) if inherited is None else None
        if layer is None:
            _leave(plan, name, module, chosen, str(error), multiplied(module))
        else:
            _place(plan, name, module, chosen, layer)
            _leave_others(plan, name, module, chosen, layer)
        return
    _list(plan, name, train.decisions, chosen)
    if chosen.config is not None and (train.sites or train.delegates):
        placement = Placement(name, copy.deepcopy(chosen.config), plan.passes)
        placement.inherited = inherited
        placement.adopt(seen, train, evaluate)
        plan.placements[name] = placement


def _list(plan: Plan, name: str, decisions: Sequence[Decision], chosen: Chosen) -> None:
    """Report what was decided about a module's products."""
    for decision in decisions:
        left = chosen.config is None and decision.status == "digital"
        several = len(decisions) > 1
        plan.reports.setdefault(name, []).append(
            _site_report(name, decision, several, chosen if left else None)
        )


def _list_left(plan: Plan, name: str, placement: Placement) -> None:
    """Report that an analog module's products were digital in calls that could not be traced."""
    analog = [s for s in plan.reports.get(name, ()) if s.status == "analog"]
    for why in dict.fromkeys(placement.left.values()) if analog else ():
        plan.reports[name] += [
            replace(s, status="digital", tile_grid=(0, 0), reason=f"in some calls: {why}",
                    decided_by="capture")
            for s in analog
        ]  # fmt: skip


def _check_names(module: nn.Module, program: Program) -> None:
    """Refuse a module that has attributes of the names that its sites need.

    Raises:
        CaptureError: naming the attribute.
    """
    for site in program.sites:
        for name in site.state.all():
            if hasattr(module, name):
                raise CaptureError(f"it has an attribute {name} of its own")


def site_name(module: str, parameter: str, several: bool) -> str:
    """The name of a site: its module's path, and what it multiplies by where that is not clear.

    Args:
        parameter: the parameter's name from the module.
        several: whether the module has more than one product.
    """
    named = several or parameter != "weight"
    return ".".join(filter(None, (module, parameter if named else ""))) or parameter


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
        where=decision.where,
        asked=left is not None and left.asked,
        parameter=".".join(filter(None, (path, decision.name))),
        module=path,
    )


def _leave(
    plan: Plan,
    path: str,
    module: nn.Module,
    chosen: Chosen,
    why: str,
    names: Collection[str] | None = None,
) -> None:
    """Report matrices of a module that stay digital.

    Args:
        names: of the matrices, from the module; None for all that it and what is inside it hold.
    """
    shapes = {
        name: () if nn.parameter.is_lazy(p) else tuple(p.shape)
        for name, p in module.named_parameters()
        if names is None or name in names
    }
    matrices = {name: shape for name, shape in shapes.items() if len(shape) != 1}
    for name, shape in matrices.items():
        plan.reports.setdefault(path, []).append(
            SiteReport(
                name=".".join(filter(None, (path, name))),
                kind=type(module).__name__,
                weight_shape=shape,
                tile_grid=(0, 0),
                status="digital",
                reason=chosen.reason if chosen.config is None else why,
                decided_by="capture",
                asked=chosen.asked,
                parameter=".".join(filter(None, (path, name))),
                module=path,
            )
        )


def _leave_others(
    plan: Plan, path: str, module: nn.Module, chosen: Chosen, layer: type[nn.Module] | None
) -> None:
    """Report what a module may multiply by besides the product of the layer that it inherits."""
    if layer is not None:
        state = module._analog.state_names() if isinstance(module, AnalogModule) else ()
        listed = {site.name for site in plan.reports.get(path, ())}
        listed |= {site_name(path, name, several=False) for name in state}
        why = f"read in a forward that cannot be traced, beside that of nn.{layer.__name__}"
        # Its own forward, above the one that is traced.
        own = getattr(module, "digital_class", type(module)).forward
        read = reads.multiplied(module, own, {})
        names = {n for n in read if site_name(path, n, several=False) not in listed}
        _leave(plan, path, module, chosen, why, names)


# --------------------------------------------------------------------------- sharing of graphs


def program_of(
    plan: Plan, name: str, module: nn.Module, config: Resolved | None, training: bool
) -> Program:
    """The program of a module, shared with every module that looks alike."""
    key = (_signature(module), config, training)
    if key not in plan.programs:
        folder = None
        if plan.debug_dir is not None:
            mode = "train" if training else "eval"
            folder = plan.debug_dir / f"{name or type(module).__name__}.{mode}"
        try:
            pattern = default_pattern(module)
            plan.programs[key] = build_or_run(
                module, config, training, pattern, folder, plan.passes
            )
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
    private = nn.Module().__dict__.keys() | {"_analog"}
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
