"""Which outputs a bound clipped: one tile's product again, in the patches that were marked.

A bit for every output of every tile, eight outputs to the byte. The forward keeps a mark for each
patch instead, so a training step in which nothing is clipped keeps no bits and computes none: it
only makes room for them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    PATCH_OUTPUTS,
    PATCH_ROWS,
    halves,
    pack,
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
def store_bits(
    y,
    bound,
    p_bits,
    tile,
    o_row,
    first_output,
    n_rows,
    n_outputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The bits of one tile's outputs (ROWS, COLUMNS)."""
    m_out = first_output + tl.arange(0, COLUMNS) < n_outputs
    beyond = (tl.abs(y) > bound) & m_out[None, :]
    columns = (n_outputs + 7) // 8
    o_byte = first_output // 8 + tl.arange(0, COLUMNS // 8)
    at = (tile.to(tl.int64) * n_rows + o_row)[:, None] * columns + o_byte[None, :]
    m = (o_row < n_rows)[:, None] & (o_byte < columns)[None, :]
    tl.store(p_bits + at, pack(beyond, ROWS, COLUMNS), mask=m)


@triton.jit
def linear_clipped(
    p_x,
    p_w,
    p_range,
    p_weight_step,
    p_code_scale,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_marks,
    p_bits,
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
    """One block of one tile's outputs, if a patch in it is marked."""
    row, column = swizzled(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_outputs, BLOCK_OUT), GROUP
    )
    tile = tl.program_id(1)
    first_output = column.to(tl.int64) * BLOCK_OUT
    n_down, n_across = tl.cdiv(n_rows, PATCH_ROWS), tl.cdiv(n_outputs, PATCH_OUTPUTS)
    down: tl.constexpr = BLOCK_ROWS // PATCH_ROWS
    across: tl.constexpr = BLOCK_OUT // PATCH_OUTPUTS
    o_down = row.to(tl.int64) * down + tl.arange(0, down)
    o_across = first_output // PATCH_OUTPUTS + tl.arange(0, across)
    at = (tile.to(tl.int64) * n_down + o_down)[:, None] * n_across + o_across[None, :]
    m = (o_down < n_down)[:, None] & (o_across < n_across)[None, :]
    marks = tl.load(p_marks + at, mask=m, other=0).to(tl.int32)
    if tl.max(tl.max(marks, axis=1), axis=0) != 0:
        o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        o_out = first_output + tl.arange(0, BLOCK_OUT)
        p_rows = p_x + tl.minimum(o_row, n_rows - 1)[:, None] * stride_xn
        p_outputs = p_w + tl.minimum(o_out, n_outputs - 1)[None, :] * stride_wo
        start, length = tile_span(tile, size, larger, EVEN)
        r = tile_range(p_range, tile, o_row, n_rows, RANGE, TILES)
        y = tile_product(
            p_rows, p_outputs, r, start, length, stride_xi, stride_wi, WHOLE, RANGE, CONVERT,
            INP_RES, SUM, PRECISION, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        HALF: tl.constexpr = BLOCK_OUT // 2
        y_left, y_right = halves(y, BLOCK_ROWS, BLOCK_OUT)
        z, bound = behind_adc(
            y_left, r, tile, o_row, first_output, n_outputs, p_weight_step, p_code_scale,
            p_noise_scale, p_bound_scale, p_seed, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
        store_bits(z, bound, p_bits, tile, o_row, first_output, n_rows, n_outputs, BLOCK_ROWS, HALF)
        z, bound = behind_adc(
            y_right, r, tile, o_row, first_output + HALF, n_outputs, p_weight_step, p_code_scale,
            p_noise_scale, p_bound_scale, p_seed, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS,
            BLOCK_ROWS, HALF,
        )  # fmt: skip
        store_bits(
            z, bound, p_bits, tile, o_row, first_output + HALF, n_rows, n_outputs, BLOCK_ROWS, HALF
        )


def clipped_launch(
    x: Operand, w: Tensor, around: Periphery, *, marks: Tensor, bits: Tensor, block: Blocks
) -> Launch:
    """The bits of the product of x (N, I) and w (O, I).

    Args:
        marks: uint8, of ``plan.marks_shape``: what the forward left.
        bits: uint8 (k, N, ceil(O / 8)), 0 where nothing is marked.
    """
    programs = blocks_of(x.x.shape[0], block.rows) * blocks_of(w.shape[0], block.outputs)
    return Launch(
        linear_clipped,
        (programs, len(x.spec.in_sizes)),
        {**arguments(x, w, around), "p_marks": marks, "p_bits": bits},
        constants(x, w, around.ranges, block),
        block.options,
    )
