"""The fused product of one site on its tiles, in plain torch: forward and backward.

Forward, for tile t of k along the inputs (NUMERICS of AIHWKIT-Lightning, ``TorchLinear.linear``):

    x_t = DAC(clamp(x[t], +-r_t))
    w_t = noise(quantise(clip(W[:, t])))
    y   = sum_t clamp(ADC(x_t w_t^T + output noise), +-B_t) + bias

Backward: straight through every rounding and noise, 0 where an ADC or a range clamped; the
weights receive g^T x_t. Everything is computed in float32 for half precision data and rounded
once at the end.

Noise of the weights is stream 0 over the whole matrix, output noise of tile t is stream t + 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import noise
from analogfx.kernels import reference as ref
from analogfx.kernels.blocks import BLOCK, SERIAL_BLOCK, row_blocks
from analogfx.kernels.spec import MVMSpec

_BITS = 8


class Gradients(NamedTuple):
    """Gradients by input; a tensor without elements where none was asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    input_range: Tensor
    clip: Tensor


def tiles(in_sizes: list[int]) -> list[tuple[int, slice]]:
    """Every tile's number and its slice of the inputs."""
    slices, start = [], 0
    for number, size in enumerate(in_sizes):
        slices.append((number, slice(start, start + size)))
        start += size
    return slices


