"""The product of one site with weights that a chip holds: inference.

What :mod:`analogfx.kernels.linear` and :mod:`analogfx.kernels.conv` compute in evaluation, where
the weights come ready made, the ADC's bounds follow the weights that were asked for, and a factor
behind the ADC makes up for drift.

Read noise that every product draws anew is added to the product: the sum of independent Gaussian
deviations of the weights, times the inputs, is Gaussian, so that for weights of variance v its
standard deviation is sqrt(sum_i v_i x_i^2), independent for every input vector, output and tile.
Output noise of standard deviation s times the range r adds to it. Tile t draws stream t + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import conv as image
from analogfx.kernels import experts as bank
from analogfx.kernels import linear as plain
from analogfx.kernels import noise
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.weights import grouped, maxima, modified_weight, scale, tiles


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


@torch.no_grad()
def output_deviation(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Tensor | None:
    """Standard deviation of each output's noise over the range of its tile's inputs.

    Args:
        weight, clip: as for :func:`asked_for`.
        spec: of the site in training, which has the noise.

    Returns:
        (k, O), or None for a site without output noise.
    """
    if not spec.out_noise:
        return None
    rows = spec._replace(groups=1)
    peaks = maxima(weight.flatten(1), clip, rows)
    assert peaks is not None
    widths = [scale(peak, spec.out_noise_per_channel, rows) for peak in peaks]
    return torch.stack(widths).detach() * spec.out_noise


def _noisy(
    y: Tensor, of_weights: Tensor | None, of_output: Tensor | None, seed: Tensor, stream: int
) -> Tensor:
    """A product with noise.

    Args:
        of_weights: the variance that deviations of the weights give it, of y's shape, or None.
        of_output: a standard deviation that broadcasts against y, or None.
    """
    variance = of_weights
    if of_output is not None:
        square = of_output.square()
        variance = square if variance is None else variance.add_(square)
    assert variance is not None
    draw = noise.normal(seed, stream, y.shape, y.dtype)
    return y + draw.mul_(variance.sqrt())


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
    variance: Tensor | None,
    deviation: Tensor | None,
    seed: Tensor | None,
    spec: MVMSpec,
    first: int = 1,
) -> Tensor:
    """The site's output.

    Args:
        x: (..., groups * I).
        weight: (O, I), what the tiles hold, in the precision of the computation.
        bias: (O,) or None.
        input_range: (k,), None unless the range is static or fast.
        peaks: (k, O), None where there is no bound.
        gain: (k, O) factors behind the ADC, None for none.
        variance: (O, I) of the weights in every product, None for none.
        deviation: (k, O) of the outputs over the range, None for none.
        seed: int64 (), None without noise.
        first: stream of the first tile's noise.

    Returns:
        (..., O) of x's dtype.
    """
    spec = _of_floats(spec)
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    v = None if variance is None else grouped(variance, spec.groups, 0)
    total = None
    for t, s in tiles(spec.in_sizes):
        r = plain.tile_range(rows[..., s], input_range, t, spec)
        analog_x = plain.converted(rows[..., s], r, spec)
        y = plain.product(analog_x, w[..., s])
        if seed is not None:
            of_weights = None if v is None else plain.product(analog_x.square(), v[..., s])
            of_output = None
            if deviation is not None:
                assert r is not None
                of_output = grouped(deviation[t], spec.groups, 0) * r
            y = _noisy(y, of_weights, of_output, seed, first + t)
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
    variance: Tensor | None,
    deviation: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor,
    spec: MVMSpec,
) -> Tensor:
    """The output of a layer of experts, each of which has rows of the weight for itself.

    Args:
        x: (N, I), sorted by expert.
        weight: (E * O, I), the rows of all experts one after another.
        bias: (E, O) or None.
        input_range: (k,) or (E, k), None unless the range is static or fast.
        peaks, gain, deviation: (k, E * O), and variance (E * O, I), as for :func:`linear`.
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
            None if variance is None else variance[own],
            None if deviation is None else deviation[:, own],
            seed,
            one,
            e * len(spec.in_sizes) + 1,
        )
    return y


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    peaks: Tensor | None,
    gain: Tensor | None,
    variance: Tensor | None,
    deviation: Tensor | None,
    seed: Tensor | None,
    window: Window,
    spec: MVMSpec,
) -> Tensor:
    """The output of a convolution with one input tile and one range.

    Args:
        x: (B, C, *image).
        weight, variance: (O, C / groups, *kernel); the rest as for :func:`linear`.

    Returns:
        (B, O, *out) of x's dtype.
    """
    spec = _of_floats(spec)
    axes = (-1, *[1] * (x.dim() - 2))
    r = None if input_range is None else input_range[0]
    analog_x = plain.converted(x, r, spec)
    y = image.laid_out(image.convolve(analog_x, weight, window, spec.groups), x)
    if seed is not None:
        of_weights = of_output = None
        if variance is not None:
            of_weights = image.convolve(analog_x.square(), variance, window, spec.groups)
        if deviation is not None:
            assert r is not None
            of_output = deviation[0].view(axes) * r
        y = _noisy(y, of_weights, of_output, seed, 1)
    peak = None if peaks is None else peaks[0].view(axes)
    y, bound = plain.tile_output(y, r, peak, None, spec)
    if bound is not None:
        y = ref.clamp_to(y, bound)
    if gain is not None:
        y = y * gain[0].view(axes)
    if bias is not None:
        y = y + ref.wide(bias).view(axes)
    return y.to(x.dtype)
