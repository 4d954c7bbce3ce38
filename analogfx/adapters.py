"""Adapters that PEFT put beside layers: what of a model they are, told without importing PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def adapters_of(host: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the adapters that a layer of PEFT holds, by their names from it.

    Args:
        host: any module; one that is no layer of PEFT holds none. Whole modules that PEFT keeps
            copies of (``modules_to_save``) are no adapters.
    """
    if any(base.__name__ == "BaseTunerLayer" for base in type(host).__mro__):
        names: tuple[str, ...] = getattr(type(host), "adapter_layer_names", ())
        for attribute in names:
            container = host._modules.get(attribute)
            if container is not None:
                yield from container.named_modules(prefix=attribute)


def hosts(model: nn.Module) -> dict[str, str]:
    """The path of the layer that an adapter stands beside, by that of every module of adapters."""
    return {
        f"{path}.{name}" if path else name: path
        for path, module in model.named_modules()
        for name, _ in adapters_of(module)
    }


def in_weight(host: nn.Module) -> bool:
    """Whether a layer adds its adapters to the weight, so that they multiply no input."""
    return getattr(type(host), "adapters_in_weight", False)
