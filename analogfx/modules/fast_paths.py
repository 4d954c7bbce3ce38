"""Torch's fused encoder, which reads the weights of its children and never calls them."""

from __future__ import annotations

from torch import nn

from analogfx.modules.analog_module import AnalogModule

# Attributes that are the encoder's own conditions for running fused, and a value that says no.
_CONDITIONS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def close_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder from going around analog layers."""
    for module in model.modules():
        for kind, (name, closed) in _CONDITIONS.items():
            analog = any(isinstance(m, AnalogModule) for m in module.modules())
            if isinstance(module, kind) and analog and "_analog_closed" not in module.__dict__:
                module._analog_closed = {name: getattr(module, name, None)}  # type: ignore
                setattr(module, name, closed)


def open_fast_paths(model: nn.Module) -> None:
    """Undo :func:`close_fast_paths`."""
    for module in model.modules():
        for name, value in module.__dict__.pop("_analog_closed", {}).items():
            setattr(module, name, value)
