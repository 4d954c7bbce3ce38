"""Weights that are codes already: what :func:`analogfx.quantize_weights` leaves, read back.

Such a model's config quantizes no more, and its weights are floats. Each is still a whole number of
steps, which are told by the largest weight of its row, or of its tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analogfx.kernels import reference as ref

_LARGEST = 127
"""Largest code that is looked for: eight bits."""

_FEW = 64
"""Weights that refute most grids."""

_ROUNDING = 4
"""Units in the last place that a weight may be beside its grid: the step was rounded, too."""


class Grid(NamedTuple):
    """Steps of weights."""

    states: float
    """Number of steps over the full range."""
    per_channel: bool
    """Whether each row has its own step; else each tile."""


@torch.no_grad()
def grid_of(tiles: Sequence[Tensor], out_sizes: Sequence[int], clip: Tensor | None) -> Grid | None:
    """The coarsest grid on which all weights of a site lie, or None.

    Args:
        tiles: (O, I_t) weights of each row of tiles, in float32 or float64.
        out_sizes: rows of each column of tiles.
        clip: (k, O) learned clips, which the steps span instead of the largest weights; or None.
    """
    if any(tile.numel() == 0 or tile.dtype not in (torch.float32, torch.float64) for tile in tiles):
        return None
    if not all(tile.isfinite().all() for tile in tiles) or not any(tile.any() for tile in tiles):
        return None
    rows = [ref.row_max(tile) for tile in tiles] if clip is None else list(ref.wide(clip).abs())
    tops = {True: rows}
    if clip is None:
        tops[False] = [ref.tile_max(row, list(out_sizes)) for row in rows]
    few = [tile[:, :_FEW] for tile in tiles]
    for code in range(1, _LARGEST + 1):
        for per_channel, scales in tops.items():
            if _fits(few, scales, code) and _fits(tiles, scales, code):
                return Grid(2.0 * code, per_channel)
    return None


def _fits(tiles: Sequence[Tensor], tops: Sequence[Tensor], code: int) -> bool:
    """Whether all weights are whole numbers of steps, of which the largest weight has ``code``."""
    pairs = zip(tiles, tops, strict=True)
    return all(_on_grid(tile, top.unsqueeze(-1), code) for tile, top in pairs)


def _on_grid(tile: Tensor, top: Tensor, code: int) -> bool:
    step = top / code
    held = (tile / step).nan_to_num().round() * step
    slack = _ROUNDING * torch.finfo(tile.dtype).eps / 2
    near = (held - tile).abs() <= slack * tile.abs()
    return bool((near & (tile.abs() <= top * (1 + slack))).all())
