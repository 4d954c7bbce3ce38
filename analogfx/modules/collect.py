"""Training that leaves its ranges to the optimizer's step, for a whole model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from analogfx.modules.plan import Plan, program_of
from analogfx.modules.sites import analog_modules


def collect_statistics(model: nn.Module, on: bool, processes: str = "") -> None:
    """Let training forwards note what they see, or (``on=False``) write their ranges again.

    Modules that look alike share what is traced anew for it.

    Args:
        processes: see :attr:`analogfx.config.Resolved.processes`.
    """
    plan = Plan(None)
    for path, module in analog_modules(model):
        placement = module._analog
        resolved = replace(placement.resolved, collects=on, processes=processes)
        if not resolved.has_state or resolved == placement.resolved:
            continue
        train, evaluate = (program_of(plan, path, module, resolved, mode) for mode in (True, False))
        placement.collect(module, resolved, train, evaluate)
