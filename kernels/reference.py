"""The arithmetic of one analog tile, in plain torch: the specification in code.

Every function is a formula of AIHWKIT-Lightning 2.1.0's torch mode (``torch_linear.py`` and
``quant_utils.py`` there), forward and backward, with the departures that the documentation lists.
Nothing here reads a value back to the host or writes to its inputs.

Shapes: a tile sees ``x`` (..., I) and ``w`` (O, I), with a leading group axis on both for grouped
products. ``a`` is a vector over outputs. Ranges and maxima are float32 (float64 for float64 data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNTOUCHED = 1e-5
"""Initial -x_min and x_max of the fast mode, as in the reference."""


ABSURD = 2.0**64
"""Inputs as large have squares that float32 cannot hold: of no use, and not to be learned from."""


def believable(statistic: Tensor) -> Tensor:
    """Whether a spread or an extreme of inputs may set a range: uninitialised memory may not."""
    return statistic.abs() < ABSURD


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: the precision that sites compute in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def clamp_to(x: Tensor, bound: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` within +-bound, for a bound that broadcasts. Passes NaN on."""
    if bound.numel() == 1 and bound.device.type == "cpu":  # in host memory, so no sync
        value = float(bound)
        return torch.clamp(x, -value, value, out=out)
    if bound.shape[-1:] == x.shape[-1:]:
        return torch.clamp(x, -bound, bound, out=out)
    # Where a bound is stretched along rows, clamp takes four times as long as two binary ops.
    return torch.minimum(torch.maximum(x, -bound, out=out), bound, out=out)


def step_of(bound: Tensor, res: float) -> Tensor:
    """Width of a quantisation step over +-bound for a resolution in states or as a fraction."""
    return 2 * bound / res if res > 1.0 else 2 * bound * res


def on_grid_(x: Tensor, step: Tensor) -> Tensor:
    """The number of steps that ``x`` is rounded to, in place, half to even."""
    return x.div_(step.clamp_min(torch.finfo(x.dtype).tiny)).round_()


def quantize_(x: Tensor, step: Tensor) -> Tensor:
    """Put ``x`` on the grid of a step in place, half to even. A step of 0 gives 0."""
    return on_grid_(x, step).mul_(step)


# ---------------------------------------------------------------------- input ranges


def range_dynamic(x: Tensor) -> Tensor:
    """Range of every input vector: max |x| over its last axis, kept."""
    if x.shape[-1] == 0 or x.numel() == 0:
        return x.new_zeros((*x.shape[:-1], 1))
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


def range_static(
    std: Tensor, input_range: Tensor, count: Tensor, init_from_data: int, init_std_alpha: float
) -> tuple[Tensor, Tensor]:
    """Running mean of ``init_std_alpha * std``, until it has been fed ``init_from_data`` times.

    Args:
        std: (k,) unbiased standard deviation of each tile's raw input, NaN where undefined: for
            a single element, or if an element is not finite. Such a batch does not count, nor
            does one of absurd spread.
        input_range: (k,) ranges so far.
        count: (k,) int64, updates so far.

    Returns:
        The new ranges and counts. The first batch replaces the initial value.
    """
    open_ = count < init_from_data
    mean = (input_range * count + init_std_alpha * std) / (count + 1)
    fed = open_ & (std > 0) & believable(std)
    updated = torch.where(fed, mean, input_range)
    return torch.where(open_, updated.abs(), input_range), count + fed


