"""Kinds: classes of modules whose own forward hides its products from a trace.

A kind is one file here. It gives such a class a forward that computes the same in products that a
trace shows, with the same parameters in the same order. Its row in :data:`FORWARDS` names the
forward that it stands for, so a subclass with a forward of its own is never meant.

A forward that no graph can show, because it loops over its input, is *driven*: what is traced shows
its products alone, each of an input of its own, and a driver calls them, see :data:`DRIVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from analogfx.modules.kinds import attention, cells, recurrent

Forward = Callable[..., Any]

FORWARDS: Mapping[Forward, Forward] = {
    nn.MultiheadAttention.forward: attention.forward,
    **cells.FORWARDS,
    **recurrent.FORWARDS,
}
"""What is traced, by the forward that it stands for."""

DRIVERS: Mapping[Forward, recurrent.Driver] = recurrent.DRIVERS
"""What calls the products of a traced forward, by that forward.

The forward takes one argument, a sequence of inputs, and returns a tuple: the product of each.
"""
