"""Recurrent layers of torch's: every layer and direction over all time steps, in products.

One loop for whoever runs it: on tensors by a driven module, on proxies where ``expand`` unrolls a
call of known length in a graph. A step is one of ``cells.py``.

Source: AIHWKIT-Lightning's ``nn/modules/rnn``, where each weight is an ``AnalogLinear`` that is
called in every time step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from analogfx.passes import cells
from analogfx.passes.cells import Gates, State

GATES: dict[str, Gates] = {
    "lstm": cells.lstm,
    "gru": cells.gru,
    "rnn_tanh": cells.vanilla_tanh,
    "rnn_relu": cells.vanilla_relu,
}
"""The step of a layer, by the name of torch's function that runs it."""


class Products(Protocol):
    """The products of a recurrent layer: x's, h's and a projection's, layer by layer."""

    def __call__(self, number: int, x: Any) -> Any:
        """One product: (..., I) to (..., O)."""

    def apart(self, number: int) -> bool:
        """Whether the numbers of a product depend on which calls its inputs are spread over."""

    def whole(self, direction: Direction, rows: Any, sizes: list[int], state: State) -> Any:
        """All steps of a direction in one call.

        Args:
            rows: (rows of all steps, I).
            sizes: how many sequences have each step.
            state: each (sequences, features).

        Returns:
            (rows of all steps, O) and the last state; None where only single calls will do.
        """


@dataclass(frozen=True)
class Direction:
    """One layer in one direction."""

    kind: str
    """A name of :data:`GATES`."""
    numbers: list[int]
    """Of the products of x, of h, and of a projection if there is one."""
    reverse: bool


@dataclass(frozen=True)
class Layers:
    """A stack of layers."""

    kind: str
    """A name of :data:`GATES`."""
    count: int
    bidirectional: bool
    projected: bool
    """Whether an LSTM's h is projected to fewer features."""
    dropout: float
    """Between layers; 0 where none is to be drawn."""


class Steps(Protocol):
    """How the rows of all time steps lie in one tensor."""

    count: int

    def parts(self, rows: Any) -> Sequence[Any]:
        """The rows of every step."""

    def joined(self, parts: list[Any]) -> Any:
        """The rows of every step in one tensor."""

    def running(self, step: int) -> int | None:
        """How many sequences, the first ones, have that step; None for all."""

    def flat(self, rows: Any) -> tuple[Any, list[int]]:
        """The rows of all steps, (rows, I), and how many sequences have each step."""

    def unflat(self, rows: Any) -> Any:
        """Rows as they were before :meth:`flat`."""


