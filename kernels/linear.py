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


def keeps_weight(weight: Tensor, spec: MVMSpec) -> bool:
    """Whether the noisy weights stay until the backward: drawing again costs more on a CPU."""
    return bool(spec.keep and spec.noise_std) and weight.device.type == "cpu"


def maxima(w: Tensor, clip: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """What scales noise and bounds of one tile's rows: their largest weight or learned clip."""
    if clip is not None:
        return grouped(ref.wide(clip[tile]).abs(), spec.groups, 0)
    return ref.row_max(w) if spec.needs_max else None


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
    base = ref.wide(w)
    if spec.noise_std:
        assert seed is not None
        out = noise.normal(seed, 0, w.shape, base.dtype)
    else:
        out = torch.empty_like(base)
    for t, s in tiles(spec.in_sizes):
        tile, peak = base[..., s], peaks[t]
        if spec.weight_states:
            assert peak is not None
            bound = peak if spec.weight_per_channel else ref.tile_max(peak, spec.out_sizes)
            tile = ref.quantize_weight(tile, bound, spec.weight_states)
        elif clip is not None:
            tile = ref.clip_weight(tile, grouped(clip[t], spec.groups, 0))
        if spec.noise_std:
            assert peak is not None
            peak = peak if spec.noise_per_channel else ref.tile_max(peak, spec.out_sizes)
            out[..., s].mul_((spec.noise_std * peak).unsqueeze(-1)).add_(tile)
        else:
            out[..., s] = tile
    return out, peaks


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


def converted(x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """One tile's input behind the DAC."""
    if r is None:
        return ref.wide(x)
    return ref.dac(x, r, spec.inp_res, clamp=spec.range_mode != "dynamic")


def tile_output(
    y: Tensor, r: Tensor | None, peak: Tensor | None, draw: Tensor | None, spec: MVMSpec
) -> tuple[Tensor, Tensor | None]:
    """A tile's product with output noise and ADC, not yet clamped, and its bound.

    Args:
        y: the product, outputs last (or as ``peak`` broadcasts).
        draw: standard normal values of y's shape, None without output noise.
    """
    if draw is not None:
        assert r is not None and peak is not None
        a = peak if spec.out_noise_per_channel else ref.tile_max(peak, spec.out_sizes)
        y = ref.output_noise(y, a, r, draw, spec.out_noise)
    if not spec.out_bound:
        return y, None
    assert r is not None and peak is not None
    a = peak if spec.bound_per_channel else ref.tile_max(peak, spec.out_sizes)
    bound = ref.adc_bound(r, a, spec.out_bound)
    return ref.adc(y, bound, spec.out_res), bound


def _any_beyond(y: Tensor, bound: Tensor) -> bool:
    """Whether to mark clipped outputs: on the CPU, whether there are any."""
    if y.device.type != "cpu" or y.numel() == 0:
        return True
    return not bool(y.abs().sub_(bound).max() <= 0)  # a third of the time of the marks


def _draw(y: Tensor, seed: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """Standard normal values for the output noise of one tile."""
    if not spec.out_noise:
        return None
    assert seed is not None
    return noise.normal(seed, tile + 1, y.shape, y.dtype)


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
        tile_x = rows[..., s]
        r = tile_range(tile_x, input_range, t, spec)
        y = product(converted(tile_x, r, spec), modified[..., s])
        y, bound = tile_output(y, r, peaks[t], _draw(y, seed, t, spec), spec)
        if bound is not None:
            if spec.keep and _any_beyond(y, bound):
                beyond = (y.abs() > bound).view(torch.uint8).flatten(1)
                clipped[t // _BITS].bitwise_or_(beyond << t % _BITS)
            y = ref.clamp_to(y, bound)
        total = y if total is None else total.add_(y)
    assert total is not None
    out = total.flatten(1)
    if bias is not None:
        out = out.add_(ref.wide(bias))
    kept = modified.view(weight.shape) if keeps_weight(weight, spec) else weight.new_empty(0)
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), clipped, kept


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
    if modified.numel() == 0:
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
        if need_range:
            grads = [_range_grad(grad_x[..., s], rows[..., s], ranges[t], spec) for t, s in spans]
            out = out._replace(input_range=torch.stack(grads))
        if need_x:
            cut = [_behind_clamp(grad_x[..., s], rows[..., s], ranges[t], spec) for t, s in spans]
            out = out._replace(x=_join(cut).reshape(x.shape).to(x.dtype))
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
    if not spec.out_bound:
        return [g] * count
    if clipped.numel() == 0:
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


def _range_grad(grad_x: Tensor, x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """Gradient of one tile's learned range from the gradient at its clamped input."""
    assert r is not None
    if spec.range_mode == "fast":
        return ref.range_grad_fast(grad_x, x, r)
    return ref.range_grad_static(grad_x, x, r, spec.decay, spec.input_min_percentage)


def _behind_clamp(grad_x: Tensor, x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """A tile's gradient at its raw input."""
    if r is None or spec.range_mode == "dynamic":
        return grad_x
    return grad_x * ref.inside(x, r)
