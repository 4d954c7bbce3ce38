"""Which products of a module's forward are those of its children."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from analogfx.modules.capture import forward_of

_TARGETS: dict[Any, Any] = {
    nn.Linear.forward: F.linear,
    nn.Conv1d.forward: F.conv1d,
    nn.Conv2d.forward: F.conv2d,
    nn.Conv3d.forward: F.conv3d,
}
"""The one product of a forward, by the forward."""


def plain_child(module: nn.Module, parameter: str) -> str | None:
    """The path of the child whose one product is by a parameter, None if there is no such child.

    Args:
        parameter: its path from the module.
    """
    path, _, name = parameter.rpartition(".")
    if not path or name != "weight":
        return None
    child: Any = module.get_submodule(path)
    known = "forward" not in child.__dict__ and forward_of(child) in _TARGETS
    return path if known and isinstance(child._parameters.get(name), nn.Parameter) else None


def variant_of(child: Any, product: Node, bias: Any) -> dict[str, Any] | None:
    """What a child's product by its own weight differs in from its own call.

    Args:
        product: a canonical product by the child's weight.
        bias: the parameter that it adds, None for none.

    Returns:
        Attributes as the product has them, of those that are not the child's; None where no
        attribute makes the child compute the product.
    """
    if _TARGETS.get(forward_of(child)) is not product.target:
        return None
    if bias is not None and bias is not child.bias:
        return None
    changed: dict[str, Any] = {} if bias is child.bias else {"bias": None}
    if product.target is F.linear:
        return changed
    if product.args[6] != child.groups:
        return None
    given: Any = dict(zip(("stride", "padding", "dilation"), product.args[3:6], strict=True))
    own = {n: getattr(child, n) for n in given}
    if child.padding_mode != "zeros" or any(own[n] != tuple(v) for n, v in given.items()):
        changed |= {n: tuple(v) for n, v in given.items()} | {"padding_mode": "zeros"}
    return changed


def child_of(module: nn.Module, product: Node, weight: Any, bias: Any) -> str | None:
    """The path of the child whose call would compute a product of the module's own code.

    Args:
        product: a canonical product.
        weight, bias: the parameters that it takes.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        if parameter is weight and path and _computes(module, path, product, weight, bias):
            return path
    return None


def _computes(module: nn.Module, path: str, product: Node, weight: Any, bias: Any) -> bool:
    child: Any = module.get_submodule(path)
    same = "forward" not in child.__dict__ and _TARGETS.get(forward_of(child)) is product.target
    if not same or child.weight is not weight or child.bias is not bias:
        return False
    if product.target is F.linear:
        return True
    geometry = (child.stride, child.padding, child.dilation)
    given = tuple(map(tuple, product.args[3:6]))  # type: ignore[arg-type]
    return child.padding_mode == "zeros" and (*geometry, child.groups) == (*given, product.args[6])
