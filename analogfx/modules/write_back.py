"""Writing a site's weight back to the parameter that it is a rearrangement of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from analogfx import shards
from analogfx.errors import CaptureError
from analogfx.kernels import changes
from analogfx.modules.program import AnalogSite


def is_view(weight: Tensor, module: nn.Module, site: AnalogSite) -> bool:
    """Whether writing to a weight writes to the parameter that it is computed from."""
    parameter = parameter_of(module, site)
    return weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def parameter_of(module: nn.Module, site: AnalogSite) -> nn.Parameter:
    """The parameter whose elements a site's weight rearranges.

    Raises:
        CaptureError: the weight is computed from its parameter, so it cannot be written back.
    """
    if not site.rearranged:
        raise CaptureError(
            f"{type(module).__name__}: the weight is computed from "
            f"{site.name}, so nothing can be written back to it"
        )
    return module.get_parameter(site.name)


def store_weight(module: nn.Module, site: AnalogSite, matrix: Tensor) -> None:
    """Write a weight, (O, I), back to the parameter that it is a rearrangement of.

    Raises:
        CaptureError: it is no rearrangement of one.
    """
    weight = site.weight(module)
    if is_view(weight, module, site):
        weight.copy_(matrix.view(weight.shape))
        return
    # On the way from the parameter to the weight its elements are copied: follow their indices.
    parameter = parameter_of(module, site)
    index = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    origin = site.weight(_stand_in(site.name, index))
    values = matrix.flatten().to(weight.dtype)
    parameter.copy_(parameter.flatten().index_copy(0, origin.flatten(), values).view_as(parameter))


def dense_weight(module: nn.Module, site: AnalogSite) -> Tensor:
    """A site's weight as a whole, gathered where the module has a shard: every process must ask.

    (O, I), or torch's layout of a convolution. Without a shard it shares the parameter's memory if
    the site's own weight does.
    """
    weight = site.weight(module)
    if not shards.is_sharded(weight):
        return weight
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    if not site.rearranged:
        return shards.whole(weight)
    return site.weight(_stand_in(site.name, shards.whole(parameter_of(module, site).detach())))


@contextmanager
def gathered(module: nn.Module, site: AnalogSite) -> Iterator[nn.Module]:
    """What to write a site's weight to: the module, or where that has a shard, a stand-in for it.

    The stand-in has the parameter as a whole, in float32 where DeepSpeed's ZeRO trains such a copy
    of it. What is written to it is written to the shard afterwards. Every process must come here.

    Raises:
        CaptureError: the weight is computed from its parameter, so it cannot be written back.
    """
    parameter = parameter_of(module, site)
    copy = None if shards.is_sharded(parameter) else shards.trained_copy(parameter)
    if copy is None and not shards.is_sharded(parameter):
        yield module
        return
    value = shards.whole(parameter.detach()).clone() if copy is None else copy
    whole = nn.Parameter(value, requires_grad=False)
    holder = nn.Module()
    inner, (*path, name) = holder, site.name.split(".")
    for step in path:
        inner.add_module(step, nn.Module())
        inner = inner.get_submodule(step)
    inner.register_parameter(name, whole)
    yield holder
    with torch.no_grad():
        if copy is None:
            shards.local(parameter).copy_(shards.part_of(whole.detach(), parameter))
        else:
            shards.store_trained_copy(parameter, whole.detach())
    changes.written((parameter,))


def _stand_in(path: str, value: Any) -> Any:
    """An object that has one attribute, at a path."""
    for name in reversed(path.split(".")):
        value = SimpleNamespace(**{name: value})
    return value
