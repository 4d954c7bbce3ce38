"""The fused product of one site on its tiles, in plain torch: forward and backward.

Forward, for tile t of k along the inputs (NUMERICS of AIHWKIT-Lightning, ``TorchLinear.linear``):

    x_t = DAC(clamp(x[t], +-r_t))
    w_t = noise(quantise(clip(W[:, t])))
    y   = sum_t clamp(ADC(x_t w_t^T + output noise), +-B_t) + bias

Where the ADC's codes are a function of integers (:mod:`analogfx.kernels.integers`) the forward
multiplies the codes of x_t and w_t, and takes the ADC's from their exact sum.

Backward: straight through every rounding and noise, 0 where an ADC or a range clamped; the
weights receive g^T x_t. Everything is computed in float32 for half precision data and rounded
once at the end.

Noise of the weights is stream 0 over the whole matrix, output noise of tile t is stream t + 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import integers, noise
from analogfx.kernels import reference as ref
from analogfx.kernels.by_block import row_blocks
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.part import Part, summed
from analogfx.kernels.spec import MVMSpec, scalars
from analogfx.kernels.weights import (
    code_scale,
    grouped,
    is_modified,
    maxima,
    modified_weight,
    scale,
    summed_at_once,
    tiles,
)

_BITS = 8


def out_shape(x: Tensor, weight: Tensor, spec: MVMSpec) -> tuple[int, ...]:
    """Shape of the output."""
    return (*x.shape[:-1], weight.shape[0])


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` as the product leaves it, whatever the strides of ``x``: as it is."""
    return y


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


def product(x: Tensor, w: Tensor, depth: int = 0) -> Tensor:
    """x w^T, for each group where there is a group axis: (N, O) or (N, groups, O / groups).

    Args:
        depth: for codes, how many products their dtype sums exactly, see ``kernels.integers``.
    """
    if depth and x.shape[-1] > depth and x.dtype != torch.float64:
        spans = list(integers.parts(x.shape[-1], depth))
        total = product(x[..., spans[0]], w[..., spans[0]]).double()  # and so keeps NaN
        for s in spans[1:]:
            total.add_(product(x[..., s], w[..., s]))
        return total.to(x.dtype)
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


def converted(x: Tensor, r: Tensor | None, spec: MVMSpec, codes: bool = False) -> Tensor:
    """One tile's input behind the DAC: what its codes stand for, or the codes."""
    if r is None:
        return ref.wide(x)
    settings = scalars("dac", spec)
    out = torch.empty_like(x, dtype=ref.wide(x.new_empty(0)).dtype)
    for b in row_blocks(x):
        row_range = at_rows(r, b)
        assert row_range is not None
        ref.dac(x[b], row_range, *settings, out=out[b], codes=codes)
    return out


def tile_output(
    y: Tensor, r: Tensor | None, peak: Tensor | None, draw: Tensor | None, spec: MVMSpec
) -> tuple[Tensor, Tensor | None]:
    """A tile's product with output noise and ADC, not yet clamped, and its bound.

    Args:
        y: the product, outputs last (or as ``peak`` broadcasts): of codes where the site
            multiplies codes. Overwritten.
        draw: standard normal values of y's shape, None without output noise.
    """
    if draw is not None:
        assert r is not None
        a = scale(peak, spec.out_noise_per_channel, spec)
        y = ref.output_noise(y, a, r, draw, *scalars("output_noise", spec))
    if not spec.out_bound:
        return y, None
    assert r is not None
    a = scale(peak, spec.bound_per_channel, spec)
    if integers.depth(spec):
        assert peak is not None
        bound = ref.adc_bound(r, a, spec.out_bound)
        codes = ref.adc_codes_(y, code_scale(peak, spec))
        return codes.mul_(ref.adc_step(bound, spec.out_res)), bound
    return ref.adc_(y, a, r, *scalars("adc", spec))


