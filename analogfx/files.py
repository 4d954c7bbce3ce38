"""Files on disk: read once and within limits, and replaced by one rename.

A folder that is written here holds a JSON *record* under a fixed name, and data files beside it
whose names the record gives. The rename of the record is the commit: before it the folder is what
it was, after it the folder is new.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor

if sys.platform != "win32":
    import fcntl

RECORD_BYTES = 1 << 25
"""Of the longest record that is read."""
RECORD_DEPTH = 12
"""How deep lists and objects of a record may be nested."""
_PREFIX = ".saving-"
_ABANDONED = 86400.0
"""Seconds after which a scratch folder is left over, where the system has no locks to tell."""
_LONGEST_NUMBER = 40
"""Characters of a number in JSON. Python writes floats in at most 24 and 64 bits in 20."""
# Strings as a whole, so that brackets inside them do not count; an unfinished one to the end.
_BRACKETS = re.compile(rb'"(?:[^"\\]+|\\.|\\\Z)*(?:"|\Z)|([\[{])|[\]}]', re.DOTALL)
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n')
_SEAL_BYTES = len(',\n  "sha256": "') + 64 + len('"\n}\n')


# ------------------------------------------------------------------------------------- reading


def read_whole(path: Path, limit: int) -> bytearray:
    """Read a regular file by opening it once.

    Args:
        path: never waited for: a FIFO or a device is refused.
        limit: bytes; a longer file is refused before it is read.

    Raises:
        OSError: the system's own reason.
        ValueError: no regular file, or too long.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as stream:
        found = os.fstat(stream.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > limit:
            raise ValueError(f"it has {found.st_size} bytes; expected at most {limit}")
        data = bytearray(found.st_size)
        view = memoryview(data)
        done = 0
        while count := stream.readinto(view[done:]):
            done += count
        if done != len(data):
            raise ValueError(f"it has {done} bytes and was to have {len(data)}")
        return data


def parse_json(text: bytes | bytearray, depth: int) -> Any:
    """Parse JSON from a source that is not to be trusted.

    Args:
        text: UTF-8.
        depth: how deep lists and objects may be nested.

    Raises:
        ValueError: for what is no JSON, nested deeper, or has a number of more than 40 characters,
            an infinite one, or a not-a-number.
    """
    level = 0
    for found in _BRACKETS.finditer(text):
        if found[1]:
            level += 1
            if level > depth:
                raise ValueError(f"it is nested more than {depth} deep")
        elif found[0] in (b"]", b"}"):
            level -= 1
    return json.loads(
        text.decode("utf-8"), parse_int=_integer, parse_float=_float, parse_constant=_no_number
    )


def _integer(text: str) -> int:
    return int(_short(text))


def _float(text: str) -> float:
    value = float(_short(text))
    return _no_number(text) if value in (float("inf"), float("-inf")) else value


def _short(text: str) -> str:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} characters")
    return text


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that can be used")


def sealed(record: dict[str, Any]) -> bytes:
    """JSON text of a record whose last entry, ``"sha256"``, is the checksum of all text before it.

    Args:
        record: not empty, and without an entry of that name.
    """
    text = json.dumps(record, indent=2, allow_nan=False).encode("ascii")
    body = text.removesuffix(b"\n}")
    return body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode("ascii")


def check_seal(text: bytes | bytearray) -> None:
    """Refuse a text that is not, bit by bit, what :func:`sealed` wrote.

    Raises:
        ValueError: it is not.
    """
    found = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    body = text[:-_SEAL_BYTES]
    if found is None or hashlib.sha256(body).hexdigest().encode("ascii") != found[1]:
        raise ValueError("its checksum does not match")


