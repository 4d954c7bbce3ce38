"""AIHWKIT-Lightning's pickled files, read without running anything that is in them.

A pickle names functions to call. These readers know two kinds of name: what torch's own
``weights_only`` reader admits to rebuild tensors, and the classes of Lightning's configs, in whose
place stand the two classes below, which hold what they are given. Lightning need not be installed.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch

from analogfx import files
from analogfx.config import TorchInferenceRPUConfig, as_config
from analogfx.errors import CheckpointError, abridged, shown

CONFIG_BYTES = 1 << 20
"""Of the longest pickled config that is read; Lightning's have four thousand."""


class Fields:
    """What a pickle holds of a config or of a section of one: attributes, none of them checked."""


class Label:
    """What a pickle holds of a member of an enumeration."""

    def __init__(self, value: Any) -> None:
        self.value = value


_SECTIONS = (
    "TorchInferenceRPUConfig",
    "IOParameters",
    "InputRangeParameter",
    "MappingParameter",
    "PrePostProcessingParameter",
    "WeightClipParameter",
    "WeightModifierParameter",
)
_ENUMERATIONS = (
    "WeightClipType",
    "WeightModifierType",
    "WeightNoiseInjectionType",
    "WeightQuantizationType",
)
_MODULES = (
    "configs",
    "configs.configs",
    "parameters",
    "parameters.enums",
    "parameters.inference",
    "parameters.io",
    "parameters.mapping",
    "parameters.pre_post",
)
STAND_INS: dict[str, Any] = {
    f"aihwkit_lightning.simulator.{module}.{name}": stand_in
    for module in _MODULES
    for names, stand_in in ((_SECTIONS, Fields), (_ENUMERATIONS, Label))
    for name in names
}
"""What stands for each class of a config, by the class's full name."""


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, or names anything but tensors, containers of plain
            data and configs.
    """
    try:
        with torch.serialization.safe_globals([(s, name) for name, s in STAND_INS.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error)):
            _refuse(str(path), found[1], error)
        raise CheckpointError(
            f"{path}: refused, since torch's weights_only reader refuses it; expected what "
            "torch.save writes of a state_dict(). Nothing of the file was run"
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        raise CheckpointError(f"{path} is damaged: {abridged(str(error))}") from error


def read_config(path: Path) -> TorchInferenceRPUConfig:
    """A config that was pickled by itself, as Analog Foundation Models have it beside the weights.

    Raises:
        CheckpointError: the file cannot be read, or names anything but the classes of a config.
        ConfigError: the config has fields that analogfx has not.
    """
    try:
        data = files.read_whole(path, CONFIG_BYTES)
        found = _Reader(path, data).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        raise CheckpointError(f"{path} is no pickled config: {abridged(str(error))}") from error
    return config_of(found)


class _Reader(pickle.Unpickler):
    """Python's own, which finds no name but those of configs."""

    def __init__(self, path: Path, data: bytearray) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class; everything else is refused."""
        found = STAND_INS.get(f"{module}.{name}")
        if found is None:
            _refuse(str(self._path), f"{module}.{name}")
        return found


def _refuse(path: str, name: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        f"{path}: refused, since it names {shown(name)}, which a pickle could call; expected "
        "tensors and configs of AIHWKIT-Lightning alone. Nothing of the file was run"
    ) from cause


def config_of(found: Any) -> TorchInferenceRPUConfig:
    """A config of our own of one of Lightning's, in memory or as these readers give it.

    Fields of older versions that analogfx has not are left out where they are off.

    Raises:
        ConfigError: it is no config, has a field that is on and that analogfx has not, or a value
            of the wrong kind.
    """
    return as_config(_known(TorchInferenceRPUConfig(), _plain(found)), warn=False)


_DEPTH = 4
"""Sections inside sections of a config, and one to spare."""


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """Nested dicts of what a config holds, no deeper than a config is."""
    nested = isinstance(value, Fields) or (is_dataclass(value) and not isinstance(value, type))
    if nested and depth:
        return {name: _plain(inner, depth - 1) for name, inner in vars(value).items()}
    return value.value if isinstance(value, (Label, Enum)) else value


def _known(section: Any, values: Any) -> Any:
    """The fields that a section has, and those that it has not and that are on."""
    if not isinstance(values, dict):
        return values
    names = {item.name for item in fields(section)}
    return {
        name: _known(getattr(section, name), value)
        if is_dataclass(getattr(section, name, None))
        else value
        for name, value in values.items()
        if name in names or value
    }
