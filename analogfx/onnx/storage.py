"""A model on disk: written beside its place, and moved there once it is accepted."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from analogfx import versions
from analogfx.errors import OnnxError

_INLINE_LIMIT = 1 << 26
"""Bytes of weights that still go into the model file itself, which is made in memory."""

_EXTERNAL = 1 << 10
"""Smallest tensor that goes into the external file."""

_IN_FLIGHT = 1 << 26
"""Bytes of weights held while they are written."""


def place(path: str | os.PathLike[str]) -> Path:
    """Where a file is to be, behind all links.

    Raises:
        OnnxError: no file can be there.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise OnnxError(f"path is {path!r}: expected a str or a path")
    try:
        target = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a circle of links, a NUL
        raise OnnxError(f"{str(path)!r} is no path: {error}") from error
    if not os.path.isdir(target.parent):
        raise OnnxError(f"{target.parent} is no folder; the folder of the file must exist")
    if os.path.exists(target) and not os.path.isfile(target):  # a device would be replaced, too
        raise OnnxError(f"{target} is there and no plain file; name a file")
    return target


def write(model: ir.Model, target: Path, accept: Callable[[Path], None]) -> None:
    """Write a model, replacing what was at its place, if it is accepted.

    Large weights go into a file of a new name beside it, so that what is at the place is whole
    before and after the one step that replaces it.

    Args:
        accept: raises if the file that it is given is not to be kept.

    Raises:
        OnnxError: it cannot be written.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    data = f"{target.name}.{secrets.token_hex(4)}.data" if size > _INLINE_LIMIT else None
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as scratch:
            file = Path(scratch, "model.onnx")
            ir.save(
                model,
                file,
                external_data=data,
                size_threshold_bytes=_EXTERNAL,
                **_one_by_one(),
            )
            accept(file)
            replaced = _data_of(target)
            _move(file, target, data)
            _remove(target, replaced)
    except OSError as error:
        raise OnnxError(f"{target} cannot be written: {error.strerror or error}") from error


def _one_by_one() -> dict[str, Any]:
    """Options that keep few weights in memory while they are written."""
    if versions.there(versions.ONE_WRITER):
        return {}
    return {"max_workers": 1, "max_in_flight_bytes": _IN_FLIGHT}


def _move(file: Path, target: Path, data: str | None) -> None:
    if data is None:
        os.replace(file, target)
        return
    os.replace(file.with_name(data), target.with_name(data))
    try:
        os.replace(file, target)
    except OSError:
        _remove(target, {data})
        raise


def _data_of(target: Path) -> set[str]:
    """Names of the weight files of what is at a place, if it is one of ours."""
    name = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}\.data")
    try:
        model = onnx.load(target, load_external_data=False)
    except Exception:  # nothing, or anything
        return set()
    held = [entry.value for t in model.graph.initializer for entry in t.external_data
            if entry.key == "location"]  # fmt: skip
    return set(filter(name.fullmatch, held))


def _remove(target: Path, data: set[str]) -> None:
    for name in data:
        with contextlib.suppress(OSError):  # it is only in the way
            target.with_name(name).unlink()
