"""Philox 4x32-10 in torch: the counter-based generator that Triton's ``tl.rand`` uses.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Counters and keys
are 32-bit words held in int64 tensors, so a word-by-word product never loses its sign bit's
meaning: the wrapped 64-bit product is masked back into two unsigned halves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words (int64 tensors, 0 .. 2**32 - 1) for each counter.

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words.
        key: two int64 tensors that broadcast against the counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """A word as float32 in [0, 1), folded as ``tl.uint_to_uniform_float`` folds it."""
    signed = torch.where(word > 0x7FFFFFFF, _WORD - word, word)
    return signed.to(torch.float32) * 4.6566127342e-10


def normal(seed: Tensor, stream: int, numel: int) -> Tensor:
    """``numel`` standard normal float32 values, a function of (seed, stream, index) alone.

    Element ``i`` is lane ``i % 4`` of counter ``i // 4``; two lanes make a Box-Muller pair.

    Args:
        seed: int64 tensor of one element, on the device that the values are wanted on.
        stream: a number that keeps draws of one seed apart.
        numel: how many values.
    """
    index = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    return _quads(seed, stream, index).reshape(-1)[:numel]


def block(seed: Tensor, stream: int, width: int, rows: slice, columns: slice) -> Tensor:
    """Rows and columns of the matrix of a width that :func:`normal` gives, in its row-major order.

    Args:
        rows, columns: with a start and a stop.
    """

    def numbers(span: slice, step: int = 1) -> Tensor:
        return torch.arange(span.start, span.stop, step, dtype=torch.int64, device=seed.device)

    row = numbers(rows).unsqueeze(1) * width
    if not any(n % 4 for n in (width, columns.start, columns.stop)):  # a counter has four of a row
        return _quads(seed, stream, (row + numbers(columns, 4)) // 4).flatten(1)
    index = row + numbers(columns)
    quads = _quads(seed, stream, index // 4)
    return quads.gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)


def _quads(seed: Tensor, stream: int, index: Tensor) -> Tensor:
    """The four values of every counter, in a last axis of their own."""
    zero = torch.zeros_like(index)
    counter = (index & _WORD, index >> 32, zero + stream, zero)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    lanes = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_uniform(first).clamp_min(1.0e-7)))
        angle = 2.0 * math.pi * _uniform(second)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(lanes, dim=-1)
