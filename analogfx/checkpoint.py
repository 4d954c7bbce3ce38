"""Analog models on disk: safetensors for the tensors, JSON for the configs, nothing pickled."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from analogfx.api import analogize
from analogfx.config import TorchInferenceRPUConfig, resolve
from analogfx.errors import CheckpointError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import unwrapped

ModelT = TypeVar("ModelT", bound=nn.Module)

SCHEMA = 1
CONFIG_FILE = "analogfx.json"
_TENSOR_FILE = re.compile(r"model-[0-9a-f]{8}\.safetensors")


def save(analog: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write an analogized model to a folder.

    ``model-<checksum>.safetensors`` holds parameters and buffers, tied ones once;
    ``analogfx.json`` the config of every analog module and the name and checksum of the tensors'
    file. What was saved there before is valid until ``analogfx.json`` is replaced, in one step,
    and removed afterwards; so an interrupted save leaves a checkpoint that loads.

    Args:
        analog: what ``analogize`` returned, compiled or in a data-parallel wrapper, too.
        directory: made if it does not exist.
    """
    analog = unwrapped(analog)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    configs: list[dict[str, Any]] = []
    modules: dict[str, int] = {}
    for name, module in analog.named_modules():
        if isinstance(module, AnalogModule):
            config = module._analog.config.to_dict()
            if config not in configs:
                configs.append(config)
            modules[name] = configs.index(config)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        tensors = Path(scratch, "model.safetensors")
        save_model(analog, str(tensors), metadata={"format": "pt"})
        checksum = _sha256(tensors)
        place = folder / f"model-{checksum[:8]}.safetensors"
        record = {
            "schema": SCHEMA,
            "tensors": {"file": place.name, "sha256": checksum},
            "configs": configs,
            "modules": modules,
        }
        text = Path(scratch, CONFIG_FILE)
        text.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(tensors, place)
        os.replace(text, folder / CONFIG_FILE)
    for file in folder.iterdir():
        if _TENSOR_FILE.fullmatch(file.name) and file != place:
            file.unlink()


def load(model: ModelT, directory: str | os.PathLike[str], inplace: bool = False) -> ModelT:
    """Analogize a fresh digital model as a folder says, and give it the folder's tensors.

    Args:
        model: digital, of the architecture that was saved. Untouched unless ``inplace``; left as
            it was if anything is wrong with the folder.
        directory: what :func:`save` wrote.
        inplace: change ``model`` itself.

    Returns:
        The analog model.

    Raises:
        CheckpointError: the folder is missing something, damaged, of another schema, or made for
            another model.
    """
    folder = Path(directory)
    record = _read(folder)
    tensors = folder / record["tensors"]["file"]
    names = {name for name, _ in model.named_modules()}
    absent = sorted(set(record["modules"]) - names)
    if absent:
        raise CheckpointError(
            f"{folder}: made for a model with the module {absent[0]!r}, "
            f"which {type(model).__name__} has not"
        )
    configs = [TorchInferenceRPUConfig.from_dict(c) for c in record["configs"]]
    chosen = {name: configs[number] for name, number in record["modules"].items()}
    # Tried on a model without memory first: the given one is only touched if all fits.
    trial = analogize(_on_meta(model), lambda name, _: chosen.get(name), inplace=True)
    _check_fit(trial, tensors)
    became = {name for name, module in trial.named_modules() if isinstance(module, AnalogModule)}
    if became != set(chosen):
        name = sorted(became ^ set(chosen))[0]
        raise CheckpointError(
            f"{folder}: {name!r} of {type(model).__name__} does not become analog"
        )
    analog = analogize(model, lambda name, _: chosen.get(name), inplace=inplace)
    load_model(analog, str(tensors))
    return analog


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """The folder's record, once it and the tensors have proved whole."""
    try:
        record = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} has schema {record['schema']!r}; "
                f"this version reads {SCHEMA}"
            )
        file, checksum = record["tensors"]["file"], record["tensors"]["sha256"]
        if not _TENSOR_FILE.fullmatch(file):
            raise ValueError(f"{file!r} is no name of a file of tensors")
        configs, modules = record["configs"], record["modules"]
        for number in modules.values():
            configs[number]
        for config in configs:
            resolve(TorchInferenceRPUConfig.from_dict(config))
    except OSError:
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}; expected a folder that analogfx.save() wrote"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder}: no {file}")
    if _sha256(folder / file) != checksum:
        raise CheckpointError(f"{folder / file} is damaged: its checksum does not match")
    return record


def _on_meta(model: ModelT) -> ModelT:
    """A copy of a model whose tensors have no memory, ties kept."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _check_fit(analog: nn.Module, tensors: Path) -> None:
    """Refuse tensors that are not those of the model, by name and shape."""
    state = analog.state_dict(keep_vars=True)
    try:
        with safe_open(str(tensors), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{tensors} is damaged: {error}") from error
    held = {id(state[key]) for key in shapes if key in state}  # tied tensors are stored once
    missing = [key for key, value in state.items() if key not in shapes and id(value) not in held]
    for kind, keys in (("lacks", missing), ("has unknown", sorted(set(shapes) - set(state)))):
        if keys:
            raise CheckpointError(
                f"{tensors} is of another model: it {kind} {keys[0]!r} and {len(keys) - 1} more"
            )
    for key, shape in shapes.items():
        if shape != tuple(state[key].shape):
            raise CheckpointError(
                f"{tensors} is of another model: {key!r} is {list(shape)} there and "
                f"{list(state[key].shape)} in {type(analog).__name__}"
            )
