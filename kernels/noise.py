"""Noise as a function of (seed tensor, stream, element index).

The same draw comes out wherever it is made again: in the backward, in a recomputation under
activation checkpointing, in a compiled graph. On the CPU the generator is ATen's own, keyed for
each chunk of elements, because Philox written in torch takes twice its time there; every other
device draws Philox, the generator of the Triton kernels.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from analogfx.kernels import philox

CHUNK = 1 << 18
"""Elements, in whole rows, that share one key on the CPU. Part of what the noise is: not tuned."""

_MASK = (1 << 64) - 1

Finish = Callable[[slice, Tensor], None]


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one call of one site, from torch's default generator of the device.

    ``torch.manual_seed`` therefore reproduces it, and activation checkpointing, which restores
    that generator, draws it again.

    Returns:
        int64 tensor of shape ().
    """
    return torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device=device)


def normal(
    seed: Tensor,
    stream: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    finish: Finish | None = None,
) -> Tensor:
    """Standard normal values of a shape, float32 or float64, on the seed's device.

    Args:
        finish: called with rows (a slice of the first axis) and their values while these are in
            cache, to make of them in place what they are for. It may run in several threads.
    """
    if seed.device.type == "cpu":
        return _cpu_normal(int(seed), stream, shape, dtype, finish)
    out = philox.normal(seed, stream, math.prod(shape)).to(dtype).reshape(shape)
    if finish is not None:
        finish(slice(0, out.shape[0]), out)
    return out


def _cpu_normal(
    seed: int, stream: int, shape: Sequence[int], dtype: torch.dtype, finish: Finish | None
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    rows = shape[0] if shape else 1
    per_chunk = max(1, CHUNK // max(1, out.numel() // max(1, rows)))
    chunks = range(0, rows, per_chunk)

    def fill(start: int) -> None:
        part = slice(start, min(start + per_chunk, rows))
        values = out[part] if shape else out
        generator = torch.Generator().manual_seed(_mix(seed, stream, start // per_chunk))
        # Modes are a thread's own, and leaving inference mode turns gradients on.
        with torch.inference_mode(out.is_inference()), torch.no_grad():
            values.normal_(generator=generator)
            if finish is not None:
                finish(part, values)

    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        # ATen draws with one core whatever the size, and releases the interpreter while it does.
        list(_pool(threads).map(fill, chunks))
    else:
        for start in chunks:
            fill(start)
    return out


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
