"""The fused product of one site on its tiles, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.linear`. What differs:
modified weights are kept in x's dtype, as a digital layer would have them; noise is Philox on
every device; and clipped outputs are marked by packed bits.

Nothing of the size of x or W is kept for the backward: the modified weights and the converted
inputs are made again, from W, x and the seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import plan
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import Gradients, is_kept, packed_shape
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks, eight_bit
from analogfx.kernels.triton.backward import input_launch, partial_shape, weight_launch
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.forward import forward_launch
from analogfx.kernels.triton.inputs import converted, tile_ranges
from analogfx.kernels.triton.launch import blocks_of
from analogfx.kernels.triton.weights import geometry, maxima, modified_weight, scaled_by


class Operand(NamedTuple):
    """Inputs as a product takes them."""

    x: Tensor
    convert: bool
    """Whether the product's prologue converts them."""
    spec: MVMSpec
    """The site's, without the DAC where ``x`` holds what its codes stand for."""


def operand(
    x: Tensor,
    ranges: Tensor | None,
    dtype: torch.dtype,
    across: int,
    values: bool,
    spec: MVMSpec,
) -> Operand:
    """Inputs (N, I) for a product whose operands are of a dtype.

    Args:
        across: blocks that read every input.
        values: what the codes stand for, not the codes: the step is no factor of this product.
    """
    if ranges is None:
        return Operand(x, False, spec)
    if not values and plan.largest_code(spec.inp_res) > plan.EXACT[dtype]:
        return Operand(converted(x, ranges, dtype, True, spec), False, spec._replace(inp_res=0.0))
    if plan.prepares(x.shape[0], across):
        return Operand(converted(x, ranges, dtype, values, spec), False, spec)
    return Operand(x, True, spec)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    spec: MVMSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the bits of clipped outputs, and nothing.

    Args:
        x: (..., I), any strides.
        weight: (O, I), of x's dtype: float32, float16 or bfloat16.
        bias: (O,) or None.
        input_range: (k,) float32, None unless the range is static or fast.
        clip: (k, O) or None.
        seed: int64 (), None unless something is noisy.
    """
    rows = _rows(x)
    ranges = tile_ranges(rows, input_range, spec)
    shape = (*x.shape[:-1], weight.shape[0])
    clipped = x.new_empty(packed_shape(x, weight, spec), dtype=torch.uint8)
    nothing = weight.new_empty(0)
    if plan.eight_bit(spec):
        held = eight_bit.prepare(weight, clip, spec)
        y = _product(rows, held.codes, bias, ranges, held.peaks, held.step, seed, None, spec)
        return y.view(shape), clipped, nothing
    peaks = maxima(weight, clip, spec)
    w = modified_weight(weight, clip, seed, peaks, spec)
    if plan.by_vendor(x.dtype, spec):
        if ranges is not None:
            rows = converted(rows, ranges, x.dtype, True, spec)
        return F.linear(rows, w, bias).view(shape), clipped, nothing
    y = _product(rows, w, bias, ranges, peaks, None, seed, _if_kept(clipped), spec)
    return y.view(shape), clipped, nothing


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _if_kept(clipped: Tensor) -> Tensor | None:
    return clipped if is_kept(clipped) else None


def _product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ranges: Tensor | None,
    peaks: Tensor | None,
    step: Tensor | None,
    seed: Tensor | None,
    clipped: Tensor | None,
    spec: MVMSpec,
    bits_only: bool = False,
) -> Tensor:
    """The fused kernel: y (N, O), or with ``bits_only`` only the bits into ``clipped``."""
    tile = forward_blocks(w.dtype, x.shape[0], spec)
    across = blocks_of(w.shape[0], tile.outputs)
    inputs = operand(x, ranges, w.dtype, across, False, spec)
    noise_scale = bound_scale = None
    if spec.out_noise:
        assert peaks is not None
        noise_scale = scaled_by(peaks, spec.out_noise_per_channel, spec)
    if spec.out_bound:
        assert peaks is not None
        bound_scale = scaled_by(peaks, spec.bound_per_channel, spec)
    y = x.new_empty((0 if bits_only else x.shape[0], w.shape[0]))
    forward_launch(
        inputs.x,
        w,
        bias,
        ranges,
        step,
        noise_scale,
        bound_scale,
        seed,
        None if bits_only else y,
        clipped,
        inputs.convert,
        inputs.spec,
        tile,
    ).run()
    return y


def forward_blocks(dtype: torch.dtype, rows: int, spec: MVMSpec) -> Blocks:
    """Blocks of the forward product."""
    if any(size % 16 for size in spec.in_sizes):
        return blocks.choose("unaligned", dtype, rows)
    heavy = rows > plan.FEW and (spec.out_noise or spec.range_mode == "dynamic")
    return blocks.choose("heavy" if heavy else "forward", dtype, rows)


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
    """Gradients of :func:`forward`; the arguments are those of ``linear.backward``."""
    need_x, need_w, need_bias, need_range, need_clip = needs
    g, rows = grad.reshape(math.prod(x.shape[:-1]), weight.shape[0]), _rows(x)
    ranges = tile_ranges(rows, input_range, spec)
    bits = None
    out = Gradients(*(x.new_empty(0) for _ in needs))
    if spec.out_bound or need_x or need_range:
        peaks = maxima(weight, clip, spec)
        w = modified_weight(weight, clip, seed, peaks, spec)
        if spec.out_bound:
            bits = _if_kept(clipped)
            if bits is None:
                kept = packed_shape(x, weight, spec._replace(keep=True))
                bits = x.new_empty(kept, dtype=torch.uint8)
                _product(rows, w, None, ranges, peaks, None, seed, bits, spec, bits_only=True)
        if need_x or need_range:
            dx, grad_range = _input_gradients(g, w, rows, ranges, bits, need_x, need_range, spec)
            if dx is not None:
                out = out._replace(x=dx.view(x.shape))
            if grad_range is not None:
                out = out._replace(input_range=grad_range)
    if need_w or need_clip:
        dw, grad_clip = _weight_gradients(g, rows, ranges, bits, weight, clip, need_w, spec)
        if dw is not None:
            out = out._replace(weight=dw)
        if need_clip and grad_clip is not None:
            out = out._replace(clip=grad_clip)
    if need_bias:
        out = out._replace(bias=g.sum(0, dtype=torch.float32).to(weight.dtype))
    return out


def _input_gradients(
    g: Tensor,
    w: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    bits: Tensor | None,
    need_x: bool,
    need_range: bool,
    spec: MVMSpec,
) -> tuple[Tensor | None, Tensor | None]:
    clamped = ranges is not None and spec.range_mode != "dynamic"
    if bits is None and not clamped:  # a plain product, which the vendor's is the best for
        return g @ w, None
    tile = blocks.choose("input", w.dtype, x.shape[0])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    partial = None
    if need_range:
        shape = partial_shape(x.shape[0], spec, tile)
        partial = x.new_empty(shape, dtype=torch.float32)
    input_launch(g, w, x, ranges, bits, dx, partial, spec, tile).run()
    if partial is None:
        return dx, None
    assert ranges is not None
    data, count = partial.sum(-1)
    if spec.range_mode == "fast":
        return dx, data
    share = count / _by_tile(spec, float(x.shape[0]), ranges)
    return dx, ref.range_grad(data, share, ranges, spec.decay, spec.input_min_percentage)


def _by_tile(spec: MVMSpec, factor: float, like: Tensor) -> Tensor:
    """(k,) float32: ``factor`` times the inputs of every tile, made on the device."""
    size, larger = geometry(spec).values()
    sizes = torch.full((len(spec.in_sizes),), float(size), device=like.device)
    sizes[:larger] += 1.0
    return sizes * factor


def _weight_gradients(
    g: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    bits: Tensor | None,
    weight: Tensor,
    clip: Tensor | None,
    need_w: bool,
    spec: MVMSpec,
) -> tuple[Tensor | None, Tensor | None]:
    dynamic = spec.range_mode == "dynamic"
    if bits is None and clip is None and (plan.by_vendor(x.dtype, spec) or dynamic):
        if ranges is not None:
            x = converted(x, ranges, x.dtype, True, spec)
        return g.T @ x, None
    tile = blocks.choose("weight" if clip is None else "clip", g.dtype, x.shape[0])
    across = blocks_of(weight.shape[0], tile.outputs)
    inputs = operand(x, ranges, g.dtype, across, dynamic, spec)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if need_w else None
    partial = None
    if clip is not None:
        shape = len(spec.in_sizes), blocks_of(max(spec.in_sizes), tile.inputs), weight.shape[0]
        partial = x.new_empty(shape, dtype=torch.float32)
    weight_launch(
        g, inputs.x, ranges, bits, weight, clip, dw, partial, inputs.convert, inputs.spec, tile
    ).run()
    if clip is None or partial is None:
        return dw, None
    states = spec.weight_states
    count = _by_tile(spec, float(weight.shape[0]), partial).clamp_min(1.0)
    factor = 2 * torch.sqrt(states / 2 / count) / states if states else count.rsqrt()
    sign = torch.where(clip < 0, -1.0, 1.0)
    return dw, (partial.sum(1) * factor.unsqueeze(-1) * sign).to(clip.dtype)
