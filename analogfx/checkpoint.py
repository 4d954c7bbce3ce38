"""Analog models on disk: safetensors for the tensors, JSON for the configs, nothing pickled."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from analogfx import files, shards
from analogfx.api import analogize, to_digital
from analogfx.errors import CheckpointError, abridged, shown
from analogfx.manifest import Manifest, clean, manifest_of, paths_of, read_manifest
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.metadata import CONFIG
from analogfx.modules.sites import unwrapped
from analogfx.passes.pipeline import Pass, pass_name
from analogfx.tensorfile import DTYPES, tensors_in

ModelT = TypeVar("ModelT", bound=nn.Module)

SCHEMA = 2
"""1 had no checksum of the record, no list of ties and no versions; it is still read."""
CONFIG_FILE = "analogfx.json"
_UNLIMITED = sys.maxsize


def save(analog: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write an analogized model to a folder.

    ``model-<id>.safetensors`` holds parameters and buffers, tied ones once; ``analogfx.json`` the
    config of every analog module, the name and checksum of the tensors' file, and a checksum of
    itself. Both are on the disk before ``analogfx.json`` is replaced, in one step; what it named
    before is removed afterwards. So an interrupted save leaves the checkpoint that was there, and
    of two that save at once one is the last, whole.

    A model in shards (``fully_shard``) is gathered tensor by tensor, and the first process writes
    it from its host memory: every process must call this.

    Args:
        analog: what ``analogize`` returned, compiled or in a data-parallel wrapper, too, as a
            whole or in parts: names are saved as those of the modules inside.
        directory: made if it does not exist.

    Warns:
        UserWarning: nothing in the model is analog.

    Raises:
        CheckpointError: a tensor cannot be saved, or the folder cannot be written. What was saved
            there before is as it was.
    """
    analog = unwrapped(analog)
    state = _named_state(analog)
    if any(map(shards.is_sharded, state.values())):
        _save_sharded(analog, state, Path(directory))
        return
    _write(analog, *_distinct(state), Path(directory))


