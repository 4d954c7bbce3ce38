"""Kinds: classes of modules whose own forward hides its products from a trace.

A kind is one file here. It gives such a class a forward that computes the same in products that a
trace shows, with the same parameters in the same order. Its row in :data:`FORWARDS` names the
forward that it stands for, so a subclass with a forward of its own is never meant. A kind of
classes that are too many to name has a function in :data:`FAMILIES` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from analogfx.modules.kinds import experts

Forward = Callable[..., Any]

FORWARDS: dict[Forward, Forward] = {}
"""What is traced, by the forward that it stands for."""

FAMILIES: tuple[Callable[[FunctionType], Forward | None], ...] = (experts.forward_for,)
"""Functions that know a forward by how it is made, and give what is traced; None for others."""


def traced(own: FunctionType) -> Forward:
    """What to trace for a class's forward: what its kind has for it, or the forward itself."""
    if own in FORWARDS:
        return FORWARDS[own]
    return next((found for family in FAMILIES if (found := family(own))), own)
