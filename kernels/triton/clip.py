"""Clipping of a weight's rows to a bound of their own spread, in place: one launch.

    W[o] <- clamp(W[o], +-sigma std(W[o]))

The spread by Chan's update, which loses nothing to a mean far from 0. The second read of a row
finds it in a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.device import clamp, merge, rounded_to
from analogfx.kernels.triton.launch import Launch, blocks_of


@triton.jit
def clip_row(
    p_w,
    n_rows,
    n_columns,
    stride_wo,
    stride_wi,
    SIGMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Clamp BLOCK_ROWS rows."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < n_rows
    count = tl.zeros((BLOCK_ROWS,), tl.float32)
    mean, m2 = count, count
    for first in range(0, n_columns, BLOCK_COLUMNS):
        o_column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        m = m_row[:, None] & (o_column < n_columns)[None, :]
        at = o_row[:, None] * stride_wo + o_column[None, :] * stride_wi
        w = tl.load(p_w + at, mask=m, other=0.0).to(tl.float32)
        more = tl.sum(m.to(tl.float32), axis=1)
        more_mean = tl.sum(w, axis=1) / tl.maximum(more, 1.0)
        centred = tl.where(m, w - more_mean[:, None], 0.0)
        count, mean, m2 = merge(count, mean, m2, more, more_mean, tl.sum(centred * centred, axis=1))
    bound = SIGMA * tl.sqrt_rn(tl.math.div_rn(m2, count - 1.0))
    bound = tl.where(bound == bound, bound, float("inf"))[:, None]  # a single weight has no spread
    for first in range(0, n_columns, BLOCK_COLUMNS):
        o_column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        m = m_row[:, None] & (o_column < n_columns)[None, :]
        at = o_row[:, None] * stride_wo + o_column[None, :] * stride_wi
        w = tl.load(p_w + at, mask=m, other=0.0).to(tl.float32)
        tl.store(p_w + at, rounded_to(clamp(w, bound), p_w.dtype.element_ty), mask=m)


def clip_launch(matrix: Tensor, sigma: float) -> Launch:
    """Clamp the rows of a matrix (O, I), any strides."""
    rows, columns = matrix.shape
    return Launch(
        clip_row,
        (blocks_of(rows, blocks.ROWS),),
        {
            "p_w": matrix,
            "n_rows": rows,
            "n_columns": columns,
            "stride_wo": matrix.stride(0),
            "stride_wi": matrix.stride(1),
        },
        {"SIGMA": float(sigma), "BLOCK_ROWS": blocks.ROWS, "BLOCK_COLUMNS": blocks.COLUMNS},
    )


def clip_rows(matrix: Tensor, sigma: float) -> None:
    """Clamp every row of a matrix (O, I); see ``kernels.clip``."""
    if matrix.shape[1]:
        clip_launch(matrix, sigma).run()
        torch.autograd.graph.increment_version(matrix)  # torch does not see what kernels write
