"""Training that leaves its ranges to the optimizer's step, for a whole model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from analogfx.errors import PlacementError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.inherited import seen_as
from analogfx.modules.plan import Plan, program_of
from analogfx.modules.sites import analog_modules


def collect_statistics(model: nn.Module, on: bool, processes: str = "") -> None:
    """Let training forwards note what they see, or (``on=False``) write their ranges again.

    Modules that look alike share what is traced anew for it.

    Args:
        processes: see :attr:`analogfx.config.Resolved.processes`.

    Raises:
        PlacementError: a module's ranges cannot wait for the step; nothing is changed.
    """
    modules = list(analog_modules(model))
    if on:
        for path, module in modules:
            _check(path, module)
    plan = Plan(None)
    for path, module in modules:
        placement = module._analog
        resolved = replace(placement.resolved, collects=on, processes=processes)
        if not resolved.has_state or resolved == placement.resolved:
            continue
        plan.passes = placement.passes
        seen = module if placement.inherited is None else seen_as(module, placement.inherited)
        train, evaluate = (program_of(plan, path, seen, resolved, mode) for mode in (True, False))
        placement.collect(module, resolved, train, evaluate)


def _check(path: str, module: AnalogModule) -> None:
    """Refuse a module whose ranges follow the data expert by expert.

    Raises:
        PlacementError: naming the module.
    """
    placement = module._analog
    if placement.resolved.has_state and any(site.experts for site in placement.sites):
        raise PlacementError(
            f"{path or type(module).__name__}: the ranges of experts are written in every forward, "
            "so prepare_training() cannot keep them equal on several processes. Give this layer a "
            "config without an input range, or train in one process with clip_after_step()"
        )
