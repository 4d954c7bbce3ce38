"""The two products of the backward, with everything that acts on their results.

With g_t the gradient of the output, 0 where tile t's ADC clipped, and q_t, s_t as in the forward:

    dx[t]  = (g_t W~[t]) [|x[t]| <= r_t]
    dr_t   = r_t sum_{|x| >= r_t} min(sign(x) (g_t W~[t]), 0)     static: data term; with a count
    dr_t   = sum_{|x| > r_t} sign(x) (g_t W~[t])                  fast
    dW[t]  = (g_t^T q_t) s_t [inside the learned clip]
    dc_t   = sum_i (g_t^T q_t) s_t slope(W / c)                   LSQ, before its factor

Straight through every rounding and noise. A block lies within one tile; what it adds to a range's
or a clip's gradient it stores beside the others', to be summed in one order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    clamp,
    dac,
    dot,
    halves,
    masked,
    round_even,
    rounded_to,
    step_of,
    swizzled,
    tile_span,
)
from analogfx.kernels.triton.forward import precision_of
from analogfx.kernels.triton.launch import Launch, blocks_of
from analogfx.kernels.triton.weights import geometry, is_even


@triton.jit
def through_clamp(
    grad,
    p_x,
    p_range,
    p_dx,
    tile,
    start,
    length,
    o_row,
    first,
    n_rows,
    n_inputs,
    stride_xn,
    stride_xi,
    RANGE: tl.constexpr,
    PARTIAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store what a tile's clamp lets through of a block's gradient; its part of the range's."""
    o_column = first + tl.arange(0, COLUMNS)
    o_input = (start + o_column).to(tl.int64)
    m = (o_row < n_rows)[:, None] & (o_column < length)[None, :]
    data, count = 0.0, 0.0
    if RANGE == "static" or RANGE == "fast":
        at = o_row[:, None] * stride_xn + o_input[None, :] * stride_xi
        x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
        r = tl.load(p_range + tile)
        if PARTIAL:
            signed = tl.where(x > 0, grad, tl.where(x < 0, -grad, 0.0))
            if RANGE == "static":
                beyond = (tl.abs(x) >= r) & m
                signed = tl.minimum(signed, 0.0, propagate_nan=tl.PropagateNan.ALL)
            else:
                beyond = (tl.abs(x) > r) & m
            data = tl.sum(tl.sum(tl.where(beyond, signed, 0.0), axis=1), axis=0)
            count = tl.sum(tl.sum(beyond.to(tl.float32), axis=1), axis=0)
        grad *= (tl.abs(x) <= r).to(tl.float32)
    if p_dx is not None:
        at = o_row[:, None] * n_inputs + o_input[None, :]
        tl.store(p_dx + at, rounded_to(grad, p_dx.dtype.element_ty), mask=m)
    return data, count


