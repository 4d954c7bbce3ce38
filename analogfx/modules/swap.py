"""There and back: a module's class is swapped for its analog subclass, and for its own again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from analogfx.modules.analog_module import AnalogModule, analog_class, finish_load
from analogfx.modules.parallel import DISTRIBUTED
from analogfx.modules.placement import Placement
from analogfx.modules.remember import forget_state, register_state, renew_notes


def swap(module: nn.Module, placement: Placement, state: Mapping[str, Tensor]) -> None:
    """Make a module analog in place; nothing here can fail but a cut for tensor parallelism.

    Args:
        placement: has programs with sites.
        state: what the sites remember, see :func:`analogfx.modules.remember.make_state`.
    """
    module._analog = placement  # type: ignore[assignment]
    cls = type(module)
    injected = parametrize.is_parametrized(module) and cls.__dict__.get("__getstate__") is not None
    # A class that parametrizations put on top stays on top, where they look for it.
    below = cls.__bases__[0] if injected else cls
    module.__class__ = _rebased(cls, below, analog_class(below, placement.inherited))
    module.register_load_state_dict_post_hook(finish_load)
    register_state(module, state)
    if DISTRIBUTED in module.__dict__:
        placement.distribute(module)


def unswap(module: AnalogModule) -> None:
    """Make an analog module digital again in place."""
    placement = module._analog
    renew_notes(module, placement.sites, replace(placement.resolved, collects=False))
    forget_state(module, placement.state_names())
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is finish_load]:
        del hooks[key]
    digital = module.digital_class
    analog = analog_class(digital, module.inherited)
    module.__class__ = _rebased(type(module), analog, digital)
    del module._analog


def _rebased(cls: Any, old: Any, new: Any) -> Any:
    """A class with another one in the place of one of its bases; the new one if it is that."""
    if cls is old:
        return new
    bases = tuple(_rebased(b, old, new) if issubclass(b, old) else b for b in cls.__bases__)
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    name = cls.__name__.replace(old.__name__, new.__name__)
    return type(cls)(name, bases, members)
