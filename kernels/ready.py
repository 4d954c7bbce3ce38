"""One site's product, called many times with few rows each, as in a recurrence.

All that does not depend on the input is made once, and the rest works in place: with few rows the
time goes into small ops and into new memory. The numbers are those of
:mod:`analogfx.kernels.linear`; noise is added by whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


_CALLS, _ROWS = 16, 8
"""From how many calls, of how many rows, a copy of the weights pays whose outputs lie side by side:
torch's matrix library takes 0.5 to 0.9 times as long by it, and the copy a few products."""


class _Step(NamedTuple):
    """A converter's step."""

    divisor: Tensor
    """What to divide by before rounding: never 0."""
    factor: Tensor | None
    """What a code stands for; None where codes go on."""


class _Limits(NamedTuple):
    """What a clamp goes by: tensors, or numbers where they are known to the host."""

    low: Any
    high: Any


class _Tile(NamedTuple):
    """What one tile along the inputs needs."""

    inputs: slice
    range: _Limits | None
    dac: _Step | None
    weight: Tensor
    """(I, O)."""
    adc: _Step | None
    bound: _Limits | None
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
    calls: int = 0,
    rows: int = 0,
) -> Ready:
    """Make a product ready.

    Args:
        weight: (O, I).
        bias: (O,) or None.
        input_range: (k,), None unless the range is static or fast.
        clip: (k, O) or None.
        spec: of one group.
        calls: how often it will be computed, with so many ``rows``.

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
    if calls >= _CALLS and rows >= _ROWS:
        columns = columns.contiguous()
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
        made.append(_Tile(s, _limits(r), dac, columns[s], adc, _limits(bound), rho))
    return Ready(made, None if bias is None else ref.wide(bias), None, None, text)


def _limits(bound: Tensor | None) -> _Limits | None:
    if bound is None:
        return None
    if bound.numel() == 1 and bound.device.type == "cpu":  # in host memory, so no sync
        value = float(bound)
        return _Limits(-value, value)
    return _Limits(-bound, bound)


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
    rows = ref.wide(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    total, whole = None, len(ready.tiles) == 1
    for t, tile in enumerate(ready.tiles):
        z = rows if whole else rows[:, tile.inputs]
        if tile.range is not None:
            z = torch.clamp(z, *tile.range)
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
            if note is None:
                y.clamp_(*tile.bound)
            else:
                bounded = torch.clamp(y, *tile.bound)
                note(t, y, bounded)
                y = bounded
        total = y if total is None else total.add_(y)
    assert total is not None
    if ready.bias is not None:
        total.add_(ready.bias)
    total = total if x.dim() == 2 else total.view(*x.shape[:-1], -1)
    return total.to(x.dtype)


def _round_(x: Tensor, step: _Step) -> None:
    x.div_(step.divisor).round_()
    if step.factor is not None:
        x.mul_(step.factor)
