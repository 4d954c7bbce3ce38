"""Analog models as a chip would hold them: with weights that were not programmed exactly."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from analogfx.kernels import noise
from analogfx.module import AnalogSite, row_maxima, sites


@contextmanager
def programmed(analog: nn.Module, std_dev: float, seed: int | None = None) -> Iterator[None]:
    """Inside this context the analog weights hold programming noise, as if written to a chip once.

    Every weight w of a row (an output channel) in a tile becomes ``w + std_dev * max|w| * n`` with
    the maximum over that row of that tile and n standard normal. A weight that several sites share
    is programmed once. On exit, after an exception too, the weights are what they were, to the bit.

    The noise acts on the stored weights: a config that clips or quantizes weights in the forward
    does so to the noisy ones.

    Args:
        analog: What `analogize` returned. Other weights and all biases stay exact.
        std_dev: Standard deviation relative to the largest weight, for example 0.05.
        seed: The same seed gives the same noise on devices of one kind; None draws a new one.
            Torch's global generators are neither read nor advanced.

    Raises:
        ValueError: For a negative ``std_dev``.

    Source: the additive model of Büchel et al., "Analog Foundation Models", NeurIPS 2025,
    arXiv 2505.09663, which takes 5 % of the channel's maximum.
    """
    if not std_dev >= 0:
        raise ValueError(f"std_dev = {std_dev!r}: expected a number above 0, or 0 for no noise")
    seed = secrets.randbits(63) if seed is None else seed
    weights = _distinct_weights(analog)
    exact = [weight.clone() for _, weight in weights]
    try:
        for stream, (site, weight) in enumerate(weights):
            _add_noise(site, weight, std_dev, seed, stream)
        yield
    finally:
        with torch.no_grad():
            for (_, weight), original in zip(weights, exact, strict=True):
                weight.copy_(original)


@torch.no_grad()
def _distinct_weights(analog: nn.Module) -> list[tuple[AnalogSite, Tensor]]:
    """Weights that share no memory, each with the first site that multiplies by it."""
    distinct: dict[tuple[int, int], tuple[AnalogSite, Tensor]] = {}
    for _, module, site in sites(analog):
        weight = site.weight(module).detach()
        distinct.setdefault((weight.data_ptr(), weight.numel()), (site, weight))
    return list(distinct.values())


@torch.no_grad()
def _add_noise(site: AnalogSite, weight: Tensor, std_dev: float, seed: int, stream: int) -> None:
    sizes = torch.tensor(site.in_sizes, device=weight.device)
    largest = row_maxima(site, weight).T.repeat_interleave(sizes, dim=1)
    key = torch.tensor(seed, device=weight.device)
    draw = noise.normal(key, stream, largest.shape, largest.dtype)
    weight.add_((std_dev * largest * draw).view(weight.shape))
