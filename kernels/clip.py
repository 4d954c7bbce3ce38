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


def moments(matrix: Tensor) -> Tensor:
    """Number, sum and sum of squares of a matrix, float64 (3,): of parts they add up."""
    total = torch.zeros(3, dtype=torch.float64, device=matrix.device)
    for b in row_blocks(matrix):
        rows = matrix[b].double()
        total += torch.stack((total.new_tensor(rows.numel()), rows.sum(), rows.square().sum()))
    return total


@torch.no_grad()
def clip_part(part: Tensor, sigma: float, moments: Tensor) -> None:
    """Clamp rows of a matrix by the spread of all its elements, whose :func:`moments` are given."""
    n, total, squares = moments.unbind()
    spread = ((squares - total * total / n).clamp_min(0) / (n - 1)).sqrt()
    for b in row_blocks(part):
        _clamp(part[b], sigma * spread)


def _clamp(rows: Tensor, bound: Tensor) -> None:
    # A single weight has no spread (NaN): nothing says that it is too large.
    bound = bound.nan_to_num(nan=float("inf"), posinf=float("inf"))
    ref.clamp_to(rows, bound.to(rows.dtype), out=rows)
