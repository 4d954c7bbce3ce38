"""Kinds that stay digital, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

_CLOSED: dict[type[Any], str] = {
    nn.RNNBase: "recurrent layers run in one fused call",
    nn.RNNCellBase: "recurrent cells run in one fused call",
    LazyModuleMixin: "a lazy module has no weight yet: run the model once, then analogize it",
}


def refusal(module: nn.Module) -> str | None:
    """Why a module stays digital with all that is inside it; None for one whose graph decides."""
    return next((why for kind, why in _CLOSED.items() if isinstance(module, kind)), None)
