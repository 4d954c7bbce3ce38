"""Recurrent layers: LSTM, GRU and RNN, every option of torch's.

Every weight is a site of its own. A loop over time steps cannot be traced for every length, so
these layers are driven: the trace shows the products alone, and the driver runs torch's own forward
(its checks, its batching and packing, what it returns) with this file's loop in the place of the
one fused call. A step is one of ``cells.py``.

Source: AIHWKIT-Lightning's ``nn/modules/rnn``, where each weight is an ``AnalogLinear``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from analogfx.modules.kinds import cells
from analogfx.modules.kinds.cells import Gates, State


class Products(Protocol):
    """The products of a driven module, in the order of its weights."""

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """One product: (..., I) to (..., O)."""

    def apart(self, number: int) -> bool:
        """Whether the numbers of a product depend on which calls its inputs are spread over."""


Driver = Callable[[nn.Module, Products, tuple[Any, ...], dict[str, Any]], Any]

_GATES: dict[str, Gates] = {
    "LSTM": cells.lstm,
    "GRU": cells.gru,
    "RNN_TANH": cells.vanilla_tanh,
    "RNN_RELU": cells.vanilla_relu,
}
"""The step of a layer, by ``nn.RNNBase.mode``."""

_FUSED = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""The calls of ``torch._VF`` that run a whole layer."""


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


@_disable_dynamo
def _drive(
    module: Any, products: Products, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
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
    """Answers torch's fused call for a whole layer with the loop below."""

    def __init__(self, module: Any, products: Products) -> None:
        super().__init__()
        self.module = module
        self.products = products

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in _FUSED:
            return func(*args, **(kwargs or {}))
        if isinstance(args[1], Tensor) and isinstance(args[3], list):  # packed: rows and batches
            rows, sizes, states = args[0], args[1].tolist(), args[2]
            y, states = _layers(self.module, self.products, rows, sizes, _as_tuple(states))
            return y, *states
        x, states, batch_first = args[0], args[1], args[-1]
        x = x.transpose(0, 1) if batch_first else x
        sizes = [x.shape[1]] * x.shape[0]
        rows = x.reshape(-1, x.shape[-1])
        y, states = _layers(self.module, self.products, rows, sizes, _as_tuple(states))
        y = y.view(*x.shape[:2], -1)
        return (y.transpose(0, 1) if batch_first else y), *states


def _as_tuple(states: Any) -> State:
    return (states,) if isinstance(states, Tensor) else tuple(states)


class _Cell(NamedTuple):
    """One layer in one direction: the numbers of its products."""

    x: int
    h: int
    projection: int | None


def _layers(
    module: Any, products: Products, rows: Tensor, sizes: list[int], states: State
) -> tuple[Tensor, State]:
    """Run all layers.

    Args:
        rows: (N, I), the rows of every time step one after another.
        sizes: rows of each time step, which never grow.
        states: each (layers * directions, rows of the first step, hidden size).

    Returns:
        (N, directions * hidden size), and states of the shape that they had.
    """
    numbers = itertools.count()
    last: list[State] = []
    gates = _GATES[module.mode]
    for layer in range(module.num_layers):
        if layer and module.dropout and module.training:
            rows = F.dropout(rows, module.dropout)
        outputs = []
        for reverse in (False, True)[: 1 + module.bidirectional]:
            projection = module.proj_size > 0
            cell = _Cell(next(numbers), next(numbers), next(numbers) if projection else None)
            first = tuple(state[len(last)] for state in states)
            output, after = _run(products, cell, gates, rows, sizes, first, reverse)
            outputs.append(output)
            last.append(after)
        rows = torch.cat(outputs, dim=-1) if module.bidirectional else outputs[0]
    return rows, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _run(
    products: Products,
    cell: _Cell,
    gates: Gates,
    rows: Tensor,
    sizes: list[int],
    first: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction over all time steps: its outputs (N, hidden), its last state.

    Sequences end at different steps: rows of a state that has reached its end, or in reverse has
    not reached its start, wait.
    """
    gates_x = _of_inputs(products, cell.x, rows, sizes, reverse)
    steps = range(len(sizes))[:: -1 if reverse else 1]
    state = tuple(part.to(gates_x[0].dtype) for part in first)
    outputs: list[Any] = [None] * len(sizes)
    for t in steps:
        now = tuple(_leading(part, sizes[t]) for part in state)
        made = gates(gates_x[t], products(cell.h, now[0]), now)
        if cell.projection is not None:
            made = products(cell.projection, made[0]), *made[1:]
        outputs[t] = made[0]
        state = tuple(
            new if len(new) == len(old) else torch.cat([new, old[len(new) :]])
            for new, old in zip(made, state, strict=True)
        )
    return torch.cat(outputs), state


def _leading(state: Tensor, rows: int) -> Tensor:
    return state if len(state) == rows else state[:rows]


def _of_inputs(
    products: Products, number: int, rows: Tensor, sizes: list[int], reverse: bool
) -> Sequence[Tensor]:
    """The product of every time step's input, by time step: in one call where that is the same."""
    if not products.apart(number):
        return products(number, rows).split(sizes)
    parts = rows.split(sizes)
    made = [products(number, part) for part in (reversed(parts) if reverse else parts)]
    return made[::-1] if reverse else made


FORWARDS: dict[Callable[..., Any], Callable[..., Any]] = {
    layer.forward: _products for layer in (nn.LSTM, nn.GRU, nn.RNN)
}
DRIVERS: dict[Callable[..., Any], Driver] = {_products: _drive}
