"""Finding the analog sites of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite


def named_analog_layers(model: nn.Module) -> Iterator[tuple[str, AnalogModule]]:
    """Every analog layer of a model with its path.

    Args:
        model: what ``analogize`` or ``load`` returned, compiled or in a data-parallel wrapper, too:
            paths are those inside.

    Example:
        >>> {path: layer.in_sizes for path, layer in named_analog_layers(analog)}
    """
    return analog_modules(unwrapped(model))


def analog_layers(model: nn.Module) -> Iterator[AnalogModule]:
    """Every analog layer of a model; see :func:`named_analog_layers`."""
    return (layer for _, layer in named_analog_layers(model))


def analog_modules(model: nn.Module) -> Iterator[tuple[str, AnalogModule]]:
    """Every analog module of a model by its path, its programs those for the module as it is."""
    for path, module in model.named_modules():
        if isinstance(module, AnalogModule):
            module._analog.follow(module)
            yield path, module


def sites(model: nn.Module) -> Iterator[tuple[str, AnalogModule, AnalogSite]]:
    """Every analog site of a model as it is now, as (module path, module, site)."""
    for path, module in analog_modules(model):
        for site in module._analog.sites:
            yield path, module, site


def required_sites(model: nn.Module) -> list[tuple[str, AnalogModule, AnalogSite]]:
    """Every analog site of a model, of which there must be some.

    Raises:
        TypeError: the model has none, or is no module.
    """
    found = list(sites(model)) if isinstance(model, nn.Module) else []
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no analog layer: pass what analogize() or load() returned"
        )
    return found


HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Wrappers that keep the model inside as ``module``."""


def unwrapped(model: Any) -> Any:
    """The model inside what ``torch.compile``, data-parallel wrappers and averages made of it."""
    while True:
        if isinstance(model, HOLDERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
