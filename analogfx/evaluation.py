"""Analog models as a chip would hold them: with weights that were not programmed exactly."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from analogfx.kernels import noise
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite
from analogfx.modules.remember import row_maxima
from analogfx.modules.sites import required_sites
from analogfx.modules.write_back import dense_weight, gathered, parameter_of, store_weight


@contextmanager
def programmed(analog: nn.Module, std_dev: float, seed: int | None = None) -> Iterator[None]:
    """Inside this context the analog weights hold programming noise, as if written to a chip once.

    Every weight w of a row (an output channel) in a tile becomes ``w + std_dev * max|w| * n`` with
    the maximum over that row of that tile and n standard normal. A weight that several sites share
    is perturbed once. On exit, after an exception too, the weights are what they were, to the bit.

    The noise acts on the stored weights. Whatever else reads them sees it too: an embedding that
    is tied to an analog head, a checkpoint that is saved inside, and a config that clips or
    quantizes weights in the forward.

    Args:
        analog: What `analogize` returned. Digital weights and all biases stay exact.
        std_dev: Standard deviation relative to the largest weight, for example 0.05.
        seed: The same seed gives the same noise on devices of one kind; None draws a new one.
            Torch's global generators are neither read nor advanced.

    Raises:
        ValueError: For a negative ``std_dev``.
        TypeError: For a model without an analog layer.
        CaptureError: For a weight that is computed from its parameter.

    Source: the additive model of Büchel et al., "Analog Foundation Models", NeurIPS 2025,
    arXiv 2505.09663, which takes 5 % of the channel's maximum.
    """
    if not std_dev >= 0:
        raise ValueError(f"std_dev = {std_dev!r}: expected 0 or more")
    seed = secrets.randbits(63) if seed is None else seed
    streams = itertools.count()
    with ExitStack() as on_exit:
        for parameter, products in _by_parameter(analog):
            on_exit.callback(_restore, parameter, parameter.detach().clone())
            # All from the exact weights: of products that share one, the last noise stays.
            noisy = [_noisy(*product, std_dev, seed, next(streams)) for product in products]
            for (module, site), matrix in zip(products, noisy, strict=True):
                with torch.no_grad(), gathered(module, site) as holder:
                    store_weight(holder, site, matrix)
        yield


_Product = tuple[AnalogModule, AnalogSite]


def _by_parameter(analog: nn.Module) -> list[tuple[nn.Parameter, list[_Product]]]:
    """Every parameter with the products that multiply by it or by a part of it."""
    groups: dict[int, tuple[nn.Parameter, list[_Product]]] = {}
    for _, module, site in required_sites(analog):
        parameter = parameter_of(module, site)
        groups.setdefault(id(parameter), (parameter, []))[1].append((module, site))
    return list(groups.values())


@torch.no_grad()
def _noisy(
    module: AnalogModule, site: AnalogSite, std_dev: float, seed: int, stream: int
) -> Tensor:
    """A product's weight as a matrix (O, I), with noise."""
    matrix = dense_weight(module, site).flatten(1)
    sizes = torch.tensor(site.in_sizes, device=matrix.device)
    largest = row_maxima(site, matrix).T.repeat_interleave(sizes, dim=1)
    key = torch.tensor(seed, device=matrix.device)
    draw = noise.normal(key, stream, largest.shape, largest.dtype)
    return (matrix + std_dev * largest * draw).to(matrix.dtype)


@torch.no_grad()
def _restore(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
