"""The running statistics that set input ranges from data: one pass over x, nothing on the host.

    static: r <- (r n + alpha std(x[t])) / (n + 1)      fast: r <- max(|low|, |high|), running

Two launches. The first reduces strips of rows of every tile to (count, mean, M2, min, max) with
Chan's update, which loses nothing to a mean far from 0; the second merges the strips in their
order and updates the ranges. Both end at once where a tile has been fed often enough: its count is
on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.statistics import in_backward
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.device import merge, tile_span
from analogfx.kernels.triton.launch import Launch, blocks_of, geometry, is_even

STRIPS = 256
"""Most strips of one tile: two for every multiprocessor of a large GPU, few enough to merge."""

UNTOUCHED = tl.constexpr(1.1e-5)
"""Bound below which running extremes have not been fed yet, as in the reference."""

ABSURD = tl.constexpr(2.0**64)
"""Bound from which on inputs set no range, as in the reference."""


@triton.jit
def strip_moments(
    p_x,
    p_count,
    p_partial,
    n_rows,
    strip,
    size,
    larger,
    limit,
    stride_xn,
    stride_xi,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Count, mean, M2, least and largest of ``strip`` rows of one tile."""
    tile = tl.program_id(1)
    if tl.load(p_count + tile) < limit:
        start, length = tile_span(tile, size, larger, EVEN)
        first_row = tl.program_id(0).to(tl.int64) * strip
        end_row = tl.minimum(first_row + strip, n_rows)
        count, mean, m2 = 0.0, 0.0, 0.0
        low = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("inf"), tl.float32)
        high = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
        for row in range(0, strip, BLOCK_ROWS):
            o_row = first_row + row + tl.arange(0, BLOCK_ROWS)
            for first in range(0, length, BLOCK_COLUMNS):
                o_column = first + tl.arange(0, BLOCK_COLUMNS)
                m = (o_row < end_row)[:, None] & (o_column < length)[None, :]
                o_input = (start + o_column).to(tl.int64)
                at = o_row[:, None] * stride_xn + o_input[None, :] * stride_xi
                x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
                more = tl.sum(tl.sum(m.to(tl.float32), axis=1), axis=0)
                more_mean = tl.sum(tl.sum(x, axis=1), axis=0) / tl.maximum(more, 1.0)
                centred = tl.where(m, x - more_mean, 0.0)
                more_m2 = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
                count, mean, m2 = merge(count, mean, m2, more, more_mean, more_m2)
                all_nan: tl.constexpr = tl.PropagateNan.ALL
                low = tl.minimum(low, tl.where(m, x, float("inf")), propagate_nan=all_nan)
                high = tl.maximum(high, tl.where(m, x, float("-inf")), propagate_nan=all_nan)
        isnan = tl.max(tl.max((low != low).to(tl.int32), axis=1), axis=0) != 0
        least = tl.where(isnan, float("nan"), tl.min(tl.min(low, axis=1), axis=0))
        most = tl.where(isnan, float("nan"), tl.max(tl.max(high, axis=1), axis=0))
        at = (tile * tl.num_programs(0) + tl.program_id(0)) * 5
        tl.store(p_partial + at, count)
        tl.store(p_partial + at + 1, mean)
        tl.store(p_partial + at + 2, m2)
        tl.store(p_partial + at + 3, least)
        tl.store(p_partial + at + 4, most)