def _draw(y: Tensor, seed: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    """Standard normal values for the output noise of one tile."""
    if not spec.out_noise:
        return None
    assert seed is not None
    if not spec.part:
        return noise.normal(seed, tile + 1, y.shape, y.dtype)
    part, (count, outputs) = Part(*spec.part), y.shape
    here = slice(part.row, part.row + outputs)
    shape = (count, part.rows)
    return noise.block(seed, part.tile + tile + 1, shape, slice(0, count), here, y.dtype)


def any_beyond(y: Tensor, bound: Tensor) -> bool:
    """Whether to mark clipped outputs: on the CPU, whether there are any."""
    if y.device.type != "cpu" or y.numel() == 0:
        return True
    return not bool(y.abs().sub_(bound).max() <= 0)  # a third of the time of the marks


def forward(site: Operands, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the bits of clipped outputs, and the noisy weights.

    Returns:
        ``y`` (..., O) of x's dtype; ``clipped`` uint8 (see :func:`clipped_shape`) and
        ``modified`` (weight's shape), both without elements unless the backward keeps them.
    """
    x, weight, bias, input_range, clip, seed = site
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    streamed = _streams(w, clip, spec)
    peaks = None if streamed else maxima(w, clip, spec)
    codes = integers.depth(spec) > 0
    modified = w if streamed else modified_weight(w, clip, seed, peaks, spec, codes)
    depth = summed_at_once(modified, spec) if codes else 0
    kept = modified.view(weight.shape) if keeps_weight(weight, spec) else weight.new_empty(0)
    clipped = torch.zeros(clipped_shape(x, weight, spec), dtype=torch.uint8, device=x.device)
    if spec.ends_with_product and spec.groups == 1:
        r = tile_range(rows, input_range, 0, spec)
        # With x as it came: torch rounds otherwise for a single row, or for strides of its own.
        analog_x = ref.wide(x) if r is None else converted(rows, r, spec).view(x.shape)
        out = F.linear(analog_x, modified, None if bias is None else ref.wide(bias))
        return _not_a_view(out.to(x.dtype)), clipped, kept
    total = None
    for t, s in tiles(spec.in_sizes):
        r = tile_range(rows[..., s], input_range, t, spec)
        analog_x = converted(rows[..., s], r, spec, codes)
        peak = None if peaks is None else peaks[t]
        if streamed:
            y, peak = _product_and_max(analog_x, w[..., s])
        else:
            y = product(analog_x, modified[..., s], depth)
        marks = clipped[t // _BITS] if clipped.numel() else None
        total = _accumulate(total, y, r, peak, _draw(y, seed, t, spec), marks, t, spec)
    assert total is not None
    shape = (*x.shape[:-1], weight.shape[0])
    out = total if total.shape == shape else total.reshape(shape)
    if bias is not None:
        out = out + ref.wide(bias) if out._is_view() else out.add_(ref.wide(bias))
    return _not_a_view(out.to(x.dtype)), clipped, kept


def _not_a_view(out: Tensor) -> Tensor:
    """``out``, copied if it is a view: an op's output may be written to by what follows."""
    return out.clone() if out._is_view() else out


_STREAMED = 1 << 23
"""Elements above which weights are read from memory, not from a cache."""


def _streams(w: Tensor, clip: Tensor | None, spec: MVMSpec) -> bool:
    """Whether to take maxima and product of the weights block by block, reading them once."""
    plain = spec.needs_max and not is_modified(spec, clip) and w.dim() == 2
    whole = w.device.type == "cpu" and not spec.peers
    return plain and whole and w.numel() >= _STREAMED


def _product_and_max(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x w^T, (N, O), and the largest magnitude of every row of w, (O,)."""
    y, peak = x.new_empty(x.shape[0], w.shape[0]), x.new_empty(w.shape[0])
    for b in row_blocks(w):
        peak[b] = ref.row_max(w[b])
        torch.mm(x, ref.wide(w[b]).T, out=y[:, b])
    return y, peak


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
    site: Operands,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`.

    Args:
        grad: (..., O), gradient of the output.
        site: without the bias.
        clipped, modified: what the forward returned; computed again where they are empty.
        needs: which of x, weight, bias, input_range, clip to return a gradient for.
    """
    out = backward_to_dac(grad, site, clipped, modified, needs, spec)
    x = site.x
    need_x, _, _, need_range, _ = needs
    if need_x or need_range:
        rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
        if spec.sums:
            out = out._replace(x=summed(out.x, x.dtype, spec.sums))
        grads = through_dac(out.x, rows, site.input_range, spec)
        if need_range:
            out = out._replace(input_range=grads)
        of_x = out.x.reshape(x.shape).to(x.dtype) if need_x else x.new_empty(0)
        out = out._replace(x=of_x)
    return out


def backward_to_dac(
    grad: Tensor,
    site: Operands,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`, but those of the DAC; see :func:`backward`.

    Returns:
        That of x is at the product's inputs, (N, I) or (N, groups, I) in the precision of the
        computation: :func:`through_dac` goes on from there. That of the range is left out.
    """
    x, weight, _, input_range, clip, seed = site
    need_x, need_w, need_bias, need_range, need_clip = needs
    spans = tiles(spec.in_sizes)
    flat = ref.wide(grad.reshape(-1, weight.shape[0]))
    g = grouped(flat, spec.groups, -1)
    rows = grouped(x.reshape(-1, x.shape[-1]), spec.groups, -1)
    w = grouped(weight, spec.groups, 0)
    peaks = None
    if is_kept(modified):
        modified = grouped(modified, spec.groups, 0)
    else:
        peaks = maxima(w, clip, spec)
        modified = modified_weight(w, clip, seed, peaks, spec)

    ranges = [tile_range(rows[..., s], input_range, t, spec) for t, s in spans]
    analog_x = _join([converted(rows[..., s], ranges[t], spec) for t, s in spans])
    if is_kept(clipped) or not spec.out_bound or g.numel() == 0:
        passed = _passed(g, clipped, spec)
    else:
        peaks = maxima(w, clip, spec) if peaks is None else peaks
        passed = _passed_again(g, rows, w, modified, clip, ranges, peaks, seed, spec)
    if all(tile is g for tile in passed):  # nothing was clipped: one product for all tiles
        products = [(g, slice(None))]
    else:
        products = [(passed[t], s) for t, s in spans]

    out = Gradients(*(x.new_empty(0) for _ in needs))
    if need_x or need_range:
        out = out._replace(
            x=_join([product(tile_g, modified[..., s].mT) for tile_g, s in products])
        )
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
            if spec.part:  # LSQ scales by the number of weights of the tile, all processes'
                grad_clip *= math.sqrt(weight.shape[0] / spec.part[0])
            out = out._replace(clip=grad_clip.to(clip.dtype))
        if need_w:
            out = out._replace(weight=grad_w.reshape(weight.shape).to(weight.dtype))
    if need_bias:
        out = out._replace(bias=flat.sum(0).to(weight.dtype))
    return out


def through_dac(grad: Tensor, rows: Tensor, input_range: Tensor | None, spec: MVMSpec) -> Tensor:
    """Take the gradient of a product's inputs through the clamps of all tiles, in place.

    Args:
        grad: (N, I) or (N, groups, I), in the precision of the computation.
        rows: the raw inputs, of the same shape.

    Returns:
        The gradients of the ranges, (k,); zeros where there is no learned range.
    """
    return torch.stack(
        [
            _through_clamp(
                grad[..., s],
                rows[..., s],
                tile_range(rows[..., s], input_range, t, spec),
                spec,
            )
            for t, s in tiles(spec.in_sizes)
        ]
    )


def _join(parts: list[Tensor]) -> Tensor:
    """Tiles side by side along the inputs."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def outer(g: Tensor, x: Tensor) -> Tensor:
    """g^T x over the rows, (O, I) or (groups, O / groups, I)."""
    if g.dim() == 2:
        return g.mT @ x
    return torch.matmul(g.permute(1, 2, 0), x.transpose(0, 1))


def _passed(g: Tensor, clipped: Tensor, spec: MVMSpec) -> list[Tensor]:
    """The gradient that each tile's ADC lets through: ``g`` itself where nothing is clipped."""
    count = len(spec.in_sizes)
    if not spec.out_bound or g.numel() == 0:
        return [g] * count
    if clipped.device.type == "cpu" and not clipped.any():  # no sync: it is in host memory
        return [g] * count
    bits = [clipped[t // _BITS] & (1 << t % _BITS) for t in range(count)]
    return [g.masked_fill(b.bool().view_as(g), 0.0) for b in bits]


def _passed_again(
    g: Tensor,
    rows: Tensor,
    w: Tensor,
    modified: Tensor,
    clip: Tensor | None,
    ranges: list[Tensor | None],
    peaks: Tensor | None,
    seed: Tensor | None,
    spec: MVMSpec,
) -> list[Tensor]:
    """As :func:`_passed`, where the forward kept no bits: it is done again."""
    assert peaks is not None
    depth = integers.depth(spec)
    held = modified_weight(w, clip, None, peaks, spec, codes=True) if depth else modified
    passed = []
    for t, s in tiles(spec.in_sizes):
        analog_x = converted(rows[..., s], ranges[t], spec, codes=depth > 0)
        y = product(analog_x, held[..., s], depth)
        y, bound = tile_output(y, ranges[t], peaks[t], _draw(y, seed, t, spec), spec)
        assert bound is not None
        passed.append(g.masked_fill(y.abs() > bound, 0.0))
    return passed


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
