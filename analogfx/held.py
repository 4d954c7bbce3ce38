"""Which chip's weights a module multiplies by: those of the device that was read last.

Every thread has its own, so that two chips run in two threads. A compiler's graph cannot ask for
its thread: compiled models see the device that was read last in any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Held(NamedTuple):
    """What the tiles of one site hold at one time."""

    weight: Tensor
    """(O, I), or torch's layout of a convolution, in the precision of the computation."""
    peaks: Tensor | None
    """(k, O) what scales the ADC's bounds, of the exact weights; None without a bound."""
    gain: Tensor | None
    """(k, O) factors behind the ADC; None without compensation."""
    variance: Tensor | None = None
    """Of the weights in every product, shaped as they are; None where a reading has the noise."""
    deviation: Tensor | None = None
    """(k, O) standard deviation of output noise over the range; None without output noise."""
    calls: Tensor | None = None
    """int64 (): a seed that every product takes and raises by 1; None where no product draws."""


Holdings = Mapping[int, tuple[Held, ...]]
"""What the sites of every module hold, by the number of its placement."""

_thread = threading.local()
_nothing: Holdings = {}
_all: list[Holdings] = [_nothing]
"""Those of all threads, the last one last."""
_last: Holdings = _nothing
"""Empty where no thread is in a device."""


class Numbered(Protocol):
    """A module's placement, as far as a chip knows it."""

    number: int


def of(placement: Numbered) -> tuple[Held, ...] | None:
    """What the sites of one module hold; None outside of every device of its model."""
    # The number is not read where nothing is held: a compiler's graph that depends on it serves one
    # module alone, and not all that look alike.
    if not _last:
        return None
    if torch.compiler.is_dynamo_compiling():
        return _last.get(placement.number)
    current: Holdings = getattr(_thread, "current", _nothing)
    return current.get(placement.number) if current else None


@contextmanager
def holding(holdings: Holdings) -> Iterator[None]:
    """Let modules multiply by a chip's weights; those of other models stay as they are."""
    global _last
    before: Holdings = getattr(_thread, "current", _nothing)
    mine: Holdings = {**before, **holdings}
    _thread.current = mine
    if mine:
        _all.append(mine)
    _last = _all[-1]
    try:
        yield
    finally:
        _thread.current = before
        _all[:] = [other for other in _all if other is not mine]
        _last = _all[-1]
