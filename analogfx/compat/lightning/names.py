"""Lightning's methods on a model and on its analog layers, as a class in front of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import analog_layers, named_analog_layers
from analogfx.training import clip_weights, quantize_weights

_MISSING = object()


class NamedModule:
    """What Lightning's root module has beside torch's."""

    def analog_layers(self) -> Iterator[AnalogModule]:
        """Every analog layer, this one included."""
        return analog_layers(self)  # type: ignore[arg-type]

    def named_analog_layers(self) -> Iterator[tuple[str, AnalogModule]]:
        """Every analog layer with its path."""
        return named_analog_layers(self)  # type: ignore[arg-type]

    def apply_to_analog_layers(self, fn: Callable[[Any], Any]) -> NamedModule:
        """Call a function on every analog layer."""
        for layer in self.analog_layers():
            fn(layer)
        return self

    def clip_weights(self) -> None:
        """See :func:`analogfx.clip_weights`."""
        clip_weights(self)  # type: ignore[arg-type]

    def quantize_weights(self) -> None:
        """See :func:`analogfx.quantize_weights`."""
        quantize_weights(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module without these names, which it gets back."""
        made: Any = super().__reduce_ex__(protocol)
        how = made[:2] if isinstance(self, AnalogModule) else (_blank, (_below(type(self)),))
        return (_again, how, *made[2:])


class NamedLayer(NamedModule):
    """What Lightning's layers have beside torch's, and the input's keyword ``inp``."""

    def forward(self, *args: Any, inp: Any = _MISSING, **kwargs: Any) -> Any:
        """The layer's own forward, whose first argument has Lightning's name, too."""
        if inp is not _MISSING:
            args = (inp, *args)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def set_weights(self, weight: Tensor) -> None:
        """As ``set_weights_and_biases``, without a bias."""
        self.set_weights_and_biases(weight)  # type: ignore[attr-defined]


def name(module: nn.Module) -> nn.Module:
    """Give a module Lightning's names, in place."""
    if not isinstance(module, NamedModule):
        module.__class__ = _named(type(module))  # type: ignore[arg-type]
    return module


def unname(module: nn.Module) -> nn.Module:
    """Undo :func:`name`, in place."""
    if isinstance(module, NamedModule):
        module.__class__ = _below(type(module))  # type: ignore[assignment]
    return module


@functools.cache
def _named(cls: type[nn.Module]) -> type[nn.Module]:
    front = NamedLayer if issubclass(cls, AnalogModule) else NamedModule
    about = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (front, cls), about)


def _below(cls: type) -> type[nn.Module]:
    """The class behind the names."""
    return next(base for base in cls.__bases__ if issubclass(base, nn.Module))


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _again(make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """A module without contents, with the names, for unpickling."""
    return name(make(*args))
