"""The product of one site with weights that a chip holds: inference, without noise of its own.

What :mod:`analogfx.kernels.linear` and :mod:`analogfx.kernels.conv` compute in evaluation, where
the weights come ready made, the ADC's bounds follow the weights that were asked for, and a factor
behind the ADC makes up for drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import conv as image
from analogfx.kernels import experts as bank
from analogfx.kernels import linear as plain
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.weights import grouped, maxima, modified_weight, tiles


@torch.no_grad()
def asked_for(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> tuple[Tensor, Tensor | None]:
    """What a chip is asked to hold of a weight, and what scales the bounds of its ADCs.

    Args:
        weight: (O, I) of all groups, or torch's layout of a convolution.
        clip: (k, O) or None.

    Returns:
        The clipped and quantised weight as a matrix (O, I), a copy, in the precision of the
        computation; and (k, O) largest weights or learned clips, None where nothing needs them.
    """
    matrix = weight.flatten(1)
    rows = spec._replace(groups=1, noise_std=0.0)  # the rows of all groups are one matrix
    peaks = maxima(matrix, clip, rows)
    exact = modified_weight(matrix, clip, None, peaks, rows)
    return exact.detach().clone(), peaks if spec.out_bound else None


def _of_floats(spec: MVMSpec) -> MVMSpec:
    """The spec of a product with what a chip holds, which is no code, whatever it was to be."""
    return spec._replace(weight_states=0.0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    peaks: Tensor | None,
    gain: Tensor | None,
    spec: MVMSpec,
) -> Tensor:
    """The site's output.

    Args:
        x: (..., groups * I).
        weight: (O, I), what the tiles hold, in the precision of the computation.
        bias: (O,) or None.
        input_range: (k,), None unless the range is static or fast.
        peaks: (k, O), None where there is no bound.
        gain: (k, O) factors behind the ADC, None for none.

    Returns:
        (..., O) of x's dtype.
    """
    spec = _of_floats(spec)
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    total = None
    for t, s in tiles(spec.in_sizes):
        r = plain.tile_range(rows[..., s], input_range, t, spec)
        y = plain.product(plain.converted(rows[..., s], r, spec), w[..., s])
        peak = None if peaks is None else grouped(peaks[t], spec.groups, 0)
        y, bound = plain.tile_output(y, r, peak, None, spec)
        if bound is not None:
            y = ref.clamp_to(y, bound)
        if gain is not None:
            y = y * grouped(gain[t], spec.groups, 0)
        total = y if total is None else total.add_(y)
    assert total is not None
    out = total.reshape(*x.shape[:-1], weight.shape[0])
    out = out if bias is None else out + ref.wide(bias)
    return out.to(x.dtype, copy=True) if out._is_view() else out.to(x.dtype)


def experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    peaks: Tensor | None,
    gain: Tensor | None,
    offsets: Tensor,
    spec: MVMSpec,
) -> Tensor:
    """The output of a layer of experts, each of which has rows of the weight for itself.

    Args:
        x: (N, I), sorted by expert.
        weight: (E * O, I), the rows of all experts one after another.
        bias: (E, O) or None.
        input_range: (k,) or (E, k), None unless the range is static or fast.
        peaks, gain: (k, E * O) as for :func:`linear`.
        offsets: (E,), where the rows of each expert end.

    Returns:
        (N, O) of x's dtype.
    """
    count = offsets.shape[0]
    outputs = weight.shape[0] // count
    one = bank.of_one(spec, count)
    y = x.new_zeros(x.shape[0], outputs)
    for e, rows in bank.spans(offsets):
        own = slice(e * outputs, (e + 1) * outputs)
        y[rows] = linear(
            x[rows],
            weight[own],
            None if bias is None else bias[e],
            bank.range_of(input_range, e),
            None if peaks is None else peaks[:, own],
            None if gain is None else gain[:, own],
            one,
        )
    return y


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    peaks: Tensor | None,
    gain: Tensor | None,
    window: Window,
    spec: MVMSpec,
) -> Tensor:
    """The output of a convolution with one input tile and one range.

    Args:
        x: (B, C, *image).
        weight: (O, C / groups, *kernel); the rest as for :func:`linear`.

    Returns:
        (B, O, *out) of x's dtype.
    """
    spec = _of_floats(spec)
    axes = (-1, *[1] * (x.dim() - 2))
    r = None if input_range is None else input_range[0]
    y = image.convolve(plain.converted(x, r, spec), weight, window, spec.groups)
    y = image.laid_out(y, x)
    peak = None if peaks is None else peaks[0].view(axes)
    y, bound = plain.tile_output(y, r, peak, None, spec)
    if bound is not None:
        y = ref.clamp_to(y, bound)
    if gain is not None:
        y = y * gain[0].view(axes)
    if bias is not None:
        y = y + ref.wide(bias).view(axes)
    return y.to(x.dtype)
