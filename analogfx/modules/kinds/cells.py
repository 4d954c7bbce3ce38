"""Recurrent cells, in products and gates of :mod:`analogfx.passes.cells`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analogfx.passes.cells import gru, lstm, vanilla_relu, vanilla_tanh


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