def sha256(path: Path) -> str:
    """Checksum of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- writing


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in one step: whoever reads it finds what was there before, or all of the text.

    What is no regular file, such as ``/dev/stdout``, is written to as it is.

    Raises:
        OSError: the system's own reason, with the name of the file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8", newline="")
        return
    try:
        place = tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    with place as folder:
        written = Path(folder, target.name)
        written.write_text(text, encoding="utf-8", newline="")
        os.replace(written, target)


def json_text(data: Any, path: str | os.PathLike[str] | None = None) -> str:
    """Plain data as JSON, written to a file, too, if one is named."""
    text = json.dumps(data, indent=2)
    if path is not None:
        write_text(path, text + "\n")
    return text


def commit(
    folder: Path, record_file: str, stem: str, record: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a record and its tensors to a folder, all of it or nothing.

    Args:
        folder: made if it does not exist.
        record_file: name of the record.
        stem: the tensors go into ``<stem>-<id>.safetensors``; files of that form that no record
            names are removed.
        record: gets an entry ``"tensors"`` with the name and the checksum of their file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with scratch(folder) as place:
            written = place / f"{stem}-{id_of(place)}.safetensors"
            save_file(tensors, str(written))
            record["tensors"] = {"file": written.name, "sha256": sha256(written)}
            text = json.dumps(record, indent=2, allow_nan=False) + "\n"
            write_synced(place / record_file, text.encode())
            sync(written)
            os.replace(written, folder / written.name)
            sync(folder)
            os.replace(place / record_file, folder / record_file)
            sync(folder)
    finally:
        tidy(folder, record_file, stem)


def tidy(folder: Path, record_file: str, stem: str) -> None:
    """Remove what a record does not need: of killed savers, and tensors that were replaced.

    A file of tensors is in use if its saver is still at work or if the record names it. Whether
    the saver works is asked first: one that has ended is in the record by then, or never will be.
    """
    remove_abandoned(folder)
    form = tensor_file(stem)
    candidates = [
        path
        for path in folder.iterdir()
        if (found := form.fullmatch(path.name)) and not is_saving(folder, found[1])
    ]
    try:
        text = read_whole(folder / record_file, RECORD_BYTES)
        named = parse_json(text, RECORD_DEPTH)["tensors"]["file"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no record: nothing is known to be superfluous
    for path in candidates:
        if path.name != named:
            path.unlink(missing_ok=True)


def tensor_file(stem: str) -> re.Pattern[str]:
    """The form of the names of files of tensors; its group is the saver's id."""
    return re.compile(rf"{stem}-([0-9a-z_]{{8}})\.safetensors")


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file, down to the disk."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Have what was written to a file or a folder on the disk before going on."""
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder inside ``folder``, on the same file system, which goes when it is left.

    It is called ``.saving-<id>``. While it is in use the process holds a lock on it, which the
    system gives back when the process ends in whatever way.
    """
    while True:
        path = Path(tempfile.mkdtemp(dir=folder, prefix=_PREFIX))
        lock = _lock(path, wait=True)
        if path.exists():  # another saver did not find it before it was locked
            break
        _unlock(lock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


def id_of(scratch_folder: Path) -> str:
    """What tells a scratch folder from all others, to be part of the names of data files."""
    return scratch_folder.name.removeprefix(_PREFIX)


def is_saving(folder: Path, identity: str) -> bool:
    """Whether the saver of that id is at work, as far as one can tell."""
    return (folder / f"{_PREFIX}{identity}").exists()


def remove_abandoned(folder: Path) -> None:
    """Remove scratch folders whose savers were killed.

    A saver that is at work holds the lock. Where the file system has no locks, it has a day.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            lock = _lock(path, wait=False)
            if lock is None and time.time() - path.stat().st_mtime < _ABANDONED:
                continue
        except OSError:  # at work, or gone meanwhile
            continue
        shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a folder; None where there are no locks.

    Raises:
        OSError: without ``wait``: another holds it; or the folder is gone.
    """
    if sys.platform == "win32":
        return None
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY)
        # Network file systems give exclusive locks to writers only, and a folder has none.
        fcntl.flock(descriptor, fcntl.LOCK_SH if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        gone = isinstance(error, FileNotFoundError)
        if isinstance(error, BlockingIOError) or (gone and not wait):
            raise
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
