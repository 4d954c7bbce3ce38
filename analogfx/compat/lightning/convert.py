"""Conversion with Lightning's signature, and what it converts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from analogfx import api
from analogfx.compat.aihwkit import export
from analogfx.compat.lightning import layers
from analogfx.compat.lightning.names import name, unname
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import named_analog_layers
from analogfx.reconfigure import set_config

CONVERSION_MAP: dict[type[nn.Module], Any] = {
    nn.Linear: layers.AnalogLinear,
    nn.Conv1d: layers.AnalogConv1d,
    nn.Conv2d: layers.AnalogConv2d,
    nn.Conv3d: layers.AnalogConv3d,
    nn.Sequential: layers.AnalogSequential,
    nn.LSTM: layers.AnalogRNN,
    nn.GRU: layers.AnalogRNN,
    nn.RNN: layers.AnalogRNN,
}
"""Which layers become analog: those of these very classes, not of their subclasses."""


def convert_to_analog(
    module: nn.Module,
    rpu_config: Any,
    conversion_map: dict[type[nn.Module], Any] | None = None,
    specific_rpu_config_fun: Callable[[str, nn.Module, Any], Any] | None = None,
    module_name: str = "",
    ensure_analog_root: bool = True,
    exclude_modules: Collection[str] | None = None,
    inplace: bool = False,
    verbose: bool = False,
) -> Any:
    """Make layers analog as AIHWKIT-Lightning's function of this name does.

    It converts the layers that Lightning converts; ``analogfx.analogize`` finds all products.

    Args:
        module: digital.
        rpu_config: one config, Lightning's or analogfx's.
        conversion_map: from torch classes to what they become. A class of your own in it needs a
            ``from_digital(module, rpu_config)``, whose result takes the module's place.
        specific_rpu_config_fun: of (path, module, a copy of the config), returns the module's.
        module_name: path of ``module``, in front of all others.
        ensure_analog_root: give ``module`` Lightning's methods, see :class:`AnalogWrapper`.
        exclude_modules: paths of modules to leave digital, with all inside them.
        inplace: change ``module`` itself.
        verbose: print what was converted.

    Returns:
        The analog model: a copy of the same class and module tree, with the same ties.

    Raises:
        TypeError: ``conversion_map`` is no dict.
        ConfigError, CaptureError: see :func:`analogfx.analogize`.

    Source: the signature of ``convert_to_analog`` in aihwkit_lightning/nn/conversion.py, 2.1.0.
    """
    targets = CONVERSION_MAP if conversion_map is None else conversion_map
    if not isinstance(targets, dict):
        raise TypeError(f"conversion_map is a {type(targets).__name__}; expected a dict")
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or ()
    specific = specific_rpu_config_fun or (lambda path, layer, config: config)
    chosen: dict[str, Any] = {}
    containers, custom = [], []
    for path, full, layer in _reached(module, module_name, excluded):
        target = targets.get(type(layer))
        if target is None:
            continue
        if verbose:
            print(f"Converted '{full}' to '{target.__name__}'.")
        if isinstance(target, layers.CONTAINERS):
            containers.append(path)
            continue
        chosen[path] = specific(full, layer, copy.deepcopy(rpu_config))
        if not isinstance(target, layers.KINDS):
            custom.append((path, target, chosen.pop(path)))
    analog = api.analogize(module, lambda path, _: chosen.get(path), inplace=inplace)
    for path, target, config in custom:
        new = target.from_digital(analog.get_submodule(path), config)
        if not path:
            analog = new
        else:
            analog.set_submodule(path, new)
    for path in containers:
        name(analog.get_submodule(path))
    for layer in list(analog.modules()):
        if isinstance(layer, AnalogModule):
            name(layer)
    return name(analog) if ensure_analog_root and not module_name else analog


def _reached(
    module: nn.Module, module_name: str, excluded: Collection[str]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module that is not excluded: its path, its path with the root's name, itself."""

    def visit(path: str, full: str, inner: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        if full not in excluded:
            yield path, full, inner
        for child_name, child in inner.named_children():
            child_full = f"{full}.{child_name}" if full else child_name
            if child_full not in excluded:
                yield from visit(f"{path}.{child_name}" if path else child_name, child_full, child)

    return visit("", module_name, module)


def convert_to_digital(
    module: nn.Module,
    conversion_set: set[Any] | None = None,
    module_name: str = "",
    inplace: bool = False,
) -> Any:
    """Make analog layers digital again.

    Args:
        module: what :func:`convert_to_analog` or ``analogfx.analogize`` returned.
        conversion_set: names of layers to make digital, of :data:`CONVERSION_MAP`; None for all.
        module_name: as in Lightning; it has no effect.
        inplace: change ``module`` itself.

    Raises:
        TypeError: ``conversion_set`` is no set.
    """
    if conversion_set is not None and not isinstance(conversion_set, set):
        raise TypeError(f"conversion_set is a {type(conversion_set).__name__}; expected a set")
    digital = module if inplace else copy.deepcopy(module)
    if conversion_set is None:
        for layer in list(digital.modules()):
            unname(layer)
        return api.to_digital(digital, inplace=True)
    for layer in list(digital.modules()):
        if any(isinstance(layer, kind) for kind in conversion_set):
            unname(layer)
            if isinstance(layer, AnalogModule):
                api.to_digital(layer, inplace=True)
    return digital if isinstance(digital, AnalogModule) else unname(digital)


def export_to_aihwkit(model: nn.Module, max_output_size: int = -1) -> Any:
    """An AIHWKIT model, see :func:`analogfx.compat.aihwkit.export`.

    Args:
        model: analog. It stays as it is.
        max_output_size: largest number of outputs of a tile; at most 0 leaves each layer's config.
    """
    if max_output_size > 0:
        model = copy.deepcopy(model)
        wanted = {path: layer.rpu_config for path, layer in named_analog_layers(model)}
        for config in wanted.values():
            config.mapping.max_output_size = max_output_size
        set_config(model, lambda path, _: wanted.get(path))
    return export(model)
