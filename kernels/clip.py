"""Clipping of weights between steps to a bound of their own spread, in place.

    W[o] <- clamp(W[o], +-sigma std(W[o]))      or with the std of all of W

``clip_weights`` of AIHWKIT-Lightning's layers: whole rows, all tiles together, mean removed,
unbiased. To be called where no gradients are recorded: what is clipped are parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import reference as ref
from analogfx.kernels.by_block import parts, row_blocks


def clip_rows(matrix: Tensor, sigma: float) -> None:
    """Clamp every row of a matrix (O, I)."""
    for part in parts(matrix):
        _clamp(part, sigma * ref.row_std(ref.wide(part)))


def clip_matrix(matrix: Tensor, sigma: float) -> None:
    """Clamp a matrix (O, I) by the spread of all its elements."""
    bound = sigma * ref.wide(matrix).std()
    for part in parts(matrix):
        _clamp(part, bound)


def moments(matrix: Tensor, by_row: bool) -> Tensor:
    """Number, sum and sum of squares of a matrix, or of its rows: of parts they add up.

    Returns:
        float64 (1, 3), or (O, 3) by row.
    """
    out = torch.zeros(len(matrix), 3, dtype=torch.float64, device=matrix.device)
    out[:, 0] = matrix.shape[1]
    for b in row_blocks(matrix):
        rows = matrix[b].double()
        out[b, 1:] = torch.stack((rows.sum(1), rows.square().sum(1)), dim=1)
    return out if by_row else out.sum(0, keepdim=True)


def clip_part(part: Tensor, sigma: float, moments: Tensor) -> None:
    """Clamp a part of a matrix by the spread of the whole, or of its rows, by their moments.

    Args:
        moments: (1, 3) or (O, 3): what :func:`moments` gives, added up over all parts.
    """
    n, total, squares = moments.split(1, dim=1)
    spread = ((squares - total * total / n).clamp_min(0) / (n - 1)).sqrt().expand(len(part), 1)
    for b in row_blocks(part):
        _clamp(part[b], sigma * spread[b])


def _clamp(rows: Tensor, bound: Tensor) -> None:
    # A single weight has no spread (NaN): nothing says that it is too large.
    bound = bound.nan_to_num(nan=float("inf"), posinf=float("inf"))
    ref.clamp_to(rows, bound.to(rows.dtype), out=rows)
