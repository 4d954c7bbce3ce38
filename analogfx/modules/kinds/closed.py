"""Kinds that stay digital, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

_CLOSED: dict[type[Any], str] = {
    nn.MultiheadAttention: "nn.MultiheadAttention reads its projections in one fused call",
    nn.RNNBase: "recurrent layers run in one fused call",
    nn.RNNCellBase: "recurrent cells run in one fused call",
    nn.Bilinear: "a bilinear form is not a matrix-vector product",
    _ConvTransposeNd: "transposed convolutions are not mapped to tiles",
    LazyModuleMixin: "a lazy module has no weight yet: run the model once, then analogize it",
}


def refusal(module: nn.Module) -> str | None:
    """Why a module stays digital with all that is inside it; None for one whose graph decides."""
    return next((why for kind, why in _CLOSED.items() if isinstance(module, kind)), None)


CALLING_ALONE = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
"""Forwards that multiply by nothing of their own: their fused way is closed while anything inside
is analog, and what remains are calls of their children."""