class Even:
    """(T, N, I): all sequences are of one length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def parts(self, rows: Any) -> Sequence[Any]:
        """The rows of every step, (N, I)."""
        made: Sequence[Any] = rows.unbind(0)
        return made

    def joined(self, parts: list[Any]) -> Any:
        """(T, N, O)."""
        return torch.stack(parts)

    def running(self, step: int) -> int | None:
        """All of them."""
        return None

    def flat(self, rows: Any) -> tuple[Any, list[int]]:
        """(T * N, I), and N for every step."""
        return rows.flatten(0, 1), [rows.shape[1]] * self.count

    def unflat(self, rows: Any) -> Any:
        """(T, N, O)."""
        return rows.unflatten(0, (self.count, -1))


class Packed:
    """(rows of all steps, I): sequences in the order of their lengths, as torch packs them."""

    def __init__(self, sizes: list[int]) -> None:
        """``sizes``: how many sequences have each step."""
        self.count = len(sizes)
        self._sizes = sizes

    def parts(self, rows: Any) -> Sequence[Any]:
        """The rows of every step, (sequences, I)."""
        made: Sequence[Any] = rows.split(self._sizes)
        return made

    def joined(self, parts: list[Any]) -> Any:
        """(rows of all steps, O)."""
        return torch.cat(parts)

    def running(self, step: int) -> int | None:
        """The first ones, which are the longest."""
        size = self._sizes[step]
        return size if size < self._sizes[0] else None

    def flat(self, rows: Any) -> tuple[Any, list[int]]:
        """As they are."""
        return rows, self._sizes

    def unflat(self, rows: Any) -> Any:
        """As they are."""
        return rows


def run(
    layers: Layers, products: Products, rows: Any, steps: Steps, states: State
) -> tuple[Any, State]:
    """Run all layers.

    Args:
        rows: (..., I), the inputs of all time steps as ``steps`` has them.
        states: each (layers * directions, sequences, features).

    Returns:
        (..., directions * features), and the last states in the shape of the first.
    """
    numbers = itertools.count()
    last: list[State] = []
    for layer in range(layers.count):
        if layer and layers.dropout:
            rows = F.dropout(rows, layers.dropout)
        outputs = []
        for reverse in (False, True)[: 1 + layers.bidirectional]:
            mine = [next(numbers) for _ in range(2 + layers.projected)]
            direction = Direction(layers.kind, mine, reverse)
            state = tuple(state[len(last)] for state in states)
            output, after = _run_direction(direction, products, rows, steps, state)
            outputs.append(output)
            last.append(after)
        rows = torch.cat(outputs, dim=-1) if layers.bidirectional else outputs[0]
    return rows, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _run_direction(
    direction: Direction, products: Products, rows: Any, steps: Steps, state: State
) -> tuple[Any, State]:
    """Outputs (..., features) and the last state.

    Sequences end at different steps: a state whose sequence has ended, or in reverse has not
    begun, waits.
    """
    flat, sizes = steps.flat(rows)
    whole = products.whole(direction, flat, sizes, state)
    if whole is not None:
        return steps.unflat(whole[0]), whole[1]
    of_x, of_h, *of_projection = direction.numbers
    order = range(steps.count)[:: -1 if direction.reverse else 1]
    gates_x = _of_inputs(of_x, products, rows, steps, order)
    state = tuple(part.type_as(gates_x[0]) for part in state)
    outputs: list[Any] = [None] * steps.count
    for t in order:
        size = steps.running(t)
        now = state if size is None else tuple(part[:size] for part in state)
        made = GATES[direction.kind](gates_x[t], products(of_h, now[0]), now)
        for number in of_projection:
            made = products(number, made[0]), *made[1:]
        outputs[t] = made[0]
        if size is not None:
            pairs = zip(made, state, strict=True)
            made = tuple(torch.cat([new, old[size:]]) for new, old in pairs)
        state = made
    return steps.joined(outputs), state


def _of_inputs(
    number: int, products: Products, rows: Any, steps: Steps, order: Sequence[int]
) -> Any:
    """The product of every step's input, by step: in one call where that is the same."""
    if not products.apart(number):
        return steps.parts(products(number, rows))
    parts = steps.parts(rows)
    made = {t: products(number, parts[t]) for t in order}
    return [made[t] for t in range(steps.count)]


# ------------------------------------------------------------------------------- calls in graphs


class _InGraph:
    """The products of a call in a graph."""

    def __init__(self, weights: Sequence[Any], training: bool) -> None:
        self.weights, self.training = weights, training

    def __call__(self, number: int, x: Any) -> Any:
        return F.linear(x, *self.weights[number])

    def apart(self, number: int) -> bool:
        """In training every step has noise and statistics of its own."""
        return self.training

    def whole(self, direction: Direction, rows: Any, sizes: list[int], state: State) -> Any:
        """A graph shows every product."""
        return None


def _unrolled(kind: str, *args: Any) -> Any:
    """A layer's call as products, for the number of steps that its input has.

    None for packed sequences: their lengths are values.
    """
    if len(args) != 9 or not isinstance(args[2], (list, tuple)):
        return None
    x, states, weights, biased, layers, dropout, training, bidirectional, batch_first = args
    # The graph is for this length: a compiler that left it open makes another for another one.
    steps = int(x.node.meta["example_value"].shape[1 if batch_first else 0])
    states = (states,) if isinstance(states, Proxy) else tuple(states)
    directions = layers * (1 + bidirectional)
    pairs = _pairs(weights, biased, len(weights) // directions)
    projected = len(pairs) == 3 * directions
    stack = Layers(kind, layers, bidirectional, projected, dropout if training else 0.0)
    x = x.transpose(0, 1) if batch_first else x
    y, states = run(stack, _InGraph(pairs, training), x, Even(steps), states)
    return cells.as_one(y.transpose(0, 1) if batch_first else y, *states)


def _pairs(flat: Sequence[Any], biased: bool, each: int) -> list[tuple[Any, Any]]:
    """torch's flat weights as (weight, bias) of x, of h, and of a projection, by direction."""
    made: list[tuple[Any, Any]] = []
    for start in range(0, len(flat), each):
        of_x, of_h, *rest = flat[start : start + each]
        biases = rest[:2] if biased else (None, None)
        made += [(of_x, biases[0]), (of_h, biases[1])]
        made += [(weight, None) for weight in rest[2 * biased :]]
    return made


RULES: dict[Any, Callable[..., Any]] = {
    getattr(torch, name): partial(_unrolled, name) for name in GATES
}
"""What computes the same as a function, by the function."""
