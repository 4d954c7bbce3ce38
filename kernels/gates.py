"""Gates of recurrent cells, a step forward in place, and their derivatives for all steps at once.

The formulas and the order of the gates are torch's (``nn.LSTMCell``, ``nn.GRUCell``,
``nn.RNNCell``). A derivative is linear in that of the next state: its factors, *slopes*,
are made of what all steps have kept in a few ops over all of them, and a step multiplies by them.

Shapes: N sequences, R rows of all steps together, H features. A tensor of several gates has them
side by side, (N, gates * H).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Slopes(NamedTuple):
    """Factors of a cell's derivatives, by row of all steps."""

    x: Tensor | None
    """(R, gates, H): gradient of the product of x by that of c (LSTM's first three) or of h; None
    where that is the gradient of the product of h."""
    h: Tensor
    """(R, gates, H), the same of the product of h."""
    carry: Tensor | None
    """(R, H): gradient of the state before by that of the state after, past the products."""
    to_cell: Tensor | None = None
    """(R, H): gradient of an LSTM's c by that of its output."""

    def at(self, rows: slice) -> Slopes:
        """Those of some rows."""
        x, h, carry, to_cell = (None if factors is None else factors[rows] for factors in self)
        assert h is not None
        return Slopes(x, h, carry, to_cell)

    def back(self, d: Tensor, d_cell: Tensor | None, h: Tensor, x: Tensor) -> Tensor | None:
        """The derivatives of a step.

        Args:
            d: (N, H), the gradient of h.
            d_cell: (N, H), that of an LSTM's c, which becomes that of the c before.
            h, x: (N, gates, H), where to write those of the products.

        Returns:
            What the gradient of the h before has past the product of h, (N, H); None for nothing.
        """
        if d_cell is not None:
            assert self.to_cell is not None and self.carry is not None
            d_cell.addcmul_(d, self.to_cell)
            torch.mul(self.h[:, :3], d_cell.unsqueeze(1), out=h[:, :3])
            torch.mul(self.h[:, 3], d, out=h[:, 3])
            d_cell.mul_(self.carry)
            return None
        torch.mul(self.h, d.unsqueeze(1), out=h)
        if self.x is not None:
            torch.mul(self.x, d.unsqueeze(1), out=x)
        return None if self.carry is None else d * self.carry


class Cell(Protocol):
    """One kind of cell."""

    gates: int
    """Of the products."""
    kept: int
    """Blocks of H that a step keeps for the backward."""
    apart: bool
    """Whether the products of x and of h have gradients of their own."""

    def step(self, x: Tensor, h: Tensor, state: Tensor, kept: Tensor, out: Tensor) -> None:
        """The next state.

        Args:
            x, h: (N, gates * H), the products; overwritten.
            state: (N, H), c of an LSTM, which becomes the next one; h of others.
            kept: (N, kept * H), written.
            out: (N, H), the next h, written.
        """

    def slopes(self, kept: Tensor, before: Tensor, after: Tensor) -> Slopes:
        """The factors of all steps.

        Args:
            kept: (R, kept * H).
            before, after: (R, H), the state before and after every step: c of an LSTM, else h.
        """


class _LSTM:
    """c' = f c + i g, h' = o tanh(c'); in the order i, f, g, o, all of which are kept."""

    gates, kept, apart = 4, 4, False

    def step(self, x: Tensor, h: Tensor, state: Tensor, kept: Tensor, out: Tensor) -> None:
        torch.add(x, h, out=kept)
        size = out.shape[1]
        i, f, g, o = torch.split_with_sizes(kept, (size,) * 4, 1)
        kept[:, : 2 * size].sigmoid_()  # i and f
        torch.mul(i, g.tanh_(), out=out)
        state.mul_(f).add_(out)
        torch.tanh(state, out=out).mul_(o.sigmoid_())

    def slopes(self, kept: Tensor, before: Tensor, after: Tensor) -> Slopes:
        made = torch.empty_like(kept).unflatten(1, (4, -1))
        i, f, g, o = kept.chunk(4, 1)
        tanh = torch.tanh(after)
        for n, (gate, other) in enumerate(((i, g), (f, before))):
            torch.mul(gate, 1 - gate, out=made[:, n]).mul_(other)
        torch.mul(g, g, out=made[:, 2]).neg_().add_(1).mul_(i)
        torch.mul(o, 1 - o, out=made[:, 3]).mul_(tanh)
        return Slopes(None, made, f, tanh.square_().neg_().add_(1).mul_(o))


class _GRU:
    """h' = n + z (h - n), n = tanh(n_x + r n_h); in the order r, z, n. Keeps r, z, n and n_h."""

    gates, kept, apart = 3, 4, True

    def step(self, x: Tensor, h: Tensor, state: Tensor, kept: Tensor, out: Tensor) -> None:
        size = out.shape[1]
        r, z, n, n_h = torch.split_with_sizes(kept, (size,) * 4, 1)
        r_z = kept[:, : 2 * size]
        torch.add(x[:, : 2 * size], h[:, : 2 * size], out=r_z).sigmoid_()
        n_h.copy_(h[:, 2 * size :])
        torch.mul(r, n_h, out=n).add_(x[:, 2 * size :]).tanh_()
        torch.sub(state, n, out=out).mul_(z).add_(n)

    def slopes(self, kept: Tensor, before: Tensor, after: Tensor) -> Slopes:
        r, z, n, n_h = kept.chunk(4, 1)
        of_h = kept.new_empty(kept.shape[0], 3, n.shape[1])
        of_x = torch.empty_like(of_h)
        of_n = torch.mul(n, n, out=of_x[:, 2]).neg_().add_(1).mul_(1 - z)
        torch.mul(r, 1 - r, out=of_h[:, 0]).mul_(n_h).mul_(of_n)
        torch.mul(z, 1 - z, out=of_h[:, 1]).mul_(before - n)
        torch.mul(of_n, r, out=of_h[:, 2])
        of_x[:, :2] = of_h[:, :2]
        return Slopes(of_x, of_h, z)


class _Vanilla:
    """h' = tanh or relu of the sum of the products."""

    gates, kept, apart = 1, 0, False

    def __init__(self, relu: bool) -> None:
        self.relu = relu

    def step(self, x: Tensor, h: Tensor, state: Tensor, kept: Tensor, out: Tensor) -> None:
        torch.add(x, h, out=out)
        _ = out.relu_() if self.relu else out.tanh_()

    def slopes(self, kept: Tensor, before: Tensor, after: Tensor) -> Slopes:
        made = (after > 0).to(after.dtype) if self.relu else 1 - after * after
        return Slopes(None, made.unsqueeze(1), None)


CELLS: dict[str, Cell] = {
    "lstm": _LSTM(),
    "gru": _GRU(),
    "rnn_tanh": _Vanilla(relu=False),
    "rnn_relu": _Vanilla(relu=True),
}
"""By the name of torch's function for a layer of such cells."""
