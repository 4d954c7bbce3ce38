"""The shortest way to a chip: weights that were not programmed exactly, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from analogfx.chip import AdditiveNoiseModel
from analogfx.device import program


@contextmanager
def programmed(analog: nn.Module, std_dev: float, seed: int | None = None) -> Iterator[None]:
    """Inside this context the analog products multiply by weights with programming noise.

    Every weight w of a row (an output channel) in a tile becomes ``w + std_dev * max|w| * n`` with
    the maximum over that row of that tile and n standard normal, as if written to a chip once.
    This is ``program(analog, AdditiveNoiseModel(std_dev), seed=seed).at(0)``: no parameter is
    written, so an embedding that is tied to an analog head stays exact, and so does a checkpoint
    that is saved inside. A weight that two sites share is on two tiles, with noise of their own.

    Args:
        analog: what `analogize` returned, in eval mode. Digital weights and all biases stay exact.
        std_dev: standard deviation relative to the largest weight, for example 0.05.
        seed: the same seed gives the same noise on every machine; None draws a new one.
            Torch's global generators are neither read nor advanced.

    Raises:
        ValueError: for a negative ``std_dev``.
        TypeError: for a model without an analog layer.
        CaptureError: for a site without a fused product, or without weights (on ``meta``).
        RuntimeError: from a product in training mode.

    Example:
        >>> with analogfx.programmed(analog.eval(), std_dev=0.05, seed=0):
        ...     accuracy = evaluate(analog)

    Source: the additive model of Büchel et al., "Analog Foundation Models", NeurIPS 2025,
    arXiv 2505.09663, which takes 5 % of the channel's maximum.
    """
    if not std_dev >= 0:
        raise ValueError(f"std_dev = {std_dev!r}: expected 0 or more")
    seed = secrets.randbits(63) if seed is None else seed
    with program(analog, AdditiveNoiseModel(float(std_dev)), seed=seed).at(0.0):
        yield