def grouped(t: Tensor, groups: int, axis: int) -> Tensor:
    """An axis of a tensor split into (groups, rest); unchanged for one group."""
    return t if groups == 1 else t.unflatten(axis, (groups, t.shape[axis] // groups))


def clipped_shape(x: Tensor, weight: Tensor, spec: MVMSpec) -> tuple[int, ...]:
    """Shape of the bits that mark clipped outputs: a byte holds eight tiles."""
    if not (spec.keep and spec.out_bound):
        return (0,)
    planes = (len(spec.in_sizes) + _BITS - 1) // _BITS
    return (planes, math.prod(x.shape[:-1]), weight.shape[0])


def is_kept(t: Tensor) -> bool:
    """Whether the forward kept a tensor for the backward; else it has the shape (0,)."""
    return t.dim() > 1


def keeps_weight(weight: Tensor, spec: MVMSpec) -> bool:
    """Whether the noisy weights stay until the backward: drawing again costs more on a CPU."""
    return bool(spec.keep and spec.noise_std) and weight.device.type == "cpu"


def maxima(w: Tensor, clip: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """What scales noise and bounds of one tile's rows: their largest weight or learned clip."""
    if clip is not None:
        return grouped(ref.wide(clip[tile]).abs(), spec.groups, 0)
    return ref.row_max(w) if spec.needs_max else None


def scale(peak: Tensor | None, per_channel: bool, spec: MVMSpec) -> Tensor:
    """Each row's own maximum, or that of the tile which holds the row."""
    assert peak is not None
    return peak if per_channel else ref.tile_max(peak, spec.out_sizes)


def modified_weight(
    w: Tensor, clip: Tensor | None, seed: Tensor | None, spec: MVMSpec
) -> tuple[Tensor, list[Tensor | None]]:
    """The weights as the tiles hold them, and each tile's row maxima.

    Args:
        w: (O, I), or (groups, O / groups, I).

    Returns:
        A tensor of w's shape in the precision of the computation (``w`` itself where nothing
        changes it), and the maxima of the unmodified weights for each tile.
    """
    peaks = [maxima(w[..., s], clip, t, spec) for t, s in tiles(spec.in_sizes)]
    if not spec.weight_states and not spec.noise_std and clip is None:
        return ref.wide(w), peaks

    def by_tile(per_channel: bool) -> Tensor:
        return torch.stack([scale(peak, per_channel, spec) for peak in peaks], dim=-1)

    sigma = spec.noise_std * by_tile(spec.noise_per_channel) if spec.noise_std else None
    bound = by_tile(spec.weight_per_channel) if spec.weight_states else None
    clips = by_tile(True) if clip is not None else None

    def finish(rows: slice, out: Tensor) -> None:
        # Where noise is drawn this runs in a thread, whose ops must not spread over the cores.
        for b in row_blocks(out, SERIAL_BLOCK if spec.noise_std else BLOCK):
            at = slice(rows.start + b.start, rows.start + b.stop)
            part = w[at]
            if bound is not None:
                spread = _spread(bound[at], spec.in_sizes)
                part = ref.quantize_weight(part, spread, spec.weight_states)
            elif clips is not None:
                part = ref.clip_weight(part, _spread(clips[at], spec.in_sizes))
            if sigma is not None:
                out[b].mul_(_spread(sigma[at], spec.in_sizes)).add_(part)
            else:
                out[b] = part

    dtype = ref.wide(w.new_empty(0)).dtype
    if spec.noise_std:
        assert seed is not None
        return noise.normal(seed, 0, w.shape, dtype, finish), peaks
    out = torch.empty_like(w, dtype=dtype)
    finish(slice(0, out.shape[0]), out)
    return out, peaks


def _spread(v: Tensor, in_sizes: list[int]) -> Tensor:
    """A value for every tile, (..., k), as one for every input, or (..., 1) for one tile."""
    if len(in_sizes) == 1:
        return v
    widest = max(in_sizes)  # sizes differ by one at most, and the larger ones come first
    spread = v.unsqueeze(-1).expand(*v.shape, widest).flatten(-2)
    if widest * len(in_sizes) == sum(in_sizes):
        return spread
    larger = in_sizes.count(widest)
    tail = v[..., larger:].unsqueeze(-1).expand(*v.shape[:-1], -1, widest - 1).flatten(-2)
    return torch.cat([spread[..., : larger * widest], tail], dim=-1)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T, for each group where there is a group axis: (N, O) or (N, groups, O / groups)."""
    if w.dim() == 2:
        return F.linear(x, w)
    return torch.matmul(x.transpose(0, 1), w.mT).transpose(0, 1)


def tile_range(x: Tensor, input_range: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """The range of one tile: () learned or measured, (..., 1) dynamic, None where there is none."""
    if spec.range_mode == "dynamic":
        return ref.wide(ref.range_dynamic(x))
    return None if input_range is None else input_range[tile]


def at_rows(v: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a value that has one for every row; a scalar as it is."""
    return v if v is None or v.dim() == 0 else v[rows]


def converted(x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """One tile's input behind the DAC."""
    if r is None:
        return ref.wide(x)
    clamp = spec.range_mode != "dynamic"
    out = torch.empty_like(x, dtype=ref.wide(x.new_empty(0)).dtype)
    for b in row_blocks(x):
        row_range = at_rows(r, b)
        assert row_range is not None
        ref.dac(x[b], row_range, spec.inp_res, clamp, out=out[b])
    return out


def tile_output(
    y: Tensor, r: Tensor | None, peak: Tensor | None, draw: Tensor | None, spec: MVMSpec
) -> tuple[Tensor, Tensor | None]:
    """A tile's product with output noise and ADC, not yet clamped, and its bound.

    Args:
        y: the product, outputs last (or as ``peak`` broadcasts). Overwritten.
        draw: standard normal values of y's shape, None without output noise.
    """
    if draw is not None:
        assert r is not None
        a = scale(peak, spec.out_noise_per_channel, spec)
        y = ref.output_noise(y, a, r, draw, spec.out_noise)
    if not spec.out_bound:
        return y, None
    assert r is not None
    bound = ref.adc_bound(r, scale(peak, spec.bound_per_channel, spec), spec.out_bound)
    return ref.adc_(y, bound, spec.out_res), bound


def _draw(y: Tensor, seed: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """Standard normal values for the output noise of one tile."""
    if not spec.out_noise:
        return None
    assert seed is not None
    return noise.normal(seed, tile + 1, y.shape, y.dtype)


def any_beyond(y: Tensor, bound: Tensor) -> bool:
    """Whether to mark clipped outputs: on the CPU, whether there are any."""
    if y.device.type != "cpu" or y.numel() == 0:
        return True
    return not bool(y.abs().sub_(bound).max() <= 0)  # a third of the time of the marks


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    spec: MVMSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the bits of clipped outputs, and the noisy weights.

    Args:
        x: (..., groups * I), any strides.
        weight: (O, I), of x's dtype.
        bias: (O,) or None.
        input_range: (k,) float32, None unless the range is static or fast.
        clip: (k, O) or None.
        seed: int64 (), None unless something is noisy.

    Returns:
        ``y`` (..., O) of x's dtype; ``clipped`` uint8 (see :func:`clipped_shape`) and
        ``modified`` (weight's shape), both without elements unless the backward keeps them.
    """
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    modified, peaks = modified_weight(w, clip, seed, spec)
    clipped = torch.zeros(clipped_shape(x, weight, spec), dtype=torch.uint8, device=x.device)
    total = None
    for t, s in tiles(spec.in_sizes):
        r = tile_range(rows[..., s], input_range, t, spec)
        y = product(converted(rows[..., s], r, spec), modified[..., s])
        marks = clipped[t // _BITS] if clipped.numel() else None
        total = _accumulate(total, y, r, peaks[t], _draw(y, seed, t, spec), marks, t, spec)
    assert total is not None
    out = total.flatten(1)
    if bias is not None:
        out = out.add_(ref.wide(bias))
    kept = modified.view(weight.shape) if keeps_weight(weight, spec) else weight.new_empty(0)
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), clipped, kept


def _accumulate(
    total: Tensor | None,
    y: Tensor,
    r: Tensor | None,
    peak: Tensor | None,
    draw: Tensor | None,
    marks: Tensor | None,
    tile: int,
    spec: MVMSpec,
) -> Tensor:
    """Add one tile's product, behind its ADC, to the sum of the tiles before it.

    Args:
        total: the sum so far, None for the first tile. Overwritten.
        y: the product. Overwritten.
        marks: where to set this tile's bit for clipped outputs, or None.
    """
    if draw is None and not spec.out_bound:
        return y if total is None else total.add_(y)
    for b in row_blocks(y):
        z, bound = tile_output(y[b], at_rows(r, b), peak, at_rows(draw, b), spec)
        if bound is not None:
            if marks is not None and any_beyond(z, bound):
                beyond = (z.abs() > bound).view(torch.uint8).flatten(1)
                marks[b].bitwise_or_(beyond << tile % _BITS)
            z = ref.clamp_to(z, bound, out=y[b])
        if total is not None:
            total[b].add_(z)
        elif spec.out_noise and bound is None:
            y[b] = z
    return y if total is None else total


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`.

    Args:
        grad: (..., O), gradient of the output.
        clipped, modified: what the forward returned; computed again where they are empty.
        needs: which of x, weight, bias, input_range, clip to return a gradient for.
    """
    need_x, need_w, need_bias, need_range, need_clip = needs
    spans = tiles(spec.in_sizes)
    flat = ref.wide(grad.reshape(-1, weight.shape[0]))
    g = grouped(flat, spec.groups, -1)
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    peaks: list[Tensor | None] = []
    if not is_kept(modified):
        modified, peaks = modified_weight(w, clip, seed, spec)
    else:
        modified = grouped(modified, spec.groups, 0)

    ranges = [tile_range(rows[..., s], input_range, t, spec) for t, s in spans]
    analog_x = _join([converted(rows[..., s], ranges[t], spec) for t, s in spans])
    passed = _passed(g, analog_x, modified, ranges, peaks, seed, clipped, spec)
    if all(tile is g for tile in passed):  # nothing was clipped: one product for all tiles
        products = [(g, slice(None))]
    else:
        products = [(passed[t], s) for t, s in spans]

    out = Gradients(*(x.new_empty(0) for _ in needs))
    if need_x or need_range:
        grad_x = _join([product(tile_g, modified[..., s].mT) for tile_g, s in products])
        grads = [_through_clamp(grad_x[..., s], rows[..., s], ranges[t], spec) for t, s in spans]
        if need_range:
            out = out._replace(input_range=torch.stack(grads))
        if need_x:
            out = out._replace(x=grad_x.reshape(x.shape).to(x.dtype))
    if need_w or need_clip:
        grad_w = _join([outer(tile_g, analog_x[..., s]) for tile_g, s in products])
        if clip is not None:
            pairs = [
                ref.weight_backward(
                    grad_w[..., s], w[..., s], grouped(clip[t], spec.groups, 0), spec.weight_states
                )
                for t, s in spans
            ]
            grad_w = _join([pair[0] for pair in pairs])
            grad_clip = torch.stack([pair[1].flatten() for pair in pairs])
            out = out._replace(clip=grad_clip.to(clip.dtype))
        if need_w:
            out = out._replace(weight=grad_w.reshape(weight.shape).to(weight.dtype))
    if need_bias:
        out = out._replace(bias=flat.sum(0).to(weight.dtype))
    return out


def _join(parts: list[Tensor]) -> Tensor:
    """Tiles side by side along the inputs."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def outer(g: Tensor, x: Tensor) -> Tensor:
    """g^T x over the rows, (O, I) or (groups, O / groups, I)."""
    if g.dim() == 2:
        return g.mT @ x
    return torch.matmul(g.permute(1, 2, 0), x.transpose(0, 1))


def _passed(
    g: Tensor,
    analog_x: Tensor,
    modified: Tensor,
    ranges: list[Tensor | None],
    peaks: list[Tensor | None],
    seed: Tensor | None,
    clipped: Tensor,
    spec: MVMSpec,
) -> list[Tensor]:
    """The gradient that each tile's ADC lets through: ``g`` itself where nothing is clipped."""
    count = len(spec.in_sizes)
    if not spec.out_bound or g.numel() == 0:
        return [g] * count
    if not is_kept(clipped):
        masks = []
        for t, s in tiles(spec.in_sizes):
            y = product(analog_x[..., s], modified[..., s])
            y, bound = tile_output(y, ranges[t], peaks[t], _draw(y, seed, t, spec), spec)
            assert bound is not None
            masks.append(y.abs() > bound)
    elif clipped.device.type == "cpu" and not clipped.any():  # no sync: it is in host memory
        return [g] * count
    else:
        bits = [clipped[t // _BITS] & (1 << t % _BITS) for t in range(count)]
        masks = [b.bool().view_as(g) for b in bits]
    return [g.masked_fill(mask, 0.0) for mask in masks]


def _through_clamp(grad: Tensor, x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """Take one tile's gradient through the clamp of its input, in place.

    Args:
        grad: gradient at the clamped input; on return, at the raw input.

    Returns:
        The gradient of the tile's range, (). Zero where there is no learned range.
    """
    data, count = grad.new_zeros(()), grad.new_zeros(())
    if r is None or spec.range_mode == "dynamic":
        return data
    for b in row_blocks(grad):
        if spec.range_mode == "fast":
            data += ref.range_grad_fast(grad[b], x[b], r)
        else:
            beyond = ref.saturated(x[b], r)
            count += beyond.sum()
            data += ref.saturation_grad(grad[b], x[b], beyond)
        grad[b].mul_(ref.inside(x[b], r))
    if spec.range_mode == "fast":
        return data
    share = count / x.numel()
    return ref.range_grad(data, share, r, spec.decay, spec.input_min_percentage)
