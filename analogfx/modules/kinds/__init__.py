"""Kinds: classes of modules whose own forward hides its products from a trace.

A kind is one file here. It gives such a class a forward that computes the same in products that a
trace shows, with the same parameters in the same order. Its row in :data:`FORWARDS` names the
forward that it stands for, so a subclass with a forward of its own is never meant. A kind of
classes that are too many to name has a function in :data:`FAMILIES` instead.

A forward that no graph can show, because it loops over its input, is *driven*: what is traced shows
its products alone, each of an input of its own, and a driver calls them, see :data:`DRIVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from analogfx.modules.kinds import attention, cells, experts, recurrent, transposed

Forward = Callable[..., Any]

FORWARDS: Mapping[Forward, Forward] = {
    nn.MultiheadAttention.forward: attention.forward,
    **{kind.forward: transposed.forward for kind in transposed.KINDS},
    **cells.FORWARDS,
    **recurrent.FORWARDS,
}
"""What is traced, by the forward that it stands for."""

FAMILIES: tuple[Callable[[FunctionType], Forward | None], ...] = (experts.forward_for,)
"""Functions that know a forward by how it is made, and give what is traced; None for others."""


def traced(own: FunctionType) -> Forward:
    """What to trace for a class's forward: what its kind has for it, or the forward itself."""
    if own in FORWARDS:
        return FORWARDS[own]
    return next((found for family in FAMILIES if (found := family(own))), own)


DRIVERS: Mapping[Forward, recurrent.Driver] = recurrent.DRIVERS
"""What calls the products of a traced forward, by that forward.

The forward takes one argument, a sequence of inputs, and returns a tuple: the product of each.
"""
