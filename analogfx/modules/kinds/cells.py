"""Recurrent cells: two products, and gates between them that stay digital.

The formulas and the order of the gates are torch's (``nn.LSTMCell``, ``nn.GRUCell``,
``nn.RNNCell``), and AIHWKIT-Lightning's (``nn/modules/rnn/cells.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM, each (..., hidden size)."""

Gates = Callable[[Tensor, Tensor, State], State]
"""The next state from the product of the input, the product of h, and the state before."""


def lstm(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """An LSTM's next state: (o tanh(c'), c') with c' = f c + i g; gates in the order i, f, g, o."""
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """A GRU's next state: n + z (h - n), n = tanh(n_x + r n_h); gates in the order r, z, n."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, dim=-1), gates_h.chunk(3, dim=-1)
    new = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (new + torch.sigmoid(z_x + z_h) * (state[0] - new),)


def vanilla_tanh(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """A plain recurrent layer's next state."""
    return (torch.tanh(gates_x + gates_h),)


def vanilla_relu(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    """The same with relu."""
    return (torch.relu(gates_x + gates_h),)


def _lstm_cell(self: Any, input: Any, hx: Any = None) -> tuple[Tensor, Tensor]:
    gates = F.linear(input, self.weight_ih, self.bias_ih)
    if hx is None:
        h = c = torch.zeros_like(gates[..., : self.hidden_size])
    else:
        h, c = hx
    h, c = lstm(gates, F.linear(h, self.weight_hh, self.bias_hh), (h, c))
    return h, c


def _gru_cell(self: Any, input: Any, hx: Any = None) -> Tensor:
    gates = F.linear(input, self.weight_ih, self.bias_ih)
    h = torch.zeros_like(gates[..., : self.hidden_size]) if hx is None else hx
    return gru(gates, F.linear(h, self.weight_hh, self.bias_hh), (h,))[0]


def _vanilla_cell(self: Any, input: Any, hx: Any = None) -> Tensor:
    gates = F.linear(input, self.weight_ih, self.bias_ih)
    h = torch.zeros_like(gates[..., : self.hidden_size]) if hx is None else hx
    step = {"tanh": vanilla_tanh, "relu": vanilla_relu}[self.nonlinearity]
    return step(gates, F.linear(h, self.weight_hh, self.bias_hh), (h,))[0]


FORWARDS: dict[Callable[..., Any], Callable[..., Any]] = {
    nn.LSTMCell.forward: _lstm_cell,
    nn.GRUCell.forward: _gru_cell,
    nn.RNNCell.forward: _vanilla_cell,
}
