"""A part of a site's matrix, where several processes hold one each: tensor parallelism.

What a part computes is what the whole matrix would at this place. Its noise is therefore keyed by
the place in the whole (see :mod:`analogfx.kernels.noise`), and a maximum over a tile of which other
processes hold rows is theirs, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Part(NamedTuple):
    """Where a part stands in the whole matrix, (O, I)."""

    rows: int
    """Outputs of the whole."""
    columns: int
    """Inputs of the whole."""
    row: int
    """Its first output."""
    column: int
    """Its first input."""
    tile: int
    """Number of its first tile along the inputs."""
    out_tile: int
    """Number of the tile along the outputs that holds its first row."""
    out_tiles: int
    """Tiles along the outputs that the whole has."""


def group_named(name: str) -> Any:
    """The process group of a name, as ops carry it."""
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    return resolve(name)


def summed(grad: Tensor, dtype: torch.dtype, sums: str) -> Tensor:
    """The gradient of inputs that several processes multiply, each by its own rows.

    A range learns from the sum: what one process adds to it may have the other sign.

    Args:
        dtype: to send it in, that of the inputs.
        sums: name of the group of these processes; each must call this.
    """
    sent = grad.to(dtype).contiguous()
    dist.all_reduce(sent, group=group_named(sums))
    return sent.to(grad.dtype)


def largest_of_tiles(peaks: Tensor, out_sizes: list[int], part: Part, peers: str) -> Tensor:
    """The largest of what tiles along the outputs hold, rows of other processes included.

    Args:
        peaks: (k, O) largest magnitudes of the rows that are here.
        out_sizes: how many of these rows each tile has.
        peers: name of the group of all processes that hold rows; each must call this.

    Returns:
        (k, tiles along the outputs that have rows here).
    """
    here = range(part.out_tile, part.out_tile + len(out_sizes))
    largest = peaks.new_zeros(peaks.shape[0], part.out_tiles)
    for tile, rows in zip(here, peaks.split(list(out_sizes), dim=-1), strict=True):
        if rows.shape[-1]:
            largest[:, tile] = rows.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group_named(peers))
    return largest[:, here.start : here.stop]
