"""What a user reads and sets by name on an analog layer.

These names stand behind the layer's own class, so that an attribute, method, parameter or submodule
of the same name that its author gave it is what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from analogfx import shards
from analogfx.config import TorchInferenceRPUConfig
from analogfx.kernels import changes
from analogfx.modules.program import AnalogSite
from analogfx.modules.remember import clip_names, reset_state
from analogfx.modules.write_back import parameter_of

ValueT = TypeVar("ValueT")


class _Reading(Generic[ValueT]):
    """A value that is read off a layer, unless the layer has something of that name itself."""

    def __init__(self, read: Callable[[Any], ValueT]) -> None:
        self.read = read
        self.__doc__ = read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        own = layer.__dict__
        if self.name in own:
            return own[self.name]
        if any(self.name in own[kind] for kind in ("_parameters", "_buffers", "_modules")):
            raise AttributeError(self.name)  # so that nn.Module looks there
        return self.read(layer)

    def __set__(self, layer: Any, value: Any) -> None:
        if self.name not in layer.__dict__:
            raise AttributeError(
                f"{self.name} is read from what analogize() made of {type(layer).__name__}; "
                "analogfx.set_config(layer, config) changes it"
            )
        layer.__dict__[self.name] = value


class LayerAttributes:
    """The public names of an analog layer."""

    @_Reading
    def rpu_config(self) -> TorchInferenceRPUConfig:
        """A copy of the layer's config, to read. ``analogfx.set_config`` changes the config."""
        return copy.deepcopy(_placement(self).config)

    @_Reading
    def in_sizes(self) -> list[int] | dict[str, list[int]]:
        """Rows of each tile along the inputs; by parameter where a layer has several products."""
        sites: tuple[AnalogSite, ...] = _placement(self).sites
        if len(sites) == 1:
            return list(sites[0].in_sizes)
        return {site.name: list(site.in_sizes) for site in sites}

    def get_weights_and_biases(self) -> tuple[Tensor, Tensor | None]:
        """The layer's parameters themselves, no copies: the weight, and the bias or None.

        Shapes are torch's: ``(out_features, in_features)`` of a linear layer.

        Raises:
            TypeError: the layer multiplies by several weights.
            CaptureError: the weight is computed from its parameter.
        """
        return _weight_and_bias(self)

    def set_weights_and_biases(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write values to the layer's parameters; learned clips start from the new weight.

        Args:
            weight: of the weight's shape, any dtype and device.
            bias: of the bias's shape; None leaves the bias as it is.

        Raises:
            TypeError: the layer multiplies by several weights.
            ValueError: a shape is another, or a bias is given to a layer without one. Nothing is
                written.
            CaptureError: the weight is computed from its parameter.
        """
        pairs = zip(("weight", "bias"), _weight_and_bias(self), (weight, bias), strict=True)
        wanted: list[tuple[nn.Parameter, Tensor]] = []
        for name, own, value in pairs:
            if value is None:
                continue
            if own is None or own.shape != value.shape:
                has = "none" if own is None else f"the shape {list(own.shape)}"
                raise ValueError(
                    f"{type(self).__name__}: the {name} has {has}, found {list(value.shape)}"
                )
            wanted.append((own, value))
        with torch.no_grad():
            for own, value in wanted:
                shards.local(own).copy_(shards.part_of(value.to(own.device), own))
                changes.written((own,))
        placement = _placement(self)
        clips = clip_names(placement.sites, placement.resolved)
        reset_state(self, placement.sites, placement.resolved, clips)  # type: ignore[arg-type]


def _placement(layer: Any) -> Any:
    layer._analog.follow(layer)
    return layer._analog


def _weight_and_bias(layer: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    sites: tuple[AnalogSite, ...] = _placement(layer).sites
    if len(sites) != 1:
        raise TypeError(
            f"{type(layer).__name__} multiplies by {len(sites)} weights "
            f"({', '.join(site.name for site in sites)}): read and write its parameters by name"
        )
    weight = parameter_of(layer, sites[0])
    path, _, name = sites[0].name.rpartition(".")
    beside = layer.get_submodule(path)._parameters.get("bias") if name == "weight" else None
    return weight, beside