@triton.jit
def linear_backward_input(
    p_g,
    p_w,
    p_x,
    p_range,
    p_clipped,
    p_dx,
    p_partial,
    n_rows,
    n_outputs,
    n_inputs,
    size,
    larger,
    stride_gn,
    stride_go,
    stride_wo,
    stride_wi,
    stride_xn,
    stride_xi,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one tile's inputs: its gradient, and what it adds to that of the range."""
    per_tile = tl.cdiv(size if EVEN else size + 1, BLOCK_IN)
    n_down = tl.cdiv(n_rows, BLOCK_ROWS)
    row, column = swizzled(tl.program_id(0), n_down, per_tile * TILES, GROUP)
    tile = column // per_tile
    start, length = tile_span(tile, size, larger, EVEN)
    o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_column = (column % per_tile) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o_input = (start + o_column).to(tl.int64)
    o_k = tl.arange(0, BLOCK_OUT)
    # Beyond the edge the last row is read again, and not stored: no mask is held. Not so for the
    # inputs, which lie side by side in memory: the compiler must see that they do.
    in_row = tl.minimum(o_row, n_rows - 1)
    m_in = o_column < length
    p_g += in_row[:, None] * stride_gn
    p_w += o_input[None, :] * stride_wi

    acc = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
    for first in range(0, n_outputs, BLOCK_OUT):
        o_out = first + o_k.to(tl.int64)
        m_out = o_k < (BLOCK_OUT if WHOLE else n_outputs - first)
        g = tl.load(p_g + o_out[None, :] * stride_go, mask=m_out[None, :], other=0.0)
        if p_clipped is not None:
            g = masked(
                g, p_clipped, tile, in_row[:, None], o_out[None, :], m_out[None, :], n_rows,
                n_outputs,
            )  # fmt: skip
        m = m_out[:, None] & m_in[None, :]
        w = tl.load(p_w + o_out[:, None] * stride_wo, mask=m, other=0.0)
        acc = dot(g, w, acc, PRECISION)

    # Half a block at a time: beside the accumulator, addresses of all of x do not fit.
    HALF: tl.constexpr = BLOCK_IN // 2
    left, right = halves(acc, BLOCK_ROWS, BLOCK_IN)
    first = (column % per_tile) * BLOCK_IN
    data, count = through_clamp(
        left, p_x, p_range, p_dx, tile, start, length, o_row, first, n_rows, n_inputs, stride_xn,
        stride_xi, RANGE, p_partial is not None, HALF,
    )  # fmt: skip
    more_data, more_count = through_clamp(
        right, p_x, p_range, p_dx, tile, start, length, o_row, first + HALF, n_rows, n_inputs,
        stride_xn, stride_xi, RANGE, p_partial is not None, HALF,
    )  # fmt: skip
    if p_partial is not None:
        blocks = n_down * per_tile
        at = tile * blocks + row * per_tile + column % per_tile
        tl.store(p_partial + at, data + more_data)
        tl.store(p_partial + TILES * blocks + at, count + more_count)


def input_launch(
    g: Tensor,
    w: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    clipped: Tensor | None,
    dx: Tensor | None,
    partial: Tensor | None,
    spec: MVMSpec,
    tile: Blocks,
) -> Launch:
    """Gradients of x (N, I) and of the ranges from g (N, O) and the modified weights (O, I).

    Args:
        clipped: uint8 (k, N, ceil(O / 8)), None where nothing clips.
        dx: contiguous (N, I), or None where it is not wanted.
        partial: float32 of :func:`partial_shape`, or None: sums and counts for every block.
    """
    rows, outputs = g.shape
    per_tile = blocks_of(max(spec.in_sizes), tile.inputs)
    has_range = ranges is not None and spec.range_mode in ("static", "fast")
    return Launch(
        linear_backward_input,
        (blocks_of(rows, tile.rows) * per_tile * len(spec.in_sizes),),
        {
            "p_g": g,
            "p_w": w,
            "p_x": x if has_range else None,
            "p_range": ranges if has_range else None,
            "p_clipped": clipped,
            "p_dx": dx,
            "p_partial": partial,
            "n_rows": rows,
            "n_outputs": outputs,
            "n_inputs": w.shape[1],
            **geometry(spec),
            "stride_gn": g.stride(0),
            "stride_go": g.stride(1),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "WHOLE": outputs % tile.outputs == 0,
            "TILES": len(spec.in_sizes),
            "RANGE": spec.range_mode if has_range else "none",
            "PRECISION": precision_of(w.dtype),
            "BLOCK_ROWS": tile.rows,
            "BLOCK_OUT": tile.outputs,
            "BLOCK_IN": tile.inputs,
            "GROUP": 8,
        },
        tile.num_warps,
        tile.num_stages,
    )


def partial_shape(rows: int, spec: MVMSpec, tile: Blocks) -> tuple[int, int, int]:
    """(sum and count, k, blocks of a tile) of the partial gradients of the ranges."""
    per_tile = blocks_of(max(spec.in_sizes), tile.inputs)
    return 2, len(spec.in_sizes), blocks_of(rows, tile.rows) * per_tile


@triton.jit
def linear_backward_weight(
    p_g,
    p_x,
    p_range,
    p_clipped,
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
    """One block of one tile's weights: its gradient, and what it adds to that of the clips."""
    per_tile = tl.cdiv(size if EVEN else size + 1, BLOCK_IN)
    row, column = swizzled(tl.program_id(0), tl.cdiv(n_outputs, BLOCK_OUT), per_tile * TILES, GROUP)
    tile = column // per_tile
    start, length = tile_span(tile, size, larger, EVEN)
    o_out = row.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_column = (column % per_tile) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o_input = (start + o_column).to(tl.int64)
    o_k = tl.arange(0, BLOCK_ROWS)
    m_out, m_in = o_out < n_outputs, o_column < length
    p_g += o_out[None, :] * stride_go
    p_x += o_input[None, :] * stride_xi
    r = 1.0
    if RANGE == "fixed":
        r = tl.load(p_range + tile)

    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        o_row = first + o_k.to(tl.int64)
        m_row = o_k < (BLOCK_ROWS if WHOLE else n_rows - first)
        m = m_row[:, None] & m_out[None, :]
        g = tl.load(p_g + o_row[:, None] * stride_gn, mask=m, other=0.0)
        if p_clipped is not None:
            g = masked(g, p_clipped, tile, o_row[:, None], o_out[None, :], m, n_rows, n_outputs)
        m = m_row[:, None] & m_in[None, :]
        x = tl.load(p_x + o_row[:, None] * stride_xn, mask=m, other=0.0)
        if CONVERT:
            x = x.to(tl.float32)
            if RANGE == "dynamic":  # a step for every row: a factor inside of this product
                own = tl.load(p_range + o_row * TILES + tile, mask=m_row, other=0.0)[:, None]
                x = dac(x, own, RANGE, INP_RES, True)
            else:
                x = dac(x, r, RANGE, INP_RES, False)
            x = rounded_to(x, p_g.dtype.element_ty)
        acc = dot(tl.trans(g), x, acc, PRECISION)

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
        scale = tl.maximum(tl.where(scale == 0, 1.0, scale), 1.1754943508222875e-38)
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


def weight_launch(
    g: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    clipped: Tensor | None,
    w: Tensor,
    clip: Tensor | None,
    dw: Tensor | None,
    partial: Tensor | None,
    convert: bool,
    spec: MVMSpec,
    tile: Blocks,
) -> Launch:
    """Gradients of w (O, I) and of the learned clips from g (N, O) and x (N, I).

    Args:
        x: raw, or with ``convert`` False behind the DAC already: codes, or values where the
            ranges are dynamic.
        w, clip: the parameters themselves; ``clip`` (k, O) or None.
        dw: contiguous (O, I), or None where it is not wanted.
        partial: float32 (k, blocks of a tile, O) with a clip, else None.
    """
    rows, outputs = g.shape
    per_tile = blocks_of(max(spec.in_sizes), tile.inputs)
    mode = "none" if ranges is None else "dynamic" if spec.range_mode == "dynamic" else "fixed"
    return Launch(
        linear_backward_weight,
        (blocks_of(outputs, tile.outputs) * per_tile * len(spec.in_sizes),),
        {
            "p_g": g,
            "p_x": x,
            "p_range": ranges,
            "p_clipped": clipped,
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
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "WHOLE": rows % tile.rows == 0,
            "TILES": len(spec.in_sizes),
            "RANGE": mode,
            "CONVERT": convert and ranges is not None,
            "INP_RES": float(spec.inp_res) if ranges is not None else 0.0,
            "STATES": float(spec.weight_states) if clip is not None else 0.0,
            "PRECISION": precision_of(g.dtype),
            "BLOCK_ROWS": tile.rows,
            "BLOCK_OUT": tile.outputs,
            "BLOCK_IN": tile.inputs,
            "GROUP": 8,
        },
        tile.num_warps,
        tile.num_stages,
    )
