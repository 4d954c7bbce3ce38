"""Patches of an image, and statistics over patches that never makes them.

A convolution multiplies every patch of its padded input. A pixel lies in as many patches as there
are kernel offsets that reach it, which is a product of one number per axis; so sums over patches
are weighted sums over the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import reference as ref


class Window(NamedTuple):
    """Geometry of a convolution: one entry per spatial axis, zeros as padding."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def out_size(self, image: list[int]) -> list[int]:
        """Number of patches along each spatial axis of an image."""
        return [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(image, *self, strict=True)
        ]


def pad(x: Tensor, window: Window) -> Tensor:
    """The image with the window's zeros around it."""
    if not any(window.padding):
        return x
    return F.pad(x, [p for p in reversed(window.padding) for _ in range(2)])


def unfold(x: Tensor, window: Window) -> Tensor:
    """Every patch as a row: (B, C, *image) to (B, L, C * prod(kernel_size)), channel slowest.

    The order of rows and columns is that of ``torch.nn.functional.unfold``, for any number of
    spatial axes. Differentiable.
    """
    dims = len(window.kernel_size)
    x = pad(x, window)
    for axis, (k, s, d) in enumerate(
        zip(window.kernel_size, window.stride, window.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    # (B, C, *out, *kernel) -> (B, *out, C, *kernel)
    x = x.movedim(1, 1 + dims)
    return x.flatten(1 + dims).flatten(1, dims)


def with_batch(x: Tensor, dims: int) -> Tensor:
    """An image (C, *image) with the batch axis that it lacks; batches as they are."""
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


def like_batch(y: Tensor, x: Tensor, dims: int) -> Tensor:
    """``y`` (B, ...) without its batch axis if ``x`` has none."""
    return y if x.dim() == dims + 2 else y.squeeze(0)


def unfold_batched(x: Tensor, *window: list[int]) -> Tensor:
    """:func:`unfold` of an image with or without a batch axis: (B, L, C * prod(kernel_size))."""
    geometry = Window(*window)
    return unfold(with_batch(x, len(geometry.stride)), geometry)


def fold_output(y: Tensor, x: Tensor, *window: list[int]) -> Tensor:
    """Outputs by patch, (B, L, O), as an image (B, O, *out), batched like ``x``."""
    geometry = Window(*window)
    dims = len(geometry.stride)
    out = geometry.out_size(list(x.shape[-dims:]))
    return like_batch(y.mT.unflatten(-1, out), x, dims)


def offsets(window: Window) -> Iterator[tuple[int, ...]]:
    """Every position inside the kernel."""
    return itertools.product(*(range(k) for k in window.kernel_size))


def shifted(padded: Tensor, offset: tuple[int, ...], window: Window, out: list[int]) -> Tensor:
    """What every patch holds at one kernel offset: (B, C, *out), a view of the padded image."""
    index: list[slice] = [slice(None), slice(None)]
    for o, s, d, size in zip(offset, window.stride, window.dilation, out, strict=True):
        index.append(slice(o * d, o * d + (size - 1) * s + 1, s))
    return padded[tuple(index)]


def _seen(size: int, k: int, s: int, p: int, d: int) -> Iterator[range]:
    """For each offset along one axis of the kernel: the positions that patches hold there."""
    patches = (size + 2 * p - d * (k - 1) - 1) // s + 1
    for offset in range(k):
        start = offset * d - p  # of the first patch; before 0 and from `size` on is padding
        first, last = max(0, -(start // s)), min(patches - 1, (size - 1 - start) // s)
        yield range(start + first * s, start + last * s + 1, s) if first <= last else range(0)


def _axis_multiplicity(axis: tuple[int, ...]) -> Tensor:
    """How many patches see each position of one spatial axis, float32 (size,)."""
    count = torch.zeros(axis[0])
    for seen in _seen(*axis):
        count[seen.start : seen.stop : seen.step] += 1
    return count


def multiplicity(x: Tensor, window: Window) -> Tensor:
    """How many patches see each pixel: float32 of x's spatial shape."""
    axes = zip(x.shape[2:], *window, strict=True)
    total, *others = (_axis_multiplicity(axis).to(x.device) for axis in axes)
    for axis in others:
        total = total.unsqueeze(-1) * axis
    return total


def _visits(x: Tensor, window: Window) -> int:
    """How many elements of the patches of one channel are pixels of the image."""
    axes = zip(x.shape[2:], *window, strict=True)
    return math.prod(sum(map(len, _seen(*axis))) for axis in axes)


def elements(x: Tensor, window: Window) -> int:
    """Number of elements of all patches, padding included."""
    count = x.shape[0] * x.shape[1]
    for size, k in zip(window.out_size(list(x.shape[2:])), window.kernel_size, strict=True):
        count *= size * k
    return count


def mean(x: Tensor, window: Window) -> Tensor:
    """Mean over the elements of all patches, padding included, ()."""
    per_pixel = ref.wide(x).sum((0, 1))
    return (per_pixel * multiplicity(x, window)).sum() / elements(x, window)


def std(x: Tensor, window: Window) -> Tensor:
    """Unbiased standard deviation over the elements of all patches, (). NaN below two elements.

    Two-pass, like ``torch.std``: the squares are of distances to the mean, so nothing cancels. They
    are taken of distances scaled by a power of two, which changes no digit, so that none overflows.
    """
    count = elements(x, window)
    if count < 2:
        return torch.full((), float("nan"), device=x.device)
    weight = multiplicity(x, window)
    average = mean(x, window)
    x = ref.wide(x)
    low, high = x.aminmax()
    exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(-126, 126)
    one = torch.ones_like(average)
    smaller, larger = torch.ldexp(one, -exponent), torch.ldexp(one, exponent)
    squares = (x - average).mul_(smaller).square_().sum((0, 1))
    padding = count - x.shape[0] * x.shape[1] * _visits(x, window)
    total = (squares * weight).sum() + padding * (average * smaller).square()
    return (total / (count - 1)).sqrt() * larger


def extremes(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of all patches, each (); padding counts where there is any."""
    x = ref.wide(x)
    weight = multiplicity(x, window)
    seen = weight > 0
    low = torch.where(seen, x, float("inf")).amin()
    high = torch.where(seen, x, -float("inf")).amax()
    if any(window.padding):
        zero = torch.zeros_like(low)
        low, high = torch.minimum(low, zero), torch.maximum(high, zero)
    return low, high
