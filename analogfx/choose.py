"""Which config each module of a model gets, resolved and refused before anything is touched."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from analogfx.config import Resolved, TorchInferenceRPUConfig, as_config, resolve
from analogfx.errors import ConfigError, Conflict


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one module."""

    config: TorchInferenceRPUConfig | None
    """A copy of the config; None leaves the module digital."""
    resolved: Resolved | None
    reason: str = ""
    """Why the module stays digital, if it does."""
    asked: bool = False
    """Whether it stays digital because somebody said so."""


_UNMATCHED = Chosen(None, None, "no pattern of the config matches", asked=True)


def choose(model: nn.Module, rpu_config: Any) -> dict[str, Chosen]:
    """The config of every module of a model, by the module's name.

    Args:
        rpu_config: see :func:`analogfx.analogize`.

    Raises:
        ConfigError: a config cannot run, or a pattern is none. A pattern that matches no module
            is a warning.
    """
    if isinstance(rpu_config, type):
        raise ConfigError([Conflict("rpu_config", rpu_config, f"{rpu_config.__name__}(), made")])
    modules = list(model.named_modules())
    if isinstance(rpu_config, Mapping) and not is_config(rpu_config):
        return _by_pattern(rpu_config, [name for name, _ in modules])
    if callable(rpu_config):
        return {name: _chosen(rpu_config(name, module), name) for name, module in modules}
    chosen = _chosen(rpu_config, "")
    return {name: chosen for name, _ in modules}


def _chosen(config: Any, module: str, reason: str = "left digital by the config") -> Chosen:
    if config is None:
        return Chosen(None, None, reason, asked=True)
    try:
        own = as_config(config)
        return Chosen(own, resolve(own))
    except ConfigError as error:
        raise ConfigError(error.conflicts, module) from None


def is_config(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping has a config's fields, and not patterns."""
    known = {"schema", *TorchInferenceRPUConfig.__dataclass_fields__}
    return bool(mapping) and set(mapping) <= known


def _by_pattern(rules: Mapping[Any, Any], names: list[str]) -> dict[str, Chosen]:
    found: dict[str, Chosen] = {}
    for key, config in rules.items():
        matches = _matcher(key)
        chosen = _chosen(config, key, f"left digital by the pattern {key!r}")
        matched = [name for name in names if matches(name)]
        if not matched:
            warnings.warn(f"the pattern {key!r} matches no module", stacklevel=4)
        for name in matched:
            found.setdefault(name, chosen)  # the first match wins
    return {name: found.get(name, _UNMATCHED) for name in names}


def _matcher(key: Any) -> Callable[[str], bool]:
    """An exact name, with all inside it; a glob; or ``re:`` and a regular expression."""
    if not isinstance(key, str):
        raise ConfigError([Conflict("rpu_config", key, "a module name, glob or 're:' pattern")])
    if key.startswith("re:"):
        try:
            pattern = re.compile(key[3:])
        except re.error as error:
            valid = f"a regular expression ({error})"
            raise ConfigError([Conflict("rpu_config", key, valid)]) from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: fnmatch.fnmatchcase(name, key) or key in _around(name)


def _around(name: str) -> Iterator[str]:
    """The names of the modules that a module lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
