"""Clipping of weights between steps to a bound of their own spread, in place.

    W[o] <- clamp(W[o], +-sigma std(W[o]))      or with the std of all of W

``clip_weights`` of AIHWKIT-Lightning's layers: whole rows, all tiles together, mean removed,
unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import reference as ref
from analogfx.kernels.blocks import row_blocks


@torch.no_grad()
def clip_rows(matrix: Tensor, sigma: float) -> None:
    """Clamp every row of a matrix (O, I)."""
    for b in row_blocks(matrix):
        _clamp(matrix[b], sigma * ref.row_std(ref.wide(matrix[b])))


@torch.no_grad()
def clip_matrix(matrix: Tensor, sigma: float) -> None:
    """Clamp a matrix (O, I) by the spread of all its elements."""
    bound = sigma * ref.wide(matrix).std()
    for b in row_blocks(matrix):
        _clamp(matrix[b], bound)


def _clamp(rows: Tensor, bound: Tensor) -> None:
    # A single weight has no spread (NaN): nothing says that it is too large.
    bound = bound.nan_to_num(nan=float("inf"), posinf=float("inf"))
    ref.clamp_to(rows, bound.to(rows.dtype), out=rows)
