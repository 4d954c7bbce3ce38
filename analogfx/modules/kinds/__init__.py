"""Kinds: classes of modules whose own forward hides its products from a trace.

A kind is one file here. It gives such a class a forward that computes the same in products that a
trace shows, with the same parameters in the same order. Its row in :data:`FORWARDS` names the
forward that it stands for, so a subclass with a forward of its own is never meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from analogfx.modules.kinds import attention, transposed

Forward = Callable[..., Any]

FORWARDS: dict[Forward, Forward] = {
    nn.MultiheadAttention.forward: attention.forward,
    **{kind.forward: transposed.forward for kind in transposed.KINDS},
}
"""What is traced, by the forward that it stands for."""
