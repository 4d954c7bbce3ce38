"""Checkpoints of AIHWKIT-Lightning and of Analog Foundation Models: in, and back out."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from analogfx.api import analogize, to_digital
from analogfx.choose import choose
from analogfx.compat.lightning.pickles import config_of, read_config, read_tensors
from analogfx.config import TorchInferenceRPUConfig, resolve
from analogfx.errors import CheckpointError, CompatError, abridged, shown
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.metadata import CONFIG, LIGHTNING_CONFIG
from analogfx.modules.sites import named_analog_layers, unwrapped
from analogfx.state import COUNT

ModelT = TypeVar("ModelT", bound=nn.Module)

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
CONVERTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *RECURRENT)
"""What Lightning makes analog: layers of these very classes, not of their subclasses."""

_CELL = re.compile(
    r"(?P<path>(?:.+\.)?)rnn\.layers\.(?P<layer>\d+)(?:\.directions\.(?P<direction>[01]))?"
    r"\.cell\.weight_(?P<which>ih|hh)\.(?P<name>\w+)"
)
"""A parameter of a cell by the path that it has inside Lightning's recurrent layers."""


@dataclass
class _Stored:
    """A checkpoint in memory."""

    place: str
    """What to call it in errors."""
    tensors: OrderedDict[str, Tensor]
    metadata: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    """What a state dict has beside its tensors, by module; configs are our own."""
    config: TorchInferenceRPUConfig | None = None
    """One for all layers, which lay beside the tensors."""

    @property
    def configs(self) -> dict[str, TorchInferenceRPUConfig]:
        """The configs of the metadata, by module."""
        return {
            path: entry[LIGHTNING_CONFIG]
            for path, entry in self.metadata.items()
            if LIGHTNING_CONFIG in entry
        }


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: ModelT,
    rpu_config: Any = None,
    inplace: bool = False,
) -> ModelT:
    """Make a digital model analog as a checkpoint of AIHWKIT-Lightning says, and load its tensors.

    The config of each layer is taken from the checkpoint. Lightning writes one for every direct
    child of the model, the last that it finds inside, and none for ``Conv1d``: a layer without one
    of its own gets that of the child it lies in, else ``rpu_config``, else the checkpoint's only
    one. A layer is analog if the checkpoint has the ranges, or learned clips, that its config
    gives it; if its config gives it neither, all such layers are.

    No pickle is trusted: nothing but tensors, plain data and the classes of configs is read.

    Args:
        source: a file of ``torch.save(model.state_dict())`` or of safetensors; a folder of a
            Hugging Face model, with ``rpu_config`` beside the weights, as Analog Foundation Models
            have it; or a state dict.
        model: digital, of the architecture that Lightning converted. Untouched unless ``inplace``.
        rpu_config: for layers whose config the checkpoint does not tell; what ``analogize`` takes.
        inplace: change ``model`` itself. It is digital again after an error, with the tensors that
            were loaded by then.

    Returns:
        The analog model.

    Raises:
        CheckpointError: the file is damaged, names what a pickle could call, is of another model,
            or does not tell a layer's config.
        ConfigError: a config has fields that analogfx has not, or cannot run.

    Example:
        >>> analog = load("lightning.pt", model)
        >>> analog = load(snapshot_download("ibm-aimc/analog-Llama-3.2-1B-Instruct"), llama)
    """
    stored = _read(source)
    chosen = _chosen(model, stored, rpu_config)
    analog = analogize(model, lambda name, _: chosen.get(name), inplace=inplace)
    try:
        _fill(analog, stored)
    except CheckpointError:
        if inplace:
            to_digital(analog, inplace=True)
        raise
    return analog


