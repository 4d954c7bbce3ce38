"""Which config each module of a compiled model gets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.choose import Chosen, choose, is_config
from analogfx.config import Resolved
from analogfx.errors import ConfigError, Conflict

_OUTSIDE = Chosen(None, None, "its module is not part of the compiled model")


class Configs:
    """The choice that ``analogize`` would make, by module and by weight."""

    def __init__(self, rpu_config: Any, root: nn.Module | None) -> None:
        """Resolve every config.

        Args:
            root: the compiled model, None for a function, which has no names to choose by.

        Raises:
            ConfigError: a config cannot run, or chooses by names that nothing has.
        """
        self.by_module: Mapping[nn.Module, Chosen] = {}
        self.by_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        patterns = isinstance(rpu_config, Mapping) and not is_config(rpu_config)
        if root is None and (patterns or callable(rpu_config)):
            valid = "one config: a function has no module names to choose by"
            raise ConfigError([Conflict("options['rpu_config']", rpu_config, valid)])
        chosen = choose(root if root is not None else nn.Module(), rpu_config)
        self.for_all = chosen[""] if len({c.resolved for c in chosen.values()}) == 1 else None
        if root is None:
            return
        self.by_module = weakref.WeakKeyDictionary(
            {module: chosen[name] for name, module in root.named_modules()}
        )
        for module, choice in self.by_module.items():
            for weight in module.parameters(recurse=False):
                self.by_weight.setdefault(weight, choice.resolved)

    def of(self, module: nn.Module) -> Chosen:
        """What was chosen for a module."""
        return self.for_all or self.by_module.get(module, _OUTSIDE)

    def same(self, weight: Tensor, resolved: Resolved | None) -> bool:
        """Whether a weight's config is still the one that a graph was compiled for."""
        return self.by_weight.get(weight, resolved) == resolved


_last: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Configs]] = weakref.WeakKeyDictionary()


def configs_of(rpu_config: Any, root: nn.Module | None) -> Configs:
    """The choice for a model, made once for all of its graphs, while it has the same modules."""
    if root is None:
        return Configs(rpu_config, None)
    known, configs = _last.get(root, (None, None))
    if configs is None or known is not rpu_config or {*root.modules()} != {*configs.by_module}:
        _last[root] = rpu_config, configs = rpu_config, Configs(rpu_config, root)
    return configs


def refuse_learned(config: Resolved, weight: str, training: bool) -> None:
    """Refuse a config that wants what an optimizer must own.

    Raises:
        ConfigError: naming the fields.
    """
    other = "an optimizer must own it, so make the model analog with analogfx.analogize()"
    conflicts = []
    if config.has_state and config.learn_range:
        field = "pre_post.input_range.learn_input_range"
        conflicts.append(Conflict(field, True, f"False; for a learned range: {other}"))
    if config.learnable_clip:
        conflicts.append(Conflict("clip.type", "LearnablePerChannel", f"no learned clip: {other}"))
    if config.clip_sigma and training:
        valid = "no clip while training: nothing here sees the optimizer's steps, use analogize()"
        conflicts.append(Conflict("clip.sigma", config.clip_sigma, valid))
    if conflicts:
        raise ConfigError(conflicts, weight)
