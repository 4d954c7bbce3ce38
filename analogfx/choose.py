"""Which config each module of a model gets, resolved and refused before anything is touched."""

from __future__ import annotations

import fnmatch
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from torch import nn

from analogfx.adapters import hosts
from analogfx.config import Resolved, TorchInferenceRPUConfig, as_config, doubts, resolve
from analogfx.errors import ConfigError, Conflict, shown

LONGEST_KEY = 10_000
"""Characters that a key of a mapping may have: one of 10 MB takes half a minute to compile."""

_SECONDS = 1.0
"""What one regular expression may take for all names of a model; a usual one takes milliseconds."""


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


UNMATCHED = Chosen(None, None, "no pattern of the config matches", asked=True)
"""What no key of a mapping speaks of."""


_ADAPTER = Chosen(
    None, None, "an adapter, left digital: a key of its own makes it analog", asked=True
)
"""What no key means that means the layer as well that an adapter stands beside."""


def choose(model: nn.Module, rpu_config: Any) -> dict[str, Chosen]:
    """The config of every module of a model, by the module's name.

    Adapters of PEFT stay digital, unless a key of a mapping is for them and not for the layer that
    they stand beside as well, or a callable says otherwise.

    Args:
        rpu_config: see :func:`analogfx.analogize`.

    Raises:
        ConfigError: a config cannot run, a pattern is none, is longer than :data:`LONGEST_KEY`, or
            takes more than a second. A pattern that matches no module is a warning, and so is a
            resolution that looks like bits.
    """
    if isinstance(rpu_config, type):
        raise ConfigError([Conflict("rpu_config", rpu_config, f"{rpu_config.__name__}(), made")])
    modules = list(model.named_modules())
    beside = hosts(model)
    if isinstance(rpu_config, Mapping) and not is_config(rpu_config):
        return _by_pattern(rpu_config, [name for name, _ in modules], beside)
    if callable(rpu_config):
        _check_callable(rpu_config)
        return {name: _chosen(rpu_config(name, module), name) for name, module in modules}
    chosen = _chosen(rpu_config, "")
    return {name: _ADAPTER if name in beside else chosen for name, _ in modules}


def _chosen(config: Any, module: str, reason: str = "left digital by the config") -> Chosen:
    if config is None:
        return Chosen(None, None, reason, asked=True)
    if callable(config):
        name = getattr(config, "__name__", type(config).__name__)
        raise ConfigError([Conflict("rpu_config", config, f"{name}(), with parentheses")], module)
    try:
        own = as_config(config)
        resolved = resolve(own)
    except ConfigError as error:
        raise ConfigError(error.conflicts, module) from None
    for doubt in doubts(own):
        warnings.warn(doubt, stacklevel=4)
    return Chosen(own, resolved)


def _check_callable(function: Callable[..., Any]) -> None:
    """Refuse a callable that does not take (name, module), such as a recipe that was not called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in ones have none
        return
    try:
        signature.bind("", None)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        valid = "a callable of (name, module)"
        try:
            signature.bind()
            valid = f"{name}(), with parentheses, or {valid}"
        except TypeError:
            pass
        raise ConfigError([Conflict("rpu_config", function, valid)]) from None


def is_config(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping has a config's fields, and not patterns."""
    known = {"schema", *TorchInferenceRPUConfig.__dataclass_fields__}
    return bool(mapping) and set(mapping) <= known


def _by_pattern(
    rules: Mapping[Any, Any], names: list[str], beside: Mapping[str, str]
) -> dict[str, Chosen]:
    """The first match of every name.

    Args:
        beside: for adapters, the layers that they stand beside.
    """
    found: dict[str, Chosen] = {}
    for key, config in rules.items():
        matched = _matched(key, names)
        chosen = _chosen(config, key, f"left digital by the pattern {shown(key)}")
        if not matched:
            warnings.warn(f"the pattern {shown(key)} matches no module", stacklevel=4)
        among = set(matched)
        for name in matched:
            its = _ADAPTER if config is not None and beside.get(name) in among else chosen
            found.setdefault(name, its)  # the first match wins
    return {name: found.get(name, UNMATCHED) for name in names}


def _matched(key: Any, names: list[str]) -> list[str]:
    """The names that a key means: an exact one, with all inside it; a glob; or ``re:`` ..."""
    if not isinstance(key, str):
        raise ConfigError([Conflict("rpu_config", key, "a module name, glob or 're:' pattern")])
    if len(key) > LONGEST_KEY:
        valid = f"a pattern of at most {LONGEST_KEY:,} characters, not {len(key):,}"
        raise ConfigError([Conflict("rpu_config", key, valid)])
    if key.startswith("re:"):
        return _matched_by_expression(key, names)
    return [name for name in names if fnmatch.fnmatchcase(name, key) or key in _around(name)]


def _matched_by_expression(key: str, names: list[str]) -> list[str]:
    """The names that a regular expression matches as a whole.

    Repeats inside repeats can take longer than the age of the universe, and Python's own ``re``
    cannot be stopped; ``regex`` can.
    """
    try:
        pattern = regex.compile(key[3:])
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        valid = f"a regular expression ({error or type(error).__name__})"
        raise ConfigError([Conflict("rpu_config", key, valid)]) from None
    end = time.monotonic() + _SECONDS
    matched = []
    try:
        for name in names:
            if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3)):
                matched.append(name)
    except TimeoutError:
        valid = (
            f"a regular expression that matches {len(names)} names within {_SECONDS:g} s: "
            "avoid repeats inside repeats, such as (a+)+"
        )
        raise ConfigError([Conflict("rpu_config", key, valid)]) from None
    return matched


def _around(name: str) -> Iterator[str]:
    """The names of the modules that a module lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
