"""Classes that stay digital, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from analogfx.modules.kinds import FORWARDS

_CLOSED: dict[type[Any], str] = {
    nn.RNNBase: "its class has a forward of its own around a recurrent layer's one fused call",
    nn.RNNCellBase: "its class has a forward of its own around a recurrent cell's one fused call",
    LazyModuleMixin: "a lazy module has no weight yet: run the model once, then analogize it",
}


def refusal(module: nn.Module) -> str | None:
    """Why a module stays digital with all that is inside it; None for one whose graph decides."""
    why = next((why for kind, why in _CLOSED.items() if isinstance(module, kind)), None)
    cls = type(module)
    # A kind's class is told by its forward; that of an analog module is behind this name.
    known = why is not None and getattr(cls, "digital_forward", cls.forward) in FORWARDS
    return None if known else why


CALLING_ALONE = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
"""Forwards that multiply by nothing of their own: their fused way is closed while anything inside
is analog, and what remains are calls of their children."""