def range_fast(
    low: Tensor,
    high: Tensor,
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    init_from_data: int,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running extremes of the input; the range is the larger magnitude.

    Args:
        low, high: (k,) extremes of each tile's input in this batch. A batch whose extremes are
            not finite, or absurd, does not count, and changes nothing.
        momentum: weight of the past, or -1 for the extremes ever seen.

    Returns:
        New ``input_range``, ``count``, ``x_min``, ``x_max``, each (k,).
    """
    open_ = (count < init_from_data) & believable(low) & believable(high)
    first = (x_min > -1.1 * UNTOUCHED) & (x_max < 1.1 * UNTOUCHED)
    if momentum == -1:
        mean_min, mean_max = torch.minimum(x_min, low), torch.maximum(x_max, high)
    else:
        mean_min = x_min * momentum + low * (1 - momentum)
        mean_max = x_max * momentum + high * (1 - momentum)
    x_min = torch.where(open_, torch.where(first, x_min + low, mean_min), x_min)
    x_max = torch.where(open_, torch.where(first, x_max + high, mean_max), x_max)
    widest = torch.maximum(x_min.abs(), x_max.abs())
    return torch.where(open_, widest, input_range), count + open_, x_min, x_max


# ------------------------------------------------------------------------------- DAC


def dac(
    x: Tensor,
    input_range: Tensor,
    inp_res: float,
    range_mode: str = "static",
    *,
    out: Tensor | None = None,
    codes: bool = False,
) -> Tensor:
    """Clamp to the range and round to the DAC's grid.

    Args:
        range_mode: nothing is beyond a range that is "dynamic": it is the input's own maximum.
        out: where to, in the precision of the computation; None for a new tensor.
        codes: give the number of steps, not what it stands for.
    """
    if out is None:
        out = torch.empty_like(x, dtype=wide(x.new_empty(0)).dtype)
    if range_mode != "dynamic":
        clamp_to(wide(x), input_range, out=out)
    else:
        out.copy_(x)
    if not inp_res:
        return out
    step = step_of(input_range, inp_res)
    return on_grid_(out, step) if codes else quantize_(out, step)


def inside(x: Tensor, input_range: Tensor) -> Tensor:
    """1 where the clamp lets a gradient pass (|x| <= range), 0 where it cut; in x's precision."""
    # An in-place comparison stays in float and is four times faster than a mask of bools.
    return wide(x).abs().le_(input_range)


def saturated(x: Tensor, input_range: Tensor) -> Tensor:
    """1 where |x| >= range, else 0; in x's precision."""
    return wide(x).abs().ge_(input_range)


def saturation_grad(grad: Tensor, x: Tensor, beyond: Tensor) -> Tensor:
    """Sum over saturated inputs of the gradient that asks for a wider range, always <= 0.

    That is min(g, 0) where x is above the range and -max(g, 0) where it is below, or min(g sign(x),
    0) for both: the data term of a learned range's gradient, before the factor ``input_range``
    (``InputRangeForward.backward`` in the reference).

    Args:
        grad: gradient at the clamped input.
        beyond: what :func:`saturated` returned.
    """
    return wide(x).sign().mul_(grad).clamp_max_(0.0).mul_(beyond).sum()


def range_grad(
    data: Tensor, share: Tensor, input_range: Tensor, decay: float, input_min_percentage: float
) -> Tensor:
    """Gradient of a static range: the data term, and decay while few inputs are saturated.

    Args:
        data: what :func:`saturation_grad` returned.
        share: share of inputs with |x| >= range, NaN for no inputs.
        input_range: the range that the forward used.
    """
    grad = data * input_range
    if decay > 0:
        grad = grad + decay * input_range * (1.0 - share > input_min_percentage)
    return grad


def range_grad_static(
    grad: Tensor, x: Tensor, input_range: Tensor, decay: float, input_min_percentage: float
) -> Tensor:
    """Gradient of a static range whose tile sees ``x``, from the gradient at the clamped input."""
    beyond = saturated(x, input_range)
    data = saturation_grad(grad, x, beyond)
    return range_grad(data, beyond.mean(), input_range, decay, input_min_percentage)


def range_grad_fast(grad: Tensor, x: Tensor, input_range: Tensor) -> Tensor:
    """Gradient of a fast-mode range: what plain autograd gives for the clamp."""
    beyond = wide(x).abs().gt_(input_range)
    return wide(x).sign().mul_(grad).mul_(beyond).sum()


# --------------------------------------------------------------------------- weights


def row_max(w: Tensor) -> Tensor:
    """max |w| of every row, (O,). Two passes without a temporary the size of ``w``."""
    if w.shape[-1] == 0:
        return wide(w.new_zeros(w.shape[:-1]))
    return wide(torch.maximum(w.amax(-1), -w.amin(-1)))


def row_std(w: Tensor) -> Tensor:
    """Unbiased standard deviation of every row, (O, 1). NaN below two columns.

    Two passes like ``torch.std``, whose CPU kernel takes thirty times as long over short rows.
    """
    centred = w - w.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return norm / math.sqrt(w.shape[-1] - 1) if w.shape[-1] > 1 else norm * float("nan")


def tile_max(row: Tensor, out_sizes: Sequence[int]) -> Tensor:
    """Every row's maximum replaced by that of the tile which holds the row."""
    if row.numel() == 0:
        return row
    if len(out_sizes) == 1:
        return row.max().expand_as(row)
    parts = row.reshape(-1).split(list(out_sizes))
    return torch.cat([part.max().expand_as(part) for part in parts]).view_as(row)


def _clip_range(clip: Tensor) -> Tensor:
    """A learned clip as a scale: its magnitude, and 1 for a clip of exactly 0."""
    return torch.where(clip == 0, 1.0, clip.abs())


def clip_weight(w: Tensor, clip: Tensor, weight_states: float = 0.0) -> Tensor:
    """Clamp ``w`` to its learned range, by way of w / clip as the reference does.

    Args:
        clip: broadcasts against w.
        weight_states: quantise into so many steps of that range; 0 for none.
    """
    if weight_states:
        return quantize_weight(w, wide(clip).abs(), weight_states)
    scale = _clip_range(wide(clip))
    scaled = wide(w) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return scaled.clamp_(-1.0, 1.0).mul_(scale)


def weight_step(bound: Tensor, states: float) -> Tensor:
    """What a weight's code of 1 stands for; 1 where the bound is 0."""
    step = 2 * (bound / states)
    return torch.where(step == 0, 1.0, step)


def weight_codes(w: Tensor, bound: Tensor, states: float) -> Tensor:
    """``w`` in steps, clamped to +-bound and rounded to ``states`` + 1 levels.

    Args:
        bound: broadcasts against w: a row's or tile's maximum, or the learned clip.
    """
    step = weight_step(bound, states)
    scaled = wide(w) / step.clamp_min(torch.finfo(step.dtype).tiny)
    return scaled.clamp_(-states / 2, states / 2).round_()


def quantize_weight(w: Tensor, bound: Tensor, states: float) -> Tensor:
    """What the codes of ``w`` stand for; see :func:`weight_codes`. A bound of 0 keeps 0."""
    return weight_codes(w, bound, states).mul_(weight_step(bound, states))


def weight_sigma(a: Tensor, noise_std: float) -> Tensor:
    """Standard deviation of the weights' noise, of the shape of ``a``."""
    return noise_std * a


def weight_backward(grad: Tensor, w: Tensor, clip: Tensor, states: float) -> tuple[Tensor, Tensor]:
    """Gradients of a learned clip: to the weights (0 outside the range) and to the clip.

    LSQ (Esser et al., arXiv 1902.08153, eq. 3 and section 2.2) for the clip of each row, as
    Lightning scales it. A negative clip acts by its magnitude.

    Args:
        grad: gradient at the clipped (and quantised) weights, (O, I).
        states: number of weight states, 0 without quantisation.
    """
    clip = wide(clip)
    half = states / 2 if states else 1.0
    scale = _clip_range(2 * (clip / states) if states else clip).unsqueeze(-1)
    ratio = wide(w) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    inside = (ratio.abs() <= half).to(grad.dtype)
    slope = torch.clamp(ratio, -half, half) * (1 - inside)
    if states:
        slope = slope + (ratio.round() - ratio) * inside
    count = max(w.numel(), 1)
    factor = 2 * math.sqrt(half / count) / states if states else 1 / math.sqrt(count)
    grad_clip = factor * (grad * slope).sum(-1) * torch.where(clip < 0, -1.0, 1.0)
    return grad * inside, grad_clip


# ---------------------------------------------------------------------- output and ADC


def output_noise(
    y: Tensor, a: Tensor, input_range: Tensor, draw: Tensor, strength: float
) -> Tensor:
    """``y`` plus Gaussian noise of standard deviation ``strength * input_range * a``.

    Args:
        draw: standard normal values of y's shape.
    """
    return y + draw * (a * (strength * input_range))


def adc_bound(input_range: Tensor, a: Tensor, out_bound: float) -> Tensor:
    """Largest output that the ADC of each channel can show."""
    return (input_range * out_bound) * a


def adc_step(bound: Tensor, out_res: float) -> Tensor:
    """Width of an ADC's step.

    A row of zero weights has bound 0; a step of 1 lets the clamp make it 0, and not 0 * inf.
    """
    step = step_of(bound, out_res)
    return torch.where(step == 0, 1.0, step)


def adc_(
    y: Tensor, a: Tensor, input_range: Tensor, out_bound: float, out_res: float
) -> tuple[Tensor, Tensor]:
    """Round to the ADC's grid (``out_res`` 0: not) in place, *before* the bound is applied.

    Returns:
        The outputs, and the bound of each channel.
    """
    bound = adc_bound(input_range, a, out_bound)
    return quantize_(y, adc_step(bound, out_res)) if out_res else y, bound


def code_scale(weight_bound: Tensor, a: Tensor, ratio: float) -> Tensor:
    """``rho``: steps of the ADC for one step of the products; see ``kernels.integers``.

    Args:
        weight_bound: what scales the steps of the weights.
        a: what scales the ADC's bound, as :func:`adc_bound` takes it.
        ratio: ``rho`` where both are the same.
    """
    limits = torch.finfo(a.dtype)  # a row of zero weights has sums of 0: any finite scale will do
    return ((weight_bound / a.clamp_min(limits.tiny)) * ratio).clamp_max(limits.max)


def adc_codes_(acc: Tensor, scale: Tensor) -> Tensor:
    """An ADC's codes for exact sums of products of codes, in place, *before* the bound."""
    return acc.mul_(scale).round_()
