"""Layers whose own forward cannot be traced, but calls that of the torch layer it inherits from.

Such a layer runs its own forward as it is: a subclass stands *below* it, between the layer's class
and torch's, so that ``super().forward(x)`` is the analog product.
"""

from __future__ import annotations

from types import FunctionType

from torch import nn

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def inherited_layer(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer whose forward a module's own calls by ``super()``; None if there is none."""
    own = getattr(type(module), "forward", None)
    layer = next((c for c in type(module).__mro__ if c in _LAYERS), None)
    calls = isinstance(own, FunctionType) and {"super", "forward"} <= {*own.__code__.co_names}
    return layer if calls and layer is not None and own is not layer.forward else None


def seen_as(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """A module as one of the class that it inherits from: it shares everything but its class."""
    twin = layer.__new__(layer)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin
