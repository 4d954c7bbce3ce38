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
from collections.abc import Sequence
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


def _generator(*key: int) -> torch.Generator:
    """That of one chunk."""
    return torch.Generator().manual_seed(_mix(*key))


def _fill(out: Tensor, seed: int, stream: int) -> None:
    chunks = out.split(CHUNK)

    def fill(number: int) -> None:
        generator = _generator(seed, stream, number)
        # Modes are a thread's own, and leaving inference mode turns gradients on.
        with torch.inference_mode(out.is_inference()), torch.no_grad():
            chunks[number].normal_(generator=generator)

    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        # ATen draws with one core whatever the size, and releases the interpreter while it does.
        list(_pool(threads).map(fill, range(len(chunks))))
    else:
        for number in range(len(chunks)):
            fill(number)


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
