"""Libraries whose models have to know what became of them; each is told only where it is loaded."""

from __future__ import annotations

import importlib
import sys

from torch import nn

_INTEGRATIONS = {"transformers.modeling_utils": "analogfx.hf.config"}
"""Our module for a library, by the module of the library that defines the class of its models."""


def became_analog(model: nn.Module) -> None:
    """Tell them that modules of a model are analog now."""
    for library, ours in _INTEGRATIONS.items():
        if library in sys.modules:
            importlib.import_module(ours).became_analog(model)


def became_digital(model: nn.Module) -> None:
    """Tell them that a model is digital again."""
    for library, ours in _INTEGRATIONS.items():
        if library in sys.modules:
            importlib.import_module(ours).became_digital(model)
