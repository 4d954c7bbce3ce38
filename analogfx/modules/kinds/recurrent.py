"""Recurrent layers: LSTM, GRU and RNN, every option of torch's.

Every weight is a site of its own. A loop over time steps cannot be traced for every length, so
these layers are driven: the trace shows the products alone, and the driver runs torch's own forward
(its checks, its batching and packing, what it returns) with the loop of
:mod:`analogfx.passes.recurrent` in the place of the one fused call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analogfx.passes.cells import State
from analogfx.passes.recurrent import GATES, Even, Layers, Packed, Products, run


class Driver(NamedTuple):
    """What calls the products of a driven module."""

    run: Callable[[nn.Module, Products, tuple[Any, ...], dict[str, Any]], Any]
    """The forward: of a module, its products, and the arguments of a call."""
    biases: Callable[[nn.Module], list[str | None]]
    """The names of the products' biases, None for one without."""


def _products(self: Any, inputs: Any) -> tuple[Tensor, ...]:
    """The products of every layer and direction, in the order of the module's weights."""
    return tuple(
        F.linear(inputs[number], getattr(self, weight), getattr(self, bias) if bias else None)
        for number, (weight, bias) in enumerate(_weights(self))
    )


def _weights(module: Any) -> list[tuple[str, str | None]]:
    """Names of the weights, each with its bias: those of x, of h, and of a projection."""
    names = []
    for layer in range(module.num_layers):
        for reverse in ("", "_reverse")[: 1 + module.bidirectional]:
            place = f"l{layer}{reverse}"
            names += [
                (f"weight_{of}_{place}", f"bias_{of}_{place}" if module.bias else None)
                for of in ("ih", "hh")
            ]
            names += [(f"weight_hr_{place}", None)] * bool(module.proj_size)
    return names


def _drive(module: Any, products: Products, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _InPlaceOfFused(module, products):
        return type(module).digital_forward(_WithoutFlatWeights(module), *args, **kwargs)


class _WithoutFlatWeights:
    """A layer as its own forward sees it, which is not to gather its weights: nobody reads them."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _update_flat_weights(self) -> None:
        pass


class _InPlaceOfFused(TorchFunctionMode):
    """Answers torch's fused call for a whole layer with a loop over its products."""

    def __init__(self, module: Any, products: Products) -> None:
        super().__init__()
        self.module = module
        self.products = products

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = getattr(func, "__name__", "")
        if kind not in GATES:
            return func(*args, **(kwargs or {}))
        module = self.module
        layers = Layers(
            kind,
            module.num_layers,
            module.bidirectional,
            module.proj_size > 0,
            module.dropout if module.training else 0.0,
        )
        if isinstance(args[3], list):  # packed: rows, and how many sequences have each step
            steps = Packed(args[1].tolist())
            y, states = run(layers, self.products, args[0], steps, _as_tuple(args[2]))
            return y, *states
        x, batch_first = args[0], args[-1]
        x = x.transpose(0, 1) if batch_first else x
        y, states = run(layers, self.products, x, Even(x.shape[0]), _as_tuple(args[1]))
        return (y.transpose(0, 1) if batch_first else y), *states


def _as_tuple(states: Any) -> State:
    return (states,) if isinstance(states, Tensor) else tuple(states)


FORWARDS: dict[Callable[..., Any], Callable[..., Any]] = {
    layer.forward: _products for layer in (nn.LSTM, nn.GRU, nn.RNN)
}
DRIVERS: dict[Callable[..., Any], Driver] = {
    _products: Driver(_drive, lambda module: [bias for _, bias in _weights(module)])
}