def _save_sharded(analog: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Gather one tensor after the other; the first process writes what it has gathered."""
    dist = torch.distributed
    writes = dist.get_rank() == 0
    first: dict[int, str] = {}
    whole: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, value in state.items():
        kept = first.setdefault(id(value), name)
        if kept != name:
            ties[name] = kept
            continue
        dense = shards.whole(value.detach())
        if writes:
            whole[name] = dense.cpu().contiguous()
        del dense
    failed: list[Exception | None] = [None]
    if writes:
        try:
            _write(analog, whole, ties, folder)
        except Exception as error:
            failed = [error]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def _write(
    analog: nn.Module, tensors: dict[str, Tensor], ties: dict[str, str], folder: Path
) -> None:
    """Write a model whose tensors are given."""
    manifest = manifest_of(analog)
    if not manifest["modules"]:
        warnings.warn(
            f"{type(analog).__name__} has no analog layer: load() will give a digital model back",
            stacklevel=3,
        )
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "tensors": {},
        "ties": ties,
        "versions": _versions(analog),
        **manifest,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _commit(folder, tensors, record)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}"
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def load(
    model: ModelT,
    directory: str | os.PathLike[str],
    inplace: bool = False,
    passes: Sequence[Pass] = (),
) -> ModelT:
    """Analogize a fresh digital model as a folder says, and give it the folder's tensors.

    Every file is opened and read once, and checked before the model is touched. Floating-point
    tensors take the model's precision; any other dtype must be the model's.

    Args:
        model: digital, of the architecture that was saved. Untouched unless ``inplace``; left as
            it was if anything is wrong with the folder.
        directory: what :func:`save` wrote.
        inplace: change ``model`` itself.
        passes: the passes of your own that the model was analogized with, see :func:`analogize`.

    Returns:
        The analog model.

    Raises:
        CheckpointError: the folder is missing something, damaged, of another schema, made for
            another model or with other passes, or cannot be read; or ``model`` is in shards.
    """
    folder = Path(directory)
    if any(map(shards.is_sharded, model.parameters())):
        raise CheckpointError(
            f"{type(model).__name__} has parameters in shards: load the checkpoint into the dense "
            "model and call fully_shard then; or shard what analogize() gives, and load with "
            "torch.distributed.checkpoint"
        )
    stored = _read(folder)
    if not stored.manifest.configs:
        warnings.warn(f"{folder}: no layer of the checkpoint is analog", stacklevel=2)
    if stored.manifest.passes != [pass_name(step) for step in passes]:
        raise CheckpointError(
            f"{folder}: the model was made with the passes {shown(stored.manifest.passes)}; found "
            f"{shown([pass_name(step) for step in passes])}. Give load() the same passes"
        )
    paths = paths_of(model)
    absent = sorted(set(stored.manifest.configs) - set(paths.values()))
    if absent:
        raise CheckpointError(
            f"{folder}: made for a model with the module {shown(absent[0])}, "
            f"which {type(model).__name__} has not"
        )
    chosen = {
        raw: stored.manifest.configs[path]
        for raw, path in paths.items()
        if path in stored.manifest.configs
    }
    # Tried on a model without memory first: the given one is only touched if all fits.
    trial = analogize(
        _on_meta(model), lambda name, _: chosen.get(name), inplace=True, passes=passes
    )
    _check_fit(trial, stored, paths)
    _check_ties(model, stored, paths)
    became = {name for name, module in trial.named_modules() if isinstance(module, AnalogModule)}
    named = {name for name, _ in trial.named_modules()}  # a shared module has one of its names
    if became != set(chosen) & named:
        name = sorted(became ^ (set(chosen) & named))[0]
        raise CheckpointError(
            f"{folder}: {name!r} of {type(model).__name__} does not become analog"
        )
    analog = analogize(model, lambda name, _: chosen.get(name), inplace=inplace, passes=passes)
    try:
        _fill(analog, stored, paths)
    except BaseException:
        to_digital(analog, inplace=True)
        raise
    return analog


def digital_state_dict(analog: nn.Module) -> dict[str, Tensor]:
    """The state dict of the digital model inside an analog one, for ``load_state_dict`` there.

    An analog model's own ``state_dict()`` has ranges, their statistics and learned clips besides,
    which a digital model refuses as unexpected. Nothing is copied: values share memory with the
    model's, as those of ``state_dict()`` do.

    Args:
        analog: what ``analogize`` or ``load`` returned, compiled or in a data-parallel wrapper,
            too.

    Returns:
        What the digital model's ``state_dict()`` would be, keys in its order, with the model's
        weights as they are now.

    Example:
        >>> digital = nn.Linear(8, 4)
        >>> digital.load_state_dict(digital_state_dict(analogize(digital, config)))
        <All keys matched successfully>
    """
    model = unwrapped(analog)
    ours = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AnalogModule)
        for name in module._analog.state_names()
    }
    state = model.state_dict()
    paths = paths_of(model)
    kept = OrderedDict((clean(k, paths), v) for k, v in state.items() if k not in ours)
    kept._metadata = OrderedDict(  # type: ignore[attr-defined]
        (paths.get(path, path), {key: value for key, value in entry.items() if key != CONFIG})
        for path, entry in state._metadata.items()
    )
    return kept


# -------------------------------------------------------------------------------------- saving


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that a model keeps, by the names of the modules inside wrappers.

    Raises:
        CheckpointError: one of them is nothing that a file can hold.
    """
    paths = paths_of(model)
    state: dict[str, Tensor] = {}
    named = model.state_dict(keep_vars=True)  # a tensor that has two names is one object
    for key, value in named.items():
        found = ""
        if not shards.is_sharded(value) and type(value) not in (Tensor, nn.Parameter):
            found = f"a {type(value).__name__}"
        elif value.layout is not torch.strided or value.is_quantized:
            found = f"a tensor of layout {value.layout} and dtype {value.dtype}"
        elif value.is_meta:
            found = "on the meta device, without values"
        elif value.dtype not in DTYPES.values():
            found = f"of dtype {value.dtype}"
        if found:
            raise CheckpointError(
                f"{shown(key)} is {found}; expected a plain dense tensor of a dtype that "
                "safetensors has"
            )
        name = clean(key, paths)
        if name in state:
            raise CheckpointError(f"two tensors are called {shown(name)} inside their wrappers")
        state[name] = value
    return state


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and under which of their names the others are.

    Two names of the same elements are a tie. A view that overlaps another tensor otherwise is
    written in full.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    names: dict[Any, str] = {}
    storages = set()
    for name, value in state.items():
        kept = names.setdefault(_place(value) if value.numel() else name, name)
        if kept != name:
            ties[name] = kept
            continue
        storage = (value.device, value.untyped_storage().data_ptr())
        whole = value.contiguous().resolve_conj().resolve_neg()
        shares = storage in storages and whole.data_ptr() == value.data_ptr()
        tensors[name] = whole.clone() if shares else whole
        storages.add(storage)
    return tensors, ties


def _place(value: Tensor) -> Any:
    """Equal for two tensors that are the same elements of the same memory."""
    if value.is_meta:
        return id(value)
    return (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())


def _versions(model: nn.Module) -> dict[str, int]:
    """The versions of modules' state, which torch keeps beside a state dict."""
    paths = paths_of(model)
    found = {
        paths.get(path, path): entry.get("version")
        for path, entry in model.state_dict()._metadata.items()  # type: ignore[attr-defined]
    }
    return {path: version for path, version in found.items() if type(version) is int}


def _commit(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Put a checkpoint into a folder, all of it or nothing."""
    try:
        with files.scratch(folder) as scratch:
            written = scratch / "model.safetensors"
            save_file(tensors, str(written), metadata={"format": "pt"})
            files.sync(written)
            place = folder / f"model-{files.id_of(scratch)}.safetensors"
            record["tensors"] = {
                "file": place.name,
                "bytes": written.stat().st_size,
                "sha256": files.sha256(written),
            }
            text = files.sealed(record)
            if len(text) > files.RECORD_BYTES:
                raise CheckpointError(
                    f"{folder}: {CONFIG_FILE} would have {len(text)} bytes; "
                    f"expected at most {files.RECORD_BYTES}"
                )
            files.write_synced(scratch / CONFIG_FILE, text)
            os.replace(written, place)
            files.sync(folder)
            os.replace(scratch / CONFIG_FILE, folder / CONFIG_FILE)
            files.sync(folder)
    finally:
        files.tidy(folder, CONFIG_FILE, "model")


# ------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Stored:
    """A checkpoint in memory, proved whole."""

    place: Path
    """The file of tensors, to name in errors."""
    manifest: Manifest
    tensors: dict[str, Tensor]
    """By name, tied ones under each of their names."""
    versions: dict[str, int] | None


def _read(folder: Path) -> _Stored:
    """A folder's checkpoint.

    Another process may replace it meanwhile: then the tensors that the record names are gone, and
    there is another record.
    """
    seen = None
    while True:
        text = _read_file(folder, CONFIG_FILE, files.RECORD_BYTES)
        record, manifest = _checked(folder, text)
        entry = record["tensors"]
        place = folder / entry["file"]
        try:
            data = _read_file(folder, entry["file"], entry.get("bytes", _UNLIMITED))
            break
        except FileNotFoundError:
            if text == seen:
                raise CheckpointError(f"{folder}: no {place.name}") from None
            seen = text
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{place} is damaged: its checksum does not match")
    try:
        tensors, metadata = tensors_in(data)
    except ValueError as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error
    # safetensors' own save_model, which schema 1 was written with, lists ties in the metadata.
    for name, kept in record.get("ties", metadata).items():
        if kept in tensors and name not in tensors:
            tensors[name] = tensors[kept]
    return _Stored(place, manifest, tensors, record.get("versions"))


def _read_file(folder: Path, name: str, limit: int) -> bytearray:
    """A file of a folder.

    Raises:
        FileNotFoundError: there is no such file of tensors.
        CheckpointError: it cannot be read, for the system's reason.
    """
    try:
        return files.read_whole(folder / name, limit)
    except (FileNotFoundError, NotADirectoryError):
        if name != CONFIG_FILE:
            raise
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}; expected a folder that analogfx.save() wrote"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / name} is damaged: {error}") from error


def _parse(text: bytearray) -> Any:
    return files.parse_json(text, files.RECORD_DEPTH)


def _checked(folder: Path, text: bytearray) -> tuple[dict[str, Any], Manifest]:
    """The record, and what of it is the manifest, once they have proved whole."""
    place = folder / CONFIG_FILE
    try:
        record = _parse(text)
        schema = record["schema"]
        if schema not in (1, SCHEMA) or isinstance(schema, bool):
            raise CheckpointError(
                f"{place} has schema {shown(schema)}; this version reads 1 and {SCHEMA}"
            )
        if schema == SCHEMA:
            files.check_seal(text)
        _check_types(record)
        return record, read_manifest(record)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place} is damaged: {abridged(str(error))}") from error


def _check_types(record: dict[str, Any]) -> None:
    """Refuse a record whose entries are not of the kinds that they should be."""
    entry = record["tensors"]
    if not files.tensor_file("model").fullmatch(entry["file"]):
        raise ValueError(f"{shown(entry['file'])} is no name of a file of tensors")
    if not isinstance(entry["sha256"], str):
        raise ValueError("the tensors' checksum is no text")
    numbers = [*record.get("versions", {}).values(), entry.get("bytes", 0)]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a number of a version or a size is none")
    ties = record.get("ties", {}).values()
    if not all(isinstance(name, str) for name in ties):
        raise ValueError("a tie is no name")


def _on_meta(model: ModelT) -> ModelT:
    """A copy of a model whose tensors have no memory, ties kept."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _check_fit(trial: nn.Module, stored: _Stored, paths: dict[str, str]) -> None:
    """Refuse tensors that are not those of the model, by name, shape and dtype."""
    state = {clean(key, paths): value for key, value in trial.state_dict().items()}
    found = stored.tensors
    missing = [name for name in state if name not in found]
    unknown = sorted(set(found) - set(state))
    for kind, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(
                f"{stored.place} is of another model: it {kind} {shown(names[0])} "
                f"and {len(names) - 1} more"
            )
    for name, value in state.items():
        there = found[name]
        if there.shape != value.shape:
            raise CheckpointError(
                f"{stored.place} is of another model: {name!r} is {list(there.shape)} there and "
                f"{list(value.shape)} in {type(trial).__name__}"
            )
        both_float = there.is_floating_point() and value.is_floating_point()
        if there.dtype != value.dtype and not both_float:
            raise CheckpointError(
                f"{stored.place} is of another model: {name!r} is {there.dtype} there and "
                f"{value.dtype} in {type(trial).__name__}"
            )


def _check_ties(model: nn.Module, stored: _Stored, paths: dict[str, str]) -> None:
    """Refuse two different tensors for what is one in the model."""
    first: dict[Any, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        name = clean(key, paths)
        kept = first.setdefault(_place(value) if value.numel() else key, name)
        here, there = stored.tensors[kept], stored.tensors[name]
        if here.data_ptr() != there.data_ptr() and not torch.equal(here, there):
            raise CheckpointError(
                f"{stored.place} is of another model: {kept!r} and {name!r} differ there and are "
                f"one tensor in {type(model).__name__}"
            )


def _fill(analog: nn.Module, stored: _Stored, paths: dict[str, str]) -> None:
    """Give a model a checkpoint's tensors, which have been found to fit."""
    own = analog.state_dict(keep_vars=True)
    for value in own.values():
        span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        if value.numel() > span:  # an expanded one: several elements in one place
            value.data = value.data.contiguous()
    state = OrderedDict((key, stored.tensors[clean(key, paths)]) for key in own)
    metadata = copy.deepcopy(own._metadata)  # type: ignore[attr-defined]
    for path, entry in metadata.items():
        if stored.versions is not None and paths.get(path, path) in stored.versions:
            entry["version"] = stored.versions[paths.get(path, path)]
    state._metadata = metadata  # type: ignore[attr-defined]
    analog.load_state_dict(state)
