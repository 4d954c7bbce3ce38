"""Noise as a function of (seed tensor, stream, element index).

The same draw comes out wherever it is made again: in the backward, in a recomputation under
activation checkpointing, in a compiled graph. On the CPU the generator is ATen's own, keyed for
each chunk of elements, because Philox written in torch takes twice its time there; every other
device draws Philox, the generator of the Triton kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from analogfx.kernels import philox

CHUNK = 1 << 18
"""Elements that share one key on the CPU. Part of the definition of the noise: never tuned."""

_MASK = (1 << 64) - 1


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one call of one site, from torch's default generator of the device.

    ``torch.manual_seed`` therefore reproduces it, and activation checkpointing, which restores
    that generator, draws it again.

    Returns:
        int64 tensor of shape ().
    """
    return torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device=device)


def normal(seed: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal values of a shape, float32 or float64, on the seed's device.

    Tensors of equal size hold the same values in the same order, whatever their shapes.
    """
    if seed.device.type != "cpu":
        return philox.normal(seed, stream, math.prod(shape)).to(dtype).reshape(shape)
    out = torch.empty(shape, dtype=dtype)
    if out.numel() <= CHUNK:
        return out.normal_(generator=_generator(int(seed), stream, 0))
    _fill(out.view(-1), int(seed), stream)
    return out


def block(
    seed: Tensor,
    stream: int,
    shape: tuple[int, int],
    rows: slice,
    columns: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Rows and columns of what :func:`normal` gives for a matrix, which is not made as a whole.

    On the CPU every chunk that holds an element of the block is drawn: rows cost what they hold,
    columns what whole rows do.

    Args:
        shape: of the whole matrix.
        rows, columns: with a start and a stop.
    """
    size = rows.stop - rows.start, columns.stop - columns.start
    if seed.device.type != "cpu":
        return philox.block(seed, stream, shape[1], rows, columns).to(dtype)
    out = torch.empty(size, dtype=dtype)
    if out.numel() == 0:
        return out
    width, total = shape[1], math.prod(shape)
    first = (rows.start * width + columns.start) // CHUNK
    last = ((rows.stop - 1) * width + columns.stop - 1) // CHUNK

    def draw(number: int) -> None:
        start = number * CHUNK
        chunk = torch.empty(min(CHUNK, total - start), dtype=dtype)
        _draw(chunk, int(seed), stream, number)
        for begin, end in _pieces(start, start + len(chunk), width):
            # Whole rows, or a part of one.
            at = begin // width
            held = chunk[begin - start : end - start]
            whole = held.view(-1, width) if end - begin >= width else held.unsqueeze(0)
            left = begin - at * width
            own = slice(max(columns.start - left, 0), max(columns.stop - left, 0))
            picked = whole[max(rows.start - at, 0) : max(rows.stop - at, 0), own]
            row, column = max(at - rows.start, 0), max(left - columns.start, 0)
            out[row : row + picked.shape[0], column : column + picked.shape[1]] = picked

    _in_threads(draw, range(first, last + 1))
    return out


def _pieces(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """A span of a matrix's elements as the end of a row, whole rows, and the beginning of one."""
    first, last = min(-(-start // width) * width, stop), stop // width * width
    edges = [start, first, max(first, last), stop]
    return ((a, b) for a, b in itertools.pairwise(edges) if a < b)


def _fill(out: Tensor, seed: int, stream: int) -> None:
    chunks = out.split(CHUNK)
    _in_threads(lambda n: _draw(chunks[n], seed, stream, n), range(len(chunks)))


def _draw(chunk: Tensor, seed: int, stream: int, number: int) -> None:
    """Fill a chunk of a draw."""
    generator = _generator(seed, stream, number)
    # Modes are a thread's own, and leaving inference mode turns gradients on.
    with torch.inference_mode(chunk.is_inference()), torch.no_grad():
        chunk.normal_(generator=generator)


def _generator(*key: int) -> torch.Generator:
    """That of one chunk."""
    return torch.Generator().manual_seed(_mix(*key))


def _in_threads(draw: Callable[[int], None], numbers: range) -> None:
    threads = min(torch.get_num_threads(), len(numbers))
    if threads > 1:
        # ATen draws with one core whatever the size, and releases the interpreter while it does.
        list(_pool(threads).map(draw, numbers))
    else:
        for number in numbers:
            draw(number)


def _mix(*words: int) -> int:
    """splitmix64 over several words. ATen's CPU generator takes the low 32 bits as its seed."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="analogfx-noise")


if hasattr(os, "register_at_fork"):  # a forked child inherits the cache but not the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