def configs(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> dict[str, TorchInferenceRPUConfig]:
    """The configs that a checkpoint of AIHWKIT-Lightning tells, by module.

    Args:
        source: as :func:`load` takes it.

    Example:
        >>> analogfx.set_config(analog, configs("lightning.pt"))
    """
    stored = _read(source)
    return stored.configs or ({} if stored.config is None else {"*": stored.config})


# ------------------------------------------------------------------------------------- reading


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> _Stored:
    if isinstance(source, Mapping):
        return _checked("the state dict", source)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    return _checked(str(path), _read_file(path))


def _read_file(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return read_tensors(path)
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read_folder(folder: Path) -> _Stored:
    """The tensors of a Hugging Face model and the config that lies beside them."""
    tensors: OrderedDict[str, Any] = OrderedDict()
    for path in _tensor_files(folder):
        tensors.update(_checked(str(path), _read_file(path)).tensors)
    stored = _checked(str(folder), tensors)
    if (beside := folder / LIGHTNING_CONFIG).exists():
        stored.config = read_config(beside)
    return stored


def _tensor_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, LookupError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is damaged: {error}") from error
            # A name that leads out of the folder is no name of a file in it.
            return [folder / Path(str(name)).name for name in sorted(names)]
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _checked(place: str, found: Any) -> _Stored:
    """A state dict, with Lightning's paths inside recurrent layers as torch's names."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{place} is a {type(found).__name__}; expected a state dict")
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            inside = " (is it a trainer's checkpoint? pass the state dict inside)"
            raise CheckpointError(
                f"{place}: {shown(key)} is a {type(value).__name__}; expected a state dict, whose "
                f"values are tensors{inside}"
            )
        tensors[_as_torch_names(key)] = value
    stored = _Stored(place, tensors)
    for path, entry in getattr(found, "_metadata", {}).items():
        stored.metadata[path] = dict(entry)
        if LIGHTNING_CONFIG in entry:
            stored.metadata[path][LIGHTNING_CONFIG] = config_of(entry[LIGHTNING_CONFIG])
    return stored


def _as_torch_names(key: str) -> str:
    found = _CELL.fullmatch(key)
    if found is None:
        return key
    reverse = "_reverse" if found["direction"] == "1" else ""
    return f"{found['path']}{found['name']}_{found['which']}_l{found['layer']}{reverse}"


# ---------------------------------------------------------------------------------- which layers


def _chosen(
    model: nn.Module, stored: _Stored, rpu_config: Any
) -> dict[str, TorchInferenceRPUConfig]:
    """The config of every layer that was analog, by its path."""
    known = stored.configs
    given = {}
    if rpu_config is not None:
        given = {path: c.config for path, c in choose(model, rpu_config).items()}
    different = list({config.to_json(): config for config in known.values()}.values())
    only = stored.config or (different[0] if len(different) == 1 else None)
    chosen: dict[str, TorchInferenceRPUConfig] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if type(layer) not in CONVERTED:
            continue
        untold = type(layer) is nn.Conv1d  # Lightning does not say their configs
        told = known.get(path) or known.get(path.partition(".")[0])
        config = told or given.get(path) or only
        if config is None:
            if any(True for _ in _state_keys(stored, path, "input_range", "learnable_weight_clip")):
                raise CheckpointError(
                    f"{stored.place} has ranges of {shown(path)} and does not tell its config: "
                    "pass rpu_config="
                )
        elif _was_analog(stored, path, config, told is not None or path in given or untold):
            chosen[path] = config
    if not chosen:
        raise CheckpointError(
            f"{stored.place} tells of no analog layer of {type(model).__name__}: pass "
            "rpu_config=, or the model that was converted"
        )
    return chosen


def _was_analog(stored: _Stored, path: str, config: TorchInferenceRPUConfig, told: bool) -> bool:
    """Whether a layer was analog, by what an analog layer of its config keeps."""
    resolved = resolve(config)
    if resolved.has_state:
        return any(True for _ in _state_keys(stored, path, "input_range"))
    if resolved.learnable_clip:
        return any(True for _ in _state_keys(stored, path, "learnable_weight_clip"))
    return told or stored.config is not None or not stored.metadata


def _state_keys(stored: _Stored, path: str, *names: str) -> Iterator[str]:
    """Keys of a layer's state, which has the name of a weight behind it in a recurrent layer."""
    prefix = f"{path}." if path else ""
    own = re.compile(f"{re.escape(prefix)}(?:{'|'.join(names)})(?:_[ih]h_l\\d+(?:_reverse)?)?")
    return (key for key in stored.tensors if own.fullmatch(key))


# --------------------------------------------------------------------------------------- filling


def _fill(analog: nn.Module, stored: _Stored) -> None:
    """Give an analog model a checkpoint's tensors."""
    state = OrderedDict(stored.tensors)
    names: dict[int, list[str]] = {}
    for name, value in analog.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    for tied in names.values():
        present = [name for name in tied if name in state]
        for name in present[1:]:
            if not torch.equal(state[name], state[present[0]]):
                raise CheckpointError(
                    f"{stored.place} is of another model: {present[0]!r} and {name!r} differ there "
                    f"and are one tensor in {type(analog).__name__}. Lightning unties weights; "
                    "untie them, too"
                )
        if present:  # files of safetensors hold one of them
            state.update((name, state[present[0]]) for name in tied)
    state._metadata = stored.metadata  # type: ignore[attr-defined]
    try:
        analog.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{stored.place} is of another model: {abridged(str(error))}"
        ) from error


# --------------------------------------------------------------------------------------- writing


def state_dict(analog: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict that AIHWKIT-Lightning's ``convert_to_analog`` of the same model loads.

    Ranges and their statistics have the layer's dtype. Each layer's config, as an object of
    Lightning's class, stands in ``_metadata`` at the layer's own path, where Lightning looks.
    ``noise_model`` and ``drift_compensation``, which Lightning has not, are left out.

    Raises:
        CompatError: Lightning is not installed, or has no such layer or config.
    """
    analog = unwrapped(analog)
    state: Any = analog.state_dict()
    metadata = state._metadata
    for path, layer in named_analog_layers(analog):
        metadata[path].pop(CONFIG, None)
        _check_writable(path, layer)
        config = _lightning_config(layer._analog.config)
        for place in _places(path, layer):
            metadata.setdefault(place, {"version": 1})[LIGHTNING_CONFIG] = config
        prefix = f"{path}." if path else ""
        for site in layer._analog.sites:
            dtype = site.weight(layer).dtype
            for name in site.state.all():
                key = prefix + name
                if key in state:
                    value = state[key]
                    if name == site.state.of(COUNT):
                        value = value.clamp(max=layer._analog.resolved.init_from_data)
                    state[key] = value.to(dtype)
    return state


def save(analog: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`state_dict` with ``torch.save``, for AIHWKIT-Lightning to load.

    There, ``torch.load(path, weights_only=False)`` reads it, since it holds configs.
    """
    torch.save(state_dict(analog), path)


def _check_writable(path: str, layer: AnalogModule) -> None:
    """Refuse what Lightning has not.

    Raises:
        CompatError: naming the layer and what it is.
    """
    found, config = "", layer._analog.resolved
    base: Any = layer
    if layer.digital_class not in CONVERTED:
        found = f"{layer.digital_class.__name__}"
    elif config.max_output_size > 0:
        found = f"mapping.max_output_size = {config.max_output_size}"
    elif isinstance(base, RECURRENT):
        wrong = {
            "batch_first": base.batch_first,
            "proj_size": bool(base.proj_size),
            "nonlinearity='relu'": getattr(base, "nonlinearity", "tanh") == "relu",
            "a learned clip in a recurrent layer": config.learnable_clip,
        }
        found = next((name for name, has in wrong.items() if has), "")
    elif not isinstance(base, nn.Linear):
        wrong = {
            "groups": base.groups != 1,
            "dilation": not isinstance(base, nn.Conv2d) and set(base.dilation) != {1},
            "a padding by name": isinstance(base.padding, str),
            f"padding_mode={base.padding_mode!r}": base.padding_mode != "zeros",
        }
        found = next((f"{name} in a convolution" for name, has in wrong.items() if has), "")
    if found:
        raise CompatError(f"{path or type(layer).__name__}: AIHWKIT-Lightning has no {found}")


def _places(path: str, layer: AnalogModule) -> Iterator[str]:
    """Paths at which Lightning looks for a layer's config."""
    yield path
    base: Any = layer
    if not isinstance(base, RECURRENT):
        return
    for number in range(base.num_layers):
        for direction in (".directions.0", ".directions.1") if base.bidirectional else ("",):
            for which in ("ih", "hh"):
                inside = f"rnn.layers.{number}{direction}.cell.weight_{which}"
                yield f"{path}.{inside}" if path else inside


def _lightning_config(config: TorchInferenceRPUConfig) -> Any:
    """An object of Lightning's class with the fields of one of ours."""
    try:
        theirs = importlib.import_module("aihwkit_lightning.simulator.configs")
    except ImportError as error:
        raise CompatError(
            "a state dict for AIHWKIT-Lightning holds its configs: install aihwkit-lightning"
        ) from error
    return _copied(config, theirs.TorchInferenceRPUConfig())


def _copied(ours: Any, theirs: Any) -> Any:
    """Lightning's object with the values of ours in the fields that it has."""
    for item in fields(theirs):
        value, current = getattr(ours, item.name), getattr(theirs, item.name)
        if is_dataclass(current):
            _copied(value, current)
        elif isinstance(value, Enum):
            # The kind of a deprecated field, which has its default, warns when it is called.
            if value.value != current.value:
                setattr(theirs, item.name, type(current)(value.value))
        else:
            setattr(theirs, item.name, value)
    return theirs
