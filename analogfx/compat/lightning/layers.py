"""Lightning's names of layers: thin names over layers of torch that were made analog.

``isinstance`` asks whether a layer is analog and of the torch class, however it was made. A call
makes the torch layer and analogizes it; the layer is of torch's class, not of the one called.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from analogfx.api import analogize, to_digital
from analogfx.compat.lightning.names import NamedModule, name, unname
from analogfx.errors import ConfigError, Conflict
from analogfx.modules.analog_module import AnalogModule


class _Kind(type):
    """A name for the analog layers of one torch class."""

    digital: Any
    """The torch class or classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = cls.digital
        order = [*inspect.signature(made).parameters]
        if len(args) > len(order):  # Lightning's last parameter by position
            *args, kwargs["rpu_config"] = args  # type: ignore[assignment]
        return cls.made(made, args, **kwargs)

    def made(cls, made: Any, args: Any, rpu_config: Any = None, **kwargs: Any) -> Any:
        """A new layer of a torch class, with torch's arguments and a config."""
        if rpu_config is None:
            raise ConfigError([Conflict("rpu_config", None, "a TorchInferenceRPUConfig")])
        return name(analogize(made(*args, **kwargs), rpu_config, inplace=True))

    def __instancecheck__(cls, layer: Any) -> bool:
        return isinstance(layer, AnalogModule) and isinstance(layer, cls.digital)

    def from_digital(cls, module: nn.Module, rpu_config: Any) -> Any:
        """The analog layer of a digital one, which is copied."""
        return name(analogize(module, rpu_config))

    def to_digital(cls, module: nn.Module) -> nn.Module:
        """The digital layer of an analog one, which is copied."""
        return unname(to_digital(module))


class _Layer:
    """Base of the names below."""

    def __init_subclass__(cls) -> None:
        if not cls.__module__.startswith(__name__.rpartition(".")[0]):
            raise TypeError(
                f"{cls.__bases__[0].__name__} is a name, not a class to inherit from: inherit from "
                "torch's class, and analogize that"
            )


class AnalogLinear(_Layer, metaclass=_Kind):
    """``AnalogLinear(in_features, out_features, bias, device, dtype, rpu_config)``.

    Example:
        >>> AnalogLinear(8, 4, rpu_config=TorchInferenceRPUConfig())
        AnalogLinear(in_features=8, out_features=4, bias=True, tiles=1x1)
    """

    digital = nn.Linear


class AnalogConv1d(_Layer, metaclass=_Kind):
    """``AnalogConv1d``, with the arguments of ``nn.Conv1d`` and ``rpu_config``."""

    digital = nn.Conv1d


class AnalogConv2d(_Layer, metaclass=_Kind):
    """``AnalogConv2d``, with the arguments of ``nn.Conv2d`` and ``rpu_config``."""

    digital = nn.Conv2d


class AnalogConv3d(_Layer, metaclass=_Kind):
    """``AnalogConv3d``, with the arguments of ``nn.Conv3d`` and ``rpu_config``."""

    digital = nn.Conv3d


class AnalogVanillaRNNCell(_Layer, metaclass=_Kind):
    """Names ``nn.RNN`` for :class:`AnalogRNN`; by itself an analog ``nn.RNNCell``."""

    digital, layer = nn.RNNCell, nn.RNN


class AnalogLSTMCell(_Layer, metaclass=_Kind):
    """Names ``nn.LSTM`` for :class:`AnalogRNN`; by itself an analog ``nn.LSTMCell``."""

    digital, layer = nn.LSTMCell, nn.LSTM


class AnalogGRUCell(_Layer, metaclass=_Kind):
    """Names ``nn.GRU`` for :class:`AnalogRNN`; by itself an analog ``nn.GRUCell``."""

    digital, layer = nn.GRUCell, nn.GRU


class _Recurrent(_Kind):
    """The name whose torch class its first argument says."""

    def __call__(
        cls,
        cell: Any,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidir: bool = False,
        dropout: float = 0.0,
        proj_size: int = 0,
        xavier: bool = False,
        device: Any = None,
        dtype: Any = None,
        rpu_config: Any = None,
    ) -> Any:
        if not hasattr(cell, "layer"):
            raise TypeError(
                f"cell = {cell!r}: expected AnalogLSTMCell, AnalogGRUCell or AnalogVanillaRNNCell"
            )
        options: dict[str, Any] = {"proj_size": proj_size} if proj_size else {}
        options.update(batch_first=batch_first, dropout=dropout, bidirectional=bidir)
        options.update(device=device, dtype=dtype, rpu_config=rpu_config)
        layer = cls.made(cell.layer, (input_size, hidden_size, num_layers), bias=bias, **options)
        if xavier:
            for parameter_name, parameter in layer.named_parameters():
                if parameter_name.startswith("weight"):
                    nn.init.xavier_uniform_(parameter)
                elif parameter_name.startswith("bias"):
                    nn.init.zeros_(parameter)
        return layer


class AnalogRNN(_Layer, metaclass=_Recurrent):
    """``AnalogRNN(cell, input_size, hidden_size, ...)``: torch's RNN, LSTM or GRU, analog.

    Calls, states and names of parameters are torch's, not those of Lightning's lists of tuples.
    """

    digital = (nn.LSTM, nn.GRU, nn.RNN)


class _Container(type):
    """A name for modules that have Lightning's methods."""

    digital: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return name(cls.digital(*args, **kwargs))

    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, NamedModule) and isinstance(module, cls.digital)

    def from_digital(cls, module: nn.Module, *_: Any) -> nn.Module:
        """The module itself, with Lightning's methods."""
        return name(module)

    def to_digital(cls, module: nn.Module) -> nn.Module:
        """The module itself, without Lightning's methods."""
        return unname(module)


class AnalogSequential(_Layer, metaclass=_Container):
    """``nn.Sequential`` with Lightning's methods."""

    digital = nn.Sequential


class _Wrapper(_Container):
    def __call__(cls, module: nn.Module) -> Any:
        return name(module)

    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, NamedModule) and not isinstance(module, AnalogModule)


class AnalogWrapper(_Layer, metaclass=_Wrapper):
    """``AnalogWrapper(model)``: the model itself, with Lightning's methods.

    It has ``analog_layers()``, ``named_analog_layers()``, ``apply_to_analog_layers(fn)``,
    ``clip_weights()`` and ``quantize_weights()``.
    """

    digital = nn.Module


class _Any(_Wrapper):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, (AnalogModule, NamedModule))


class AnalogLayerBase(_Layer, metaclass=_Any):
    """Whether a module is an analog layer, or has Lightning's methods: for ``isinstance``."""

    digital = nn.Module


KINDS, CONTAINERS = _Kind, _Container
"""Types of the names of layers, and of those of modules that hold layers."""
