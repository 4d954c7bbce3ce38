"""What a command names as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analogfx.errors import AnalogfxError


def call(option: str, name: str, error: type[AnalogfxError]) -> Any:
    """What a function returns, of a module that is installed or in the current folder.

    Args:
        option: the command's option, for messages.
        name: ``package.module:function``.
        error: what to raise if there is no such function, or if it or its module raises.
    """
    with _importing_from_here():
        function = _found(option, name, error)
        try:
            return function()
        except Exception as cause:
            raise error(f"{option} {name} failed: {type(cause).__name__}: {cause}") from cause


def function(option: str, name: str, error: type[AnalogfxError]) -> Any:
    """A function, not called; see :func:`call`."""
    with _importing_from_here():
        return _found(option, name, error)


def _found(option: str, name: str, error: type[AnalogfxError]) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as cause:
        raise error(f"{option} {name}: {cause}; expected package.module:function") from cause
    except Exception as cause:  # it is the user's code
        raise error(
            f"{option} {name}: importing {module} failed: {type(cause).__name__}: {cause}"
        ) from cause


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """The current folder in front of the places to import from, as ``python -m`` has it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
