"""Weights as tiles hold them, in two passes that never write the parameter.

    m[t, o] = max_i |W[o, i]|                        over the inputs i of tile t
    W~      = noise(quantise(clip(W)))               written once, in the compute dtype

    quantise: round(clamp(W / s, +-n/2)) s, s = 2 b / n, for n states and a bound b by row or tile
    clip:     clamp(W / c, +-1) c
    noise:    W + sigma m N(0, 1), N keyed by (seed, stream 0), counter = the element's index

With CODES the integers of the quantisation are written, without their step s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels import integers, plan
from analogfx.kernels import reference as ref
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.device import (
    LEAST,
    clamp,
    normal_quads,
    round_even,
    rounded_to,
    tile_span,
)
from analogfx.kernels.triton.launch import Launch, blocks_of, geometry, is_even
from analogfx.kernels.weights import is_modified


@triton.jit
def row_max(
    p_w,
    p_max,
    n_rows,
    size,
    larger,
    stride_wo,
    stride_wi,
    stride_mo,
    stride_mt,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """max |.| of every row within one tile; NaN where there is one."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    start, length = tile_span(tile, size, larger, EVEN)
    m_row = o_row < n_rows
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, length, BLOCK_COLUMNS):
        o_column = first + tl.arange(0, BLOCK_COLUMNS)
        m = m_row[:, None] & (o_column < length)[None, :]
        o_input = (start + o_column).to(tl.int64)
        at = o_row[:, None] * stride_wo + o_input[None, :] * stride_wi
        v = tl.abs(tl.load(p_w + at, mask=m, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
    isnan = tl.max((largest != largest).to(tl.int32), axis=1)
    most = tl.max(largest, axis=1)
    most = tl.where(isnan != 0, float("nan"), most)
    tl.store(p_max + o_row * stride_mo + tile * stride_mt, most, mask=m_row)


def row_max_launch(w: Tensor, out: Tensor, spec: MVMSpec) -> Launch:
    """Maxima of every row of a matrix (rows, I) within each tile.

    Args:
        out: float32, (k, rows), any strides.
    """
    rows = w.shape[0]
    return Launch(
        row_max,
        (blocks_of(rows, blocks.ROWS), len(spec.in_sizes)),
        {
            "p_w": w,
            "p_max": out,
            "n_rows": rows,
            **geometry(spec),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
            "stride_mo": out.stride(1),
            "stride_mt": out.stride(0),
        },
        {"EVEN": is_even(spec), "BLOCK_ROWS": blocks.ROWS, "BLOCK_COLUMNS": blocks.COLUMNS},
    )


@triton.jit
def modify_weight(
    p_w,
    p_bound,
    p_scale,
    p_seed,
    p_out,
    n_outputs,
    n_inputs,
    size,
    larger,
    stride_wo,
    stride_wi,
    TILES: tl.constexpr,
    STATES: tl.constexpr,
    NOISE: tl.constexpr,
    CODES: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clip or quantise, then noise, for BLOCK consecutive elements of the contiguous result."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    first_row = first // n_inputs
    o_input = (first - first_row * n_inputs).to(tl.int32) + tl.arange(0, BLOCK)
    if LONG:  # at most one row ends within the block
        beyond = o_input >= n_inputs
        o_row = first_row + beyond.to(tl.int64)
        o_input -= tl.where(beyond, n_inputs, 0)
    else:
        o_row = first_row + o_input // n_inputs
        o_input = o_input % n_inputs
    m = o_row < n_outputs
    w = tl.load(p_w + o_row * stride_wo + o_input.to(tl.int64) * stride_wi, mask=m, other=0.0)
    w = w.to(tl.float32)

    o_scale = o_row
    if TILES > 1:
        in_larger = o_input // (size + 1)
        in_smaller = (o_input - larger) // size
        o_scale += tl.where(in_larger < larger, in_larger, in_smaller).to(tl.int64) * n_outputs
    if p_bound is not None:
        bound = tl.load(p_bound + o_scale, mask=m, other=0.0)
        if STATES > 0:
            step = 2.0 * tl.math.div_rn(bound, STATES + tl.zeros_like(bound))
            step = tl.where(step == 0, 1.0, step)
            # Clamped before the rounding: an odd number of states ends on half a step.
            ratio = tl.math.div_rn(w, tl.maximum(step, LEAST))
            w = round_even(clamp(ratio, STATES / 2))
            if not CODES:
                w = w * step
        else:
            bound = tl.where(bound == 0, 1.0, bound)
            ratio = tl.math.div_rn(w, tl.maximum(bound, LEAST))
            w = clamp(ratio, 1.0) * bound
    if NOISE > 0:
        sigma = NOISE * tl.load(p_scale + o_scale, mask=m, other=0.0)
        counter = first // 4 + tl.arange(0, BLOCK // 4)
        draw = normal_quads(tl.load(p_seed), counter, tl.full((), 0, tl.int32))
        w += tl.reshape(draw, (BLOCK,)) * sigma
    tl.store(p_out + o, rounded_to(w, p_out.dtype.element_ty), mask=m)


def modify_launch(
    w: Tensor,
    bound: Tensor | None,
    noise_scale: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    spec: MVMSpec,
    codes: bool = False,
) -> Launch:
    """Weights (O, I) into ``out`` as the tiles hold them.

    Args:
        bound: (k, O) float32: what quantisation or the learned clip scales by, or None.
        noise_scale: (k, O) float32: what weight noise is relative to, or None.
        out: contiguous, of w's shape.
        codes: write the integers of the quantisation, not what they stand for.
    """
    return Launch(
        modify_weight,
        (blocks_of(w.numel(), blocks.ELEMENTS),),
        {
            "p_w": w,
            "p_bound": bound,
            "p_scale": noise_scale,
            "p_seed": seed if noise_scale is not None else None,
            "p_out": out,
            "n_outputs": w.shape[0],
            "n_inputs": w.shape[1],
            **geometry(spec),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
        },
        {
            "TILES": len(spec.in_sizes),
            "STATES": float(spec.weight_states),
            "NOISE": float(spec.noise_std) if noise_scale is not None else 0.0,
            "CODES": codes,
            "LONG": w.shape[1] >= blocks.ELEMENTS,
            "BLOCK": blocks.ELEMENTS,
        },
    )


def maxima(w: Tensor, clip: Tensor | None, spec: MVMSpec) -> Tensor | None:
    """(k, O) float32, what scales the rows of every tile; None where nothing needs it."""
    if clip is not None:
        return clip.float().abs()
    if not spec.needs_max:
        return None
    out = w.new_empty((len(spec.in_sizes), w.shape[0]), dtype=torch.float32)
    row_max_launch(w, out, spec).run()
    return out


def scaled_by(peaks: Tensor, per_channel: bool, spec: MVMSpec) -> Tensor:
    """(k, O): each row's own maximum in a tile, or that of the tile along the outputs."""
    if per_channel or not peaks.numel():
        return peaks
    parts = [part.amax(1, keepdim=True).expand_as(part) for part in peaks.split(spec.out_sizes, 1)]
    return torch.cat(parts, 1)


def code_scale(peaks: Tensor, spec: MVMSpec) -> Tensor | None:
    """(k, O) float32: ``rho`` of ``kernels.integers``; None for a site that multiplies no codes."""
    if not integers.depth(spec):
        return None
    ratio = integers.ratio(spec)
    if integers.same_maxima(spec):
        return torch.full_like(peaks, ratio)
    a = scaled_by(peaks, spec.bound_per_channel, spec)
    return ref.code_scale(scaled_by(peaks, spec.weight_per_channel, spec), a, ratio)


def weight_codes(w: Tensor, clip: Tensor | None, peaks: Tensor, spec: MVMSpec) -> Tensor:
    """The integers of the quantisation, in w's dtype or one that holds both operands' codes."""
    dtypes = (w.dtype, torch.float16, torch.float32)
    most = integers.largest_of(spec)
    dtype = next((d for d in dtypes if most <= plan.EXACT[d]), torch.float32)
    bound = scaled_by(peaks, clip is not None or spec.weight_per_channel, spec)
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    modify_launch(w, bound, None, None, out, spec, codes=True).run()
    return out


def multiplied(
    w: Tensor, clip: Tensor | None, seed: Tensor | None, peaks: Tensor | None, spec: MVMSpec
) -> Tensor:
    """The weights as the forward product takes them: codes where the site multiplies codes."""
    if not integers.depth(spec):
        return modified_weight(w, clip, seed, peaks, spec)
    assert peaks is not None
    return weight_codes(w, clip, peaks, spec)


def modified_weight(
    w: Tensor, clip: Tensor | None, seed: Tensor | None, peaks: Tensor | None, spec: MVMSpec
) -> Tensor:
    """The weights as the tiles hold them, in w's dtype; ``w`` itself where nothing changes it."""
    if not is_modified(spec, clip):
        return w
    assert peaks is not None
    bound = noise_scale = None
    if clip is not None or spec.weight_states:
        bound = scaled_by(peaks, clip is not None or spec.weight_per_channel, spec)
    if spec.noise_std:
        noise_scale = scaled_by(peaks, spec.noise_per_channel, spec)
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    modify_launch(w, bound, noise_scale, seed, out, spec).run()
    return out
