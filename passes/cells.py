"""Recurrent cells: two products, and gates between them that stay digital.

The formulas and the order of the gates are torch's (``nn.LSTMCell``, ``nn.GRUCell``,
``nn.RNNCell``), and AIHWKIT-Lightning's (``nn/modules/rnn/cells.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _lstm_cell(
    input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    state = hx[0], hx[1]
    return as_one(*lstm(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state))


def as_one(*values: Any) -> Any:
    """Values of a graph as one, a tuple."""
    return values[0].tracer.create_proxy("call_function", _tuple, values, {})


def _tuple(*values: Any) -> tuple[Any, ...]:
    return values


def _cell(
    gates: Gates, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    return gates(F.linear(input, w_ih, b_ih), F.linear(hx, w_hh, b_hh), (hx,))[0]


RULES: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: partial(_cell, gru),
    torch.rnn_tanh_cell: partial(_cell, vanilla_tanh),
    torch.rnn_relu_cell: partial(_cell, vanilla_relu),
}
"""What computes the same as a function, by the function."""
