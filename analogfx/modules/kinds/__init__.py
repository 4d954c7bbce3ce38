"""Kinds: classes of modules whose own forward hides its products from a trace.

A kind is one file here. It gives such a class a forward that computes the same in products that a
trace shows, with the same parameters in the same order. What a file may define is collected:

- ``FORWARDS``: the forwards that it stands for, each with what is traced in its place. A subclass
  with a forward of its own is never meant.
- ``forward_for``: a function that knows a forward by how it is made, and gives what is traced, or
  None: for classes that are too many to name.
- ``DRIVERS``: what calls the products of a traced forward, by that forward. A forward that no graph
  can show, because it loops over its input, is *driven*: what is traced shows its products alone,
  each of an input of its own. It takes a sequence of inputs, and returns the product of each.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

Forward = Callable[..., Any]

_KINDS: list[Any] = [
    importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)
]

FORWARDS: Mapping[Forward, Forward] = {
    own: made for kind in _KINDS for own, made in getattr(kind, "FORWARDS", {}).items()
}
FAMILIES: tuple[Callable[[FunctionType], Forward | None], ...] = tuple(
    kind.forward_for for kind in _KINDS if hasattr(kind, "forward_for")
)
DRIVERS: Mapping[Forward, Any] = {
    made: driver for kind in _KINDS for made, driver in getattr(kind, "DRIVERS", {}).items()
}


def traced(own: FunctionType) -> Forward:
    """What to trace for a class's forward: what its kind has for it, or the forward itself."""
    if own in FORWARDS:
        return FORWARDS[own]
    return next((found for family in FAMILIES if (found := family(own))), own)
