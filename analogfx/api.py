"""The verbs: make a model analog, make it digital again."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from analogfx import integrations
from analogfx.choose import choose
from analogfx.errors import CaptureError, PlacementError
from analogfx.log import logger
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.fast_paths import close_fast_paths, open_fast_paths
from analogfx.modules.plan import make_plan
from analogfx.modules.remember import make_state
from analogfx.modules.swap import swap, unswap
from analogfx.passes.pipeline import Pass
from analogfx.report import Report, check_strict, forget_choice, remember_choice
from analogfx.shards import is_sharded

ModelT = TypeVar("ModelT", bound=nn.Module)


def analogize(
    model: ModelT,
    rpu_config: Any,
    inplace: bool = False,
    strict: bool = False,
    debug_dir: str | Path | None = None,
    passes: Sequence[Pass] = (),
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
        passes: passes of your own, ``(graph, context) -> int``, which run over the graph of every
            module with a site, where a site is one node for every role. A checkpoint does not hold
            them: give them to :func:`load` again.

    Returns:
        The analog model; ``model`` itself with ``inplace``. A model in which no product became
        analog, though a config was given, is a warning.

    Raises:
        TypeError: ``model`` is no module.
        ConfigError: a config cannot run; all its conflicts are listed. ``model`` is untouched.
        PlacementError: with ``strict``; ``model`` is untouched.
        CaptureError: the model is analog already.
        PassError: one of ``passes`` failed; ``model`` is untouched.
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
    plan = make_plan(model, chosen, Path(debug_dir) if debug_dir is not None else None, passes)
    if strict:
        check_strict(Report(plan.sites))
    if not plan.placements and any(choice.config is not None for choice in chosen.values()):
        why = f"{len(plan.sites)} stay digital, see report()" if plan.sites else "it has none"
        warnings.warn(f"no product of {type(model).__name__} became analog: {why}", stacklevel=2)
    analog = model if inplace else copy.deepcopy(model)
    modules = dict(analog.named_modules())
    state = {
        name: make_state(modules[name], placement.sites, placement.resolved)
        for name, placement in plan.placements.items()
    }
    for name, placement in plan.placements.items():
        swap(modules[name], placement, state[name])
    for name, placement in plan.placements.items():
        placement.watch(modules[name])  # what it reads may be of modules that were swapped later
    close_fast_paths(analog)
    remember_choice(analog, chosen)
    integrations.became_analog(analog)
    if logger.isEnabledFor(logging.INFO):
        analog_products = sum(s.status == "analog" for s in plan.sites)
        logger.info("analogize: %d of %d products analog", analog_products, len(plan.sites))
    return analog


def to_digital(analog: ModelT, inplace: bool = False) -> ModelT:
    """The digital model back: classes, parameter names and ties as before analogize().

    Weights are what they are now; ranges and learned clips are dropped.

    Args:
        inplace: change ``analog`` itself; no weight is copied.

    Raises:
        PlacementError: ranges or clips of the model are in the units of ``fully_shard``.
    """
    for name, module in analog.named_modules():
        if isinstance(module, AnalogModule):
            for own in module._analog.state_names():
                if (tensor := module._parameters.get(own)) is not None and is_sharded(tensor):
                    raise PlacementError(
                        f"{name}.{own} is part of a unit of fully_shard, which would look for it: "
                        "save() and load() the model dense, or leave ranges out of units by "
                        "analogfx.distributed.fully_shard_policy"
                    )
    digital = analog if inplace else copy.deepcopy(analog)
    for module in list(digital.modules()):
        if isinstance(module, AnalogModule):
            unswap(module)
    open_fast_paths(digital)
    forget_choice(digital)
    integrations.became_digital(digital)
    return digital
