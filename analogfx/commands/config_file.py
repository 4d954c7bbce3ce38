"""Configs in files: one config, or a mapping from patterns for module names to configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from analogfx import recipes
from analogfx.choose import is_config
from analogfx.commands.common import CommandError
from analogfx.config import TorchInferenceRPUConfig, leaves, resolve

RECIPES = {"plain": TorchInferenceRPUConfig, "afm": recipes.afm}
"""By the names that commands take."""


def read_config(name: str) -> Any:
    """A recipe by its name, or what a JSON file holds: what ``analogize`` takes.

    Raises:
        CommandError: there is no such recipe or file, or it is no JSON object.
        ConfigError: a config in it cannot run; all its conflicts are listed.
    """
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if not path.is_file():
        raise CommandError(f"{name}: expected {', '.join(RECIPES)}, or a JSON file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{name} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CommandError(f"{name}: expected a config, or an object of configs by module pattern")
    for config in [data] if is_config(data) else data.values():
        if config is not None:
            resolve(config)
    return data


def flat(config: Any) -> dict[str, Any]:
    """Every field of a config by its dotted name; of a mapping with the pattern in front."""
    if config is None:
        return {"": None}
    if isinstance(config, dict) and not is_config(config):
        return {
            f"{pattern}: {name}".rstrip(": "): value
            for pattern, one in config.items()
            for name, value in flat(one).items()
        }
    whole = config if isinstance(config, TorchInferenceRPUConfig) else _filled(config)
    return dict(leaves(whole.to_dict()))


def _filled(fields: dict[str, Any]) -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig.from_dict({"schema": 1, **fields})
