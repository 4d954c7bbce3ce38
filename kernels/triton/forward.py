"""The fused product of one site: every tile of it in one launch.

    q_t = DAC(x[t])                                  integers, or the clamped input without a DAC
    y_t = (q_t W~[t]^T) s_t                          s_t: the DAC's step (times the weights' codes')
    z_t = round((y_t + strength r_t a N(0, 1)) / d) d,  d = 2 B_t / n,  B_t = r_t b a
    y   = sum_t clamp(z_t, +-B_t) + bias             float32 registers, one store

Output noise of tile t is stream t + 1 over the elements of y. Where the backward wants them, the
outputs that a bound clipped are marked by a bit for each tile, eight outputs to the byte.
"""

from __future__ import annotations

import torch
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
    normal_at,
    normal_quads,
    on_grid,
    pack,
    rounded_to,
    step_of,
    swizzled,
    tile_span,
)
from analogfx.kernels.triton.launch import Launch, blocks_of, is_interpreted
from analogfx.kernels.triton.weights import geometry, is_even


@triton.jit
def draw_block(
    p_seed,
    stream,
    o_row,
    first_output,
    n_outputs,
    QUADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Standard normal values for a block of outputs."""
    seed = tl.load(p_seed)
    row = (o_row * n_outputs)[:, None] + first_output
    if QUADS:  # four outputs side by side share a counter
        counter = row // 4 + tl.arange(0, BLOCK_OUT // 4)[None, :]
        draw = tl.reshape(normal_quads(seed, counter, stream), (BLOCK_ROWS, BLOCK_OUT))
    else:
        draw = normal_at(seed, row + tl.arange(0, BLOCK_OUT)[None, :], stream)
    return draw


@triton.jit
def behind_adc(
    y,
    r,
    tile,
    o_row,
    first_output,
    n_rows,
    n_outputs,
    p_weight_step,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_clipped,
    OUT_NOISE: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    OUT_RES: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile's product (ROWS, COLUMNS) with output noise, rounded and clamped by its ADC."""
    o_out = first_output + tl.arange(0, COLUMNS)
    m_out = o_out < n_outputs
    o_scale = tile * n_outputs + o_out
    if p_weight_step is not None:
        y *= tl.load(p_weight_step + o_scale, mask=m_out, other=0.0)[None, :]
    if OUT_NOISE > 0:
        a = tl.load(p_noise_scale + o_scale, mask=m_out, other=0.0)[None, :]
        draw = draw_block(p_seed, tile + 1, o_row, first_output, n_outputs, QUADS, ROWS, COLUMNS)
        y += draw * (a * (OUT_NOISE * r))
    if OUT_BOUND > 0:
        a = tl.load(p_bound_scale + o_scale, mask=m_out, other=0.0)[None, :]
        bound = (r * OUT_BOUND) * a
        if OUT_RES > 0:
            step = step_of(bound, OUT_RES)
            step = tl.where(step == 0, 1.0, step)
            y = on_grid(y, step) * step
        if p_clipped is not None:
            beyond = (tl.abs(y) > bound) & m_out[None, :]
            columns = (n_outputs + 7) // 8
            o_byte = first_output // 8 + tl.arange(0, COLUMNS // 8)
            at = (tile.to(tl.int64) * n_rows + o_row)[:, None] * columns + o_byte[None, :]
            m = (o_row < n_rows)[:, None] & (o_byte < columns)[None, :]
            tl.store(p_clipped + at, pack(beyond, ROWS, COLUMNS), mask=m)
        y = clamp(y, bound)
    return y


@triton.jit
def store_block(
    total,
    p_y,
    p_bias,
    o_row,
    first_output,
    n_rows,
    n_outputs,
    COLUMNS: tl.constexpr,
):
    """The sum of all tiles, plus bias, to a block of outputs."""
    o_out = first_output + tl.arange(0, COLUMNS)
    m_out = o_out < n_outputs
    if p_bias is not None:
        total += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    at = o_row[:, None] * n_outputs + o_out[None, :]
    m = (o_row < n_rows)[:, None] & m_out[None, :]
    tl.store(p_y + at, rounded_to(total, p_y.dtype.element_ty), mask=m)


@triton.jit
def linear_forward(
    p_x,
    p_w,
    p_bias,
    p_range,
    p_weight_step,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_y,
    p_clipped,
    n_rows,
    n_outputs,
    size,
    larger,
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
    OUT_NOISE: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    OUT_RES: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of outputs: all tiles, one after the other."""
    row, column = swizzled(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_outputs, BLOCK_OUT), GROUP
    )
    o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_out = column.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_in = tl.arange(0, BLOCK_IN)
    # Beyond the edge the last row and output are read again, and not stored: no mask is held.
    p_x += tl.minimum(o_row, n_rows - 1)[:, None] * stride_xn
    p_w += tl.minimum(o_out, n_outputs - 1)[None, :] * stride_wo

    HALF: tl.constexpr = BLOCK_OUT // 2
    first_output = column.to(tl.int64) * BLOCK_OUT
    left = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    right = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    for number in range(TILES):
        tile = tl.full((), number, tl.int32)  # the interpreter counts in Python's integers
        start, length = tile_span(tile, size, larger, EVEN)
        r = 1.0
        if RANGE == "fixed":
            r = tl.load(p_range + tile)
        elif RANGE == "dynamic":
            r = tl.load(p_range + o_row * TILES + tile, mask=o_row < n_rows, other=0.0)[:, None]
        acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.int32 if PRECISION == "int8" else tl.float32)
        for first in range(0, length, BLOCK_IN):
            o_input = (start + first + o_in).to(tl.int64)
            m_in = o_in < (BLOCK_IN if WHOLE else length - first)
            x = tl.load(p_x + o_input[None, :] * stride_xi, mask=m_in[None, :], other=0.0)
            if CONVERT:
                x = dac(x.to(tl.float32), r, RANGE, INP_RES, False)
                x = rounded_to(x, p_w.dtype.element_ty)
            w = tl.load(p_w + o_input[:, None] * stride_wi, mask=m_in[:, None], other=0.0)
            acc = dot(x, w, acc, PRECISION)
        y = acc.to(tl.float32)
        if INP_RES > 0:
            y *= step_of(r, INP_RES)
        # Half a block at a time: the scales of all its columns and two accumulators would not
        # fit the registers together.
        y_left, y_right = halves(y, BLOCK_ROWS, BLOCK_OUT)
        left += behind_adc(
            y_left, r, tile, o_row, first_output, n_rows, n_outputs, p_weight_step, p_noise_scale,
            p_bound_scale, p_seed, p_clipped, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS, BLOCK_ROWS,
            HALF,
        )  # fmt: skip
        right += behind_adc(
            y_right, r, tile, o_row, first_output + HALF, n_rows, n_outputs, p_weight_step,
            p_noise_scale, p_bound_scale, p_seed, p_clipped, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
    if p_y is not None:
        store_block(left, p_y, p_bias, o_row, first_output, n_rows, n_outputs, HALF)
        store_block(right, p_y, p_bias, o_row, first_output + HALF, n_rows, n_outputs, HALF)


def precision_of(operand: torch.dtype) -> str:
    """How a kernel multiplies operands of a dtype: float32 as torch's own setting says."""
    if operand == torch.int8:
        return "int8"
    if is_interpreted(linear_forward):
        return "interpreted"
    if operand == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def forward_launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    ranges: Tensor | None,
    weight_step: Tensor | None,
    noise_scale: Tensor | None,
    bound_scale: Tensor | None,
    seed: Tensor | None,
    y: Tensor | None,
    clipped: Tensor | None,
    convert: bool,
    spec: MVMSpec,
    tile: Blocks,
) -> Launch:
    """The product of x (N, I) and w (O, I).

    Args:
        x: raw, or with ``convert`` False behind the DAC already.
        ranges: (k,) or (N, k) float32, or None.
        weight_step: (k, O) float32: what the codes in an int8 ``w`` stand for, else None.
        noise_scale, bound_scale: (k, O) float32, None without output noise or bound.
        y: contiguous (N, O), None where only the bits are wanted.
        clipped: uint8 (k, N, ceil(O / 8)), None where they are not.
    """
    rows, outputs = x.shape[0], w.shape[0]
    mode = "none" if ranges is None else "dynamic" if spec.range_mode == "dynamic" else "fixed"
    return Launch(
        linear_forward,
        (blocks_of(rows, tile.rows) * blocks_of(outputs, tile.outputs),),
        {
            "p_x": x,
            "p_w": w,
            "p_bias": bias,
            "p_range": ranges,
            "p_weight_step": weight_step,
            "p_noise_scale": noise_scale,
            "p_bound_scale": bound_scale,
            "p_seed": seed if spec.out_noise else None,
            "p_y": y,
            "p_clipped": clipped,
            "n_rows": rows,
            "n_outputs": outputs,
            **geometry(spec),
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "WHOLE": all(size % tile.inputs == 0 for size in spec.in_sizes),
            "TILES": len(spec.in_sizes),
            "RANGE": mode,
            "CONVERT": convert and ranges is not None,
            "INP_RES": float(spec.inp_res) if ranges is not None else 0.0,
            "OUT_NOISE": float(spec.out_noise),
            "OUT_BOUND": float(spec.out_bound),
            "OUT_RES": float(spec.out_res),
            "QUADS": outputs % 4 == 0,
            "PRECISION": precision_of(w.dtype),
            "BLOCK_ROWS": tile.rows,
            "BLOCK_OUT": tile.outputs,
            "BLOCK_IN": tile.inputs,
            "GROUP": 8,
        },
        tile.num_warps,
        tile.num_stages,
    )