@triton.jit
def new_range(
    p_partial,
    p_range,
    p_count,
    p_low,
    p_high,
    p_new_range,
    p_new_count,
    p_new_low,
    p_new_high,
    n_strips,
    limit,
    FAST: tl.constexpr,
    ALPHA: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Merge one tile's strips and update its state; copy the state where it has had enough."""
    tile = tl.program_id(0)
    r, n = tl.load(p_range + tile), tl.load(p_count + tile)
    low, high = tl.load(p_low + tile), tl.load(p_high + tile)
    fed = n * 0
    if n < limit:
        count, mean, m2 = 0.0, 0.0, 0.0
        least, most = float("inf"), float("-inf")
        for strip in range(0, n_strips):
            at = (tile * n_strips + strip) * 5
            count, mean, m2 = merge(
                count, mean, m2, tl.load(p_partial + at), tl.load(p_partial + at + 1),
                tl.load(p_partial + at + 2),
            )  # fmt: skip
            all_nan: tl.constexpr = tl.PropagateNan.ALL
            least = tl.minimum(least, tl.load(p_partial + at + 3), propagate_nan=all_nan)
            most = tl.maximum(most, tl.load(p_partial + at + 4), propagate_nan=all_nan)
        if FAST:
            first = (low > -UNTOUCHED) & (high < UNTOUCHED)
            if MOMENTUM == -1:
                next_low = tl.minimum(low, least, propagate_nan=tl.PropagateNan.ALL)
                next_high = tl.maximum(high, most, propagate_nan=tl.PropagateNan.ALL)
            else:
                next_low = low * MOMENTUM + least * (1.0 - MOMENTUM)
                next_high = high * MOMENTUM + most * (1.0 - MOMENTUM)
            finite = (tl.abs(least) < ABSURD) & (tl.abs(most) < ABSURD)
            low = tl.where(finite, tl.where(first, low + least, next_low), low)
            high = tl.where(finite, tl.where(first, high + most, next_high), high)
            r = tl.where(finite, tl.maximum(tl.abs(low), tl.abs(high)), r)
            fed += finite.to(tl.int64)
        else:
            std = tl.sqrt_rn(tl.math.div_rn(m2, count - 1.0))  # NaN for a single element
            mean_range = tl.math.div_rn(r * n.to(tl.float32) + ALPHA * std, n.to(tl.float32) + 1.0)
            feeds = (std > 0) & (std < ABSURD)
            fed += feeds.to(tl.int64)
            r = tl.abs(tl.where(feeds, mean_range, r))
    tl.store(p_new_range + tile, r)
    tl.store(p_new_count + tile, n + fed)
    tl.store(p_new_low + tile, low)
    tl.store(p_new_high + tile, high)


def moments_launch(x: Tensor, count: Tensor, partial: Tensor, limit: int, spec: MVMSpec) -> Launch:
    """Moments of strips of x (N, I).

    Args:
        partial: float32 (k, strips, 5).
        limit: tiles that have been fed as often are left out.
    """
    rows, strips = x.shape[0], partial.shape[1]
    return Launch(
        strip_moments,
        (strips, len(spec.in_sizes)),
        {
            "p_x": x,
            "p_count": count,
            "p_partial": partial,
            "n_rows": rows,
            "strip": strip_rows(rows, strips),
            **geometry(spec),
            "limit": limit,
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
        },
        {"EVEN": is_even(spec), "BLOCK_ROWS": blocks.ROWS, "BLOCK_COLUMNS": blocks.COLUMNS},
    )


def strip_rows(rows: int, strips: int) -> int:
    """Rows of a strip: whole blocks."""
    return blocks_of(blocks_of(rows, strips), blocks.ROWS) * blocks.ROWS


def range_launch(
    partial: Tensor,
    state: tuple[Tensor, ...],
    new: tuple[Tensor, ...],
    fast: bool,
    limit: int,
    alpha: float,
    momentum: float,
) -> Launch:
    """Update of the state (input_range, count, x_min, x_max), all (k,), into ``new``."""
    names = ("range", "count", "low", "high")
    old = {f"p_{name}": t for name, t in zip(names, state, strict=True)}
    return Launch(
        new_range,
        (partial.shape[0],),
        {
            "p_partial": partial,
            **old,
            **{f"p_new_{name}": t for name, t in zip(names, new, strict=True)},
            "n_strips": partial.shape[1],
            "limit": limit,
        },
        {"FAST": fast, "ALPHA": float(alpha), "MOMENTUM": float(momentum)},
        {"num_warps": 1},
    )


def update_range(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    range_mode: str,
    groups: int,
    in_sizes: list[int],
    window: Window | None,
    init_from_data: int,
    init_std_alpha: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges, counts and extremes after one more training forward; nothing is written in place.

    The arguments are those of ``kernels.statistics.update_range``, without groups or a window.
    """
    state = tuple(t.contiguous() for t in (input_range, count, x_min, x_max))
    if in_backward() or x.numel() == 0:
        return state[0].clone(), state[1].clone(), state[2].clone(), state[3].clone()
    rows = x.reshape(-1, x.shape[-1])
    spec = MVMSpec(in_sizes, [0])
    strips = blocks_of(rows.shape[0], strip_rows(rows.shape[0], STRIPS))
    partial = x.new_empty((len(in_sizes), strips, 5), dtype=torch.float32)
    new = tuple(torch.empty_like(t) for t in state)
    moments_launch(rows, state[1], partial, init_from_data, spec).run()
    fast = range_mode == "fast"
    range_launch(partial, state, new, fast, init_from_data, init_std_alpha, momentum).run()
    return new[0], new[1], new[2], new[3]
