"""What a file says of an analog model besides its tensors: the config of every analog module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from analogfx.config import TorchInferenceRPUConfig, resolve
from analogfx.errors import shown
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import HOLDERS
from analogfx.passes.pipeline import pass_name

_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Under what name torch.compile and torch's module wrappers keep the module inside."""


@dataclass(frozen=True)
class Manifest:
    """The configs of a model, by module."""

    configs: dict[str, TorchInferenceRPUConfig]
    passes: list[str]
    """Names of the caller's passes that the model was made with."""


def manifest_of(analog: nn.Module) -> dict[str, Any]:
    """The manifest of a model as plain data: each config once, and which one each module has."""
    configs: list[dict[str, Any]] = []
    modules: dict[str, int] = {}
    passes: list[str] = []
    paths = paths_of(analog)
    for name, module in analog.named_modules():
        if isinstance(module, AnalogModule):
            config = module._analog.config.to_dict()
            if config not in configs:
                configs.append(config)
            modules[paths[name]] = configs.index(config)
            passes = passes or [pass_name(step) for step in module._analog.passes]
    made = {"passes": passes} if passes else {}
    return {"configs": configs, "modules": modules} | made


def read_manifest(data: Mapping[str, Any]) -> Manifest:
    """What :func:`manifest_of` gave; other entries are left alone.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is not, or a config cannot run.
    """
    numbers = data["modules"].values()
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a number of a config is none")
    passes = data.get("passes", [])
    if not isinstance(passes, list) or not all(isinstance(name, str) for name in passes):
        raise ValueError("the passes are no list of names")
    configs = [TorchInferenceRPUConfig.from_dict(config) for config in data["configs"]]
    for config in configs:
        resolve(config)
    if beyond := [n for n in numbers if n >= len(configs)]:
        raise ValueError(f"there is no config {shown(beyond[0])}")
    return Manifest({name: configs[n] for name, n in data["modules"].items()}, passes)


def paths_of(model: nn.Module) -> dict[str, str]:
    """The path of every module, and what it is without the wrappers that it lies in."""
    found: dict[str, str] = {}

    def visit(module: nn.Module, raw: str, path: str) -> None:
        found[raw] = path
        parallel = isinstance(module, HOLDERS)
        for name, child in module._modules.items():
            if child is not None:
                inside = name in _WRAPPED or (parallel and name == "module")
                visit(child, _join(raw, name), path if inside else _join(path, name))

    visit(model, "", "")
    return found


def clean(key: str, paths: dict[str, str]) -> str:
    """A state dict's key by the path without wrappers of its module."""
    path, _, name = key.rpartition(".")
    return _join(paths.get(path, path), name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
