"""The backward product that gives the gradients of the weights and of learned clips.

With g_t the gradient of the output, 0 where tile t's ADC clipped, and q_t, s_t as in the forward:

    dW[t]  = (g_t^T q_t) s_t [inside the learned clip]
    dc_t   = sum_i (g_t^T q_t) s_t slope(W / c)                   LSQ, before its factor

Without a learned clip the product is the vendor's where nothing was clipped, as in
:mod:`input_gradient`. Blocks in which something was clipped are a launch of their own: the other
loop reads no bits, and takes g from memory to the tensor cores without a detour through registers.
With both loops in one function, ptxas makes every product of a warpgroup wait for the one before
(its note C7515).

Straight through every rounding and noise. A block lies within one tile; what it adds to a clip's
gradient it stores beside the others', to be summed in one order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    LEAST,
    PATCH_OUTPUTS,
    any_marked,
    clamp,
    dac,
    dot,
    masked,
    round_even,
    rounded_to,
    step_of,
    swizzled,
    tile_range,
    tile_span,
)
from analogfx.kernels.triton.inputs import Operand
from analogfx.kernels.triton.launch import Launch, blocks_of, geometry, is_even, range_mode
from analogfx.kernels.triton.tile import precision_of


@triton.jit
def outer_product(
    p_g,
    p_x,
    p_range,
    p_bits,
    r,
    tile,
    o_out,
    m_out,
    m_in,
    n_rows,
    n_outputs,
    stride_gn,
    stride_xn,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    CONVERT: tl.constexpr,
    INP_RES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """g_t^T q_t for a block of weights, float32.

    Args:
        p_g, p_x: pointers to the block's outputs (1, BLOCK_OUT) and inputs (1, BLOCK_IN).
    """
    o_k = tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        o_row = first + o_k.to(tl.int64)
        m_row = o_k < (BLOCK_ROWS if WHOLE else n_rows - first)
        m = m_row[:, None] & m_out[None, :]
        g = tl.load(p_g + o_row[:, None] * stride_gn, mask=m, other=0.0)
        if MASKED:
            g = masked(g, p_bits, tile, o_row[:, None], o_out[None, :], m, n_rows, n_outputs)
        m = m_row[:, None] & m_in[None, :]
        x = tl.load(p_x + o_row[:, None] * stride_xn, mask=m, other=0.0)
        if CONVERT:
            x = x.to(tl.float32)
            if RANGE == "dynamic":  # a step for every row: a factor inside of this product
                own = tile_range(p_range, tile, o_row, n_rows, RANGE, TILES)
                x = dac(x, own, RANGE, INP_RES, True)
            else:
                x = dac(x, r, RANGE, INP_RES, False)
            x = rounded_to(x, p_g.dtype.element_ty)
        acc = dot(tl.trans(g), x, acc, PRECISION)
    return acc


@triton.jit
def linear_backward_weight(
    p_g,
    p_x,
    p_range,
    p_bits,
    p_marked,
    p_w,
    p_clip,
    p_dw,
    p_partial,
    n_rows,
    n_outputs,
    n_inputs,
    size,
    larger,
    stride_gn,
    stride_go,
    stride_xn,
    stride_xi,
    stride_wo,
    stride_wi,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    CONVERT: tl.constexpr,
    INP_RES: tl.constexpr,
    STATES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one tile's weights: its gradient, and what it adds to that of the clips.

    With bits, MASKED computes the blocks in which something was clipped, and without it the others.
    """
    per_tile = tl.cdiv(size if EVEN else size + 1, BLOCK_IN)
    row, column = swizzled(tl.program_id(0), tl.cdiv(n_outputs, BLOCK_OUT), per_tile * TILES, GROUP)
    tile = column // per_tile
    start, length = tile_span(tile, size, larger, EVEN)
    if p_bits is not None:
        across: tl.constexpr = BLOCK_OUT // PATCH_OUTPUTS
        patches = tl.cdiv(n_outputs, PATCH_OUTPUTS)
        p_marks = p_marked + tile.to(tl.int64) * patches
        if any_marked(p_marks, row * across, patches, across) != MASKED:
            return  # the other launch computes it
    o_out = row.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_column = (column % per_tile) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o_input = (start + o_column).to(tl.int64)
    m_out, m_in = o_out < n_outputs, o_column < length
    p_g += o_out[None, :] * stride_go
    p_x += o_input[None, :] * stride_xi
    r = 1.0
    if RANGE == "fixed":
        r = tl.load(p_range + tile)

    acc = outer_product(
        p_g, p_x, p_range, p_bits, r, tile, o_out, m_out, m_in, n_rows, n_outputs, stride_gn,
        stride_xn, MASKED, WHOLE, TILES, RANGE, CONVERT, INP_RES, PRECISION, BLOCK_ROWS,
        BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip

    if RANGE == "fixed" and INP_RES > 0:
        acc *= step_of(r, INP_RES)
    m = m_out[:, None] & m_in[None, :]
    if p_clip is not None:
        at = o_out[:, None] * stride_wo + o_input[None, :] * stride_wi
        w = tl.load(p_w + at, mask=m, other=0.0).to(tl.float32)
        o_scale = tile * n_outputs + o_out
        scale = tl.abs(tl.load(p_clip + o_scale, mask=m_out, other=1.0).to(tl.float32))
        half: tl.constexpr = STATES / 2 if STATES > 0 else 1.0
        if STATES > 0:
            scale = 2.0 * tl.math.div_rn(scale, STATES + tl.zeros_like(scale))
        scale = tl.maximum(tl.where(scale == 0, 1.0, scale), LEAST)
        ratio = tl.math.div_rn(w, scale[:, None] + tl.zeros_like(w))
        inside = tl.abs(ratio) <= half
        slope = tl.where(inside, 0.0, clamp(ratio, half))
        if STATES > 0:
            slope += tl.where(inside, round_even(ratio) - ratio, 0.0)
        share = tl.sum(tl.where(m, acc * slope, 0.0), axis=1)
        tl.store(p_partial + column.to(tl.int64) * n_outputs + o_out, share, mask=m_out)
        acc *= inside.to(tl.float32)
    if p_dw is not None:
        at = o_out[:, None] * n_inputs + o_input[None, :]
        tl.store(p_dw + at, rounded_to(acc, p_dw.dtype.element_ty), mask=m)


def weight_launches(
    g: Tensor,
    x: Operand,
    w: Tensor,
    *,
    ranges: Tensor | None,
    bits: Tensor | None,
    marked: Tensor | None,
    clip: Tensor | None,
    dw: Tensor | None,
    partial: Tensor | None,
    block: Blocks,
) -> tuple[Launch, ...]:
    """Gradients of w (O, I) and of the learned clips from g (N, O) and x (N, I).

    One launch without bits; with bits one for the blocks in which nothing was clipped, and one for
    the others.

    Args:
        x: codes, or values where the ranges are dynamic, if it is behind the DAC already.
        bits: uint8 (k, N, ceil(O / 8)): what a bound clipped, None where there is no bound.
        marked: uint8 (k, patches): patches of outputs that hold something clipped, None without.
        w, clip: the parameters themselves; ``clip`` (k, O) or None.
        dw: contiguous (O, I), or None where it is not wanted.
        partial: float32 (k, blocks of a tile, O) with a clip, else None.
    """
    rows, outputs = g.shape
    spec = x.spec
    per_tile = blocks_of(max(spec.in_sizes), block.inputs)
    return tuple(
        Launch(
            linear_backward_weight,
            (blocks_of(outputs, block.outputs) * per_tile * len(spec.in_sizes),),
            {
                "p_g": g,
                "p_x": x.x,
                "p_range": ranges,
                "p_bits": bits,
                "p_marked": marked,
                "p_w": w if clip is not None else None,
                "p_clip": clip,
                "p_dw": dw,
                "p_partial": partial,
                "n_rows": rows,
                "n_outputs": outputs,
                "n_inputs": w.shape[1],
                **geometry(spec),
                "stride_gn": g.stride(0),
                "stride_go": g.stride(1),
                "stride_xn": x.x.stride(0),
                "stride_xi": x.x.stride(1),
                "stride_wo": w.stride(0),
                "stride_wi": w.stride(1),
            },
            {
                "MASKED": masked,
                "EVEN": is_even(spec),
                "WHOLE": rows % block.rows == 0,
                "TILES": len(spec.in_sizes),
                "RANGE": range_mode(ranges, spec),
                "CONVERT": x.convert and ranges is not None,
                "INP_RES": float(spec.inp_res) if ranges is not None else 0.0,
                "STATES": float(spec.weight_states) if clip is not None else 0.0,
                "PRECISION": precision_of(g.dtype),
                "BLOCK_ROWS": block.rows,
                "BLOCK_OUT": block.outputs,
                "BLOCK_IN": block.inputs,
                "GROUP": blocks.GROUP,
            },
            block.options,
        )
        for masked in ((False,) if bits is None else (False, True))
    )
