"""One site's product, called many times with few rows each, as in a recurrence.

All that does not depend on the input is made once, and the rest works in place: with few rows the
time goes into small ops and into new memory. The numbers are those of
:mod:`analogfx.kernels.linear`; noise is added by whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from analogfx.errors import KernelError
from analogfx.kernels import integers, prepared
from analogfx.kernels import reference as ref
from analogfx.kernels.spec import MVMSpec, encode, reference_only
from analogfx.kernels.weights import code_scale, maxima, modified_weight, scale, tiles

AddNoise = Callable[[int, Tensor, Tensor], None]
"""Adds its noise to a tile's product: of the tile's number, its converted inputs, the product."""
NoteClipped = Callable[[int, Tensor, Tensor], None]
"""Is told of a tile's number, and its outputs before and after its ADC's clamp."""


class _Step(NamedTuple):
    """A converter's step."""

    divisor: Tensor
    """What to divide by before rounding: never 0."""
    factor: Tensor | None
    """What a code stands for; None where codes go on."""


class _Tile(NamedTuple):
    """What one tile along the inputs needs."""

    inputs: slice
    range: Tensor | None
    dac: _Step | None
    weight: Tensor
    """(I, O)."""
    adc: _Step | None
    bound: Tensor | None
    code_scale: Tensor | None
    """What makes the ADC's codes of the sum of a product of codes; None for one of values."""


class Ready(NamedTuple):
    """All that a product needs besides its input."""

    tiles: list[_Tile]
    bias: Tensor | None
    operands: tuple[Tensor, Tensor | None] | None
    """What ``prepared.linear`` takes, where ranges depend on the input or sums go in parts."""
    input_range: Tensor | None
    text: str


def make(
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    clip: Tensor | None,
    spec: MVMSpec,
) -> Ready:
    """Make a product ready.

    Args:
        weight: (O, I).
        bias: (O,) or None.
        input_range: (k,), None unless the range is static or fast.
        clip: (k, O) or None.
        spec: of one group.

    Raises:
        KernelError: the spec has a scalar of ``spec.REFERENCE_ONLY``.
    """
    if reason := reference_only(spec):
        raise KernelError(f"a recurrent layer cannot run: {reason}")
    depth = integers.depth(spec)
    text = encode(spec)
    if spec.range_mode == "dynamic" or (depth and max(spec.in_sizes) > depth):
        held, scales = prepared.prepare(weight, clip, text)
        if spec.out_bound and input_range is not None:
            scales = prepared.limits(scales, input_range, text)
        return Ready([], bias, (held, scales if spec.out_bound else None), input_range, text)
    peaks = maxima(weight, clip, spec)
    quiet = spec._replace(noise_std=0.0)
    held = modified_weight(weight, clip, None, peaks, quiet, codes=depth > 0)
    columns = held.t()
    made = []
    for t, s in tiles(spec.in_sizes):
        r = None if input_range is None else input_range[t]
        dac = _step(ref.step_of(r, spec.inp_res)) if r is not None and spec.inp_res else None
        if dac is not None and depth:
            dac = dac._replace(factor=None)
        adc = bound = rho = None
        if spec.out_bound:
            assert peaks is not None and r is not None
            bound = ref.adc_bound(r, scale(peaks[t], spec.bound_per_channel, spec), spec.out_bound)
            adc = _step(ref.adc_step(bound, spec.out_res)) if spec.out_res else None
            rho = code_scale(peaks[t], spec) if depth else None
        made.append(_Tile(s, r, dac, columns[s], adc, bound, rho))
    return Ready(made, None if bias is None else ref.wide(bias), None, None, text)


def _step(step: Tensor) -> _Step:
    return _Step(step.clamp_min(torch.finfo(step.dtype).tiny), step)


def linear(
    x: Tensor,
    ready: Ready,
    noise: AddNoise | None = None,
    note: NoteClipped | None = None,
) -> Tensor:
    """The product: x (..., I) to (..., O) of x's dtype.

    Args:
        noise: what adds to the product of every tile; None for nothing.
        note: what notes clipped outputs; None for nothing.
    """
    if ready.operands is not None:
        weight, scale = ready.operands
        r = ready.input_range
        return prepared.linear(x, weight, scale, ready.bias, None, r, None, ready.text)
    rows = ref.wide(x.reshape(-1, x.shape[-1]))
    total = None
    for t, tile in enumerate(ready.tiles):
        z = rows[:, tile.inputs]
        if tile.range is not None:
            z = ref.clamp_to(z, tile.range)
            if tile.dac is not None:
                _round_(z, tile.dac)
        y = torch.mm(z, tile.weight)
        if noise is not None:
            noise(t, z, y)
        if tile.bound is not None:
            if tile.code_scale is not None:
                assert tile.adc is not None and tile.adc.factor is not None
                y.mul_(tile.code_scale).round_().mul_(tile.adc.factor)
            elif tile.adc is not None:
                _round_(y, tile.adc)
            bounded = ref.clamp_to(y, tile.bound, out=y if note is None else None)
            if note is not None:
                note(t, y, bounded)
            y = bounded
        total = y if total is None else total.add_(y)
    assert total is not None
    if ready.bias is not None:
        total.add_(ready.bias)
    return total.view(*x.shape[:-1], -1).to(x.dtype)


def _round_(x: Tensor, step: _Step) -> None:
    x.div_(step.divisor).round_()
    if step.factor is not None:
        x.mul_(step.factor)
