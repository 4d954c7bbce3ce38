"""Another config for a model that is analog already."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from analogfx.choose import UNMATCHED, choose
from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import ConfigError, Conflict
from analogfx.log import logger
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.placement import Placement
from analogfx.modules.program import other_sites
from analogfx.modules.remember import fit_state
from analogfx.modules.sites import required_sites, unwrapped
from analogfx.report import update_choice
from analogfx.state import VARIABLES


def set_config(analog: nn.Module, rpu_config: Any) -> None:
    """Change the config of a trained analog model, in place.

    Weights stay, and so does what a layer remembers (input ranges, their statistics, learned clips)
    where the new config remembers it, too, in the same shape: of tiles of other sizes it starts
    anew. What is new starts as ``analogize`` starts it; parameters that are new are not known to an
    optimizer that was made before.

    Args:
        analog: what ``analogize`` or ``load`` returned, compiled or in a data-parallel wrapper,
            too.
        rpu_config: what ``analogize`` takes. Of a mapping, layers that no key matches keep theirs.

    Raises:
        ConfigError: a config cannot run, or would make an analog layer digital: for that, make
            the model digital and analogize it again. No layer is changed.
        CaptureError: a forward that multiplies by other parameters with another config. No layer is
            changed.
        TypeError: the model has no analog layer.

    Example:
        >>> analogfx.set_config(analog, {"head": fine, "*": coarse})
    """
    analog = unwrapped(analog)
    modules = {path: module for path, module, _ in required_sites(analog)}
    chosen = choose(analog, rpu_config)
    wanted: dict[str, Placement] = {}
    for path, module in modules.items():
        config = chosen[path].config
        if config is not None:
            wanted[path] = _planned(module, config)
        elif chosen[path] is not UNMATCHED:
            valid = "a config; to make a layer digital, use to_digital() and analogize() again"
            raise ConfigError([Conflict("rpu_config", None, valid)], path)
    for path, placement in wanted.items():  # nothing here can fail
        _take(modules[path], placement)
    update_choice(analog, {path: chosen[path] for path in wanted})
    logger.info("set_config: %d of %d analog layers", len(wanted), len(modules))


def _planned(module: AnalogModule, config: TorchInferenceRPUConfig) -> Placement:
    """What a module will be with a config; the module is untouched."""
    before = module._analog
    planned = Placement(before.name, config)
    planned.prepare(module)
    if [(s.name, s.state) for s in before.sites] != [(s.name, s.state) for s in planned.sites]:
        raise other_sites(before.sites, planned.sites)
    return planned


def _take(module: AnalogModule, planned: Placement) -> None:
    """Give a module its new config, and what that remembers."""
    placement = module._analog
    old, new = placement.resolved, planned.resolved
    fit_state(module, placement.sites, planned.sites, new)
    for site in planned.sites:
        for variable in VARIABLES:
            state = getattr(module, site.state.of(variable), None)
            if state is None or variable.trained is None:
                continue
            # A parameter that somebody froze stays frozen where the configs agree.
            if variable.trained(old) != variable.trained(new):
                state.requires_grad_(variable.trained(new))
    train, evaluate = itertools.islice(planned.programs.values(), 2)
    placement.config, placement.resolved = planned.config, new
    placement.adopt(module, train, evaluate)
