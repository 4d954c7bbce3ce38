"""The fused product of one site: every tile of it in one launch.

    y = sum_t clamp(z_t, +-B_t) + bias               z_t: see ``tile``; float32, one store

Where the backward wants it, the patches of outputs are marked in which a bound clipped something.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    PATCH_OUTPUTS,
    PATCH_ROWS,
    clamp,
    halves,
    rounded_to,
    swizzled,
    tile_range,
    tile_span,
)
from analogfx.kernels.triton.inputs import Operand
from analogfx.kernels.triton.launch import Launch, blocks_of
from analogfx.kernels.triton.tile import (
    Periphery,
    arguments,
    behind_adc,
    constants,
    tile_product,
)


@triton.jit
def clamped(
    y,
    bound,
    tile,
    row,
    first_output,
    n_rows,
    n_outputs,
    p_marks,
    OUT_BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y`` within its ADC's bound; marks the patches in which that changes something.

    Args:
        row: number of the block of rows.
    """
    if OUT_BOUND > 0:
        if p_marks is not None:
            m_out = first_output + tl.arange(0, COLUMNS) < n_outputs
            beyond = ((tl.abs(y) > bound) & m_out[None, :]).to(tl.int32)
            down: tl.constexpr = ROWS // PATCH_ROWS
            across: tl.constexpr = COLUMNS // PATCH_OUTPUTS
            patches = tl.reshape(beyond, (down, PATCH_ROWS, across, PATCH_OUTPUTS))
            marks = tl.max(tl.max(patches, axis=3), axis=1)
            n_down, n_across = tl.cdiv(n_rows, PATCH_ROWS), tl.cdiv(n_outputs, PATCH_OUTPUTS)
            o_down = row.to(tl.int64) * down + tl.arange(0, down)
            o_across = first_output // PATCH_OUTPUTS + tl.arange(0, across)
            at = (tile.to(tl.int64) * n_down + o_down)[:, None] * n_across + o_across[None, :]
            m = (o_down < n_down)[:, None] & (o_across < n_across)[None, :]
            tl.store(p_marks + at, marks.to(tl.uint8), mask=m)
        y = clamp(y, bound)
    return y


@triton.jit
def store_block(
    total,
    p_y,
    p_bias,
    p_row_nan,
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
    if p_row_nan is not None:
        total += tl.load(p_row_nan + o_row, mask=o_row < n_rows, other=0.0)[:, None]
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
    p_row_nan,
    p_code_scale,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_y,
    p_marks,
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
    SUM: tl.constexpr,
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
        r = tile_range(p_range, tile, o_row, n_rows, RANGE, TILES)
        y = tile_product(
            p_x, p_w, r, start, length, stride_xi, stride_wi, WHOLE, RANGE, CONVERT, INP_RES,
            SUM, PRECISION, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        # Half a block at a time: the scales of all its columns and two accumulators would not
        # fit the registers together.
        y_left, y_right = halves(y, BLOCK_ROWS, BLOCK_OUT)
        y_left, bound = behind_adc(
            y_left, r, tile, o_row, first_output, n_outputs, p_weight_step, p_code_scale,
            p_noise_scale, p_bound_scale, p_seed, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
        left += clamped(
            y_left, bound, tile, row, first_output, n_rows, n_outputs, p_marks, OUT_BOUND,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
        y_right, bound = behind_adc(
            y_right, r, tile, o_row, first_output + HALF, n_outputs, p_weight_step, p_code_scale,
            p_noise_scale, p_bound_scale, p_seed, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
        right += clamped(
            y_right, bound, tile, row, first_output + HALF, n_rows, n_outputs, p_marks, OUT_BOUND,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
    store_block(left, p_y, p_bias, p_row_nan, o_row, first_output, n_rows, n_outputs, HALF)
    store_block(right, p_y, p_bias, p_row_nan, o_row, first_output + HALF, n_rows, n_outputs, HALF)


def forward_launch(
    x: Operand,
    w: Tensor,
    around: Periphery,
    *,
    y: Tensor,
    block: Blocks,
    bias: Tensor | None = None,
    row_nan: Tensor | None = None,
    marks: Tensor | None = None,
) -> Launch:
    """The product of x (N, I) and w (O, I).

    Args:
        y: contiguous (N, O).
        row_nan: (N,) float32, what an int8 ``x`` cannot hold: NaN for a row that had one, else 0.
        marks: uint8, of ``plan.marks_shape``, or None.
    """
    return Launch(
        linear_forward,
        (blocks_of(x.x.shape[0], block.rows) * blocks_of(w.shape[0], block.outputs),),
        {
            **arguments(x, w, around),
            "p_bias": None if bias is None else bias.contiguous(),
            "p_row_nan": row_nan,
            "p_y": y,
            "p_marks": marks,
        },
        constants(x, w, around.ranges, block),
        block.options,
    )
