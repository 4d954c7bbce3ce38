"""The running statistics that set input ranges from data."""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import patches
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.weights import grouped, tiles


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread.

    A forward inside it is the recomputation of an activation checkpoint: the step has been
    counted, and the range must stay what the first forward used.
    """
    return torch._C._current_graph_task_id() != -1


def _std(x: Tensor) -> Tensor:
    if x.numel() < 2:
        return torch.full((), float("nan"), device=x.device)
    return ref.wide(x).std()


def _per_tile(
    x: Tensor, fast: bool, groups: int, in_sizes: list[int], window: Window | None
) -> list[tuple[Tensor, ...]]:
    """(std,) or (min, max) of what each tile sees."""
    if window is not None:
        return [patches.extremes(x, window) if fast else (patches.std(x, window),)]
    x = grouped(x, groups, -1)
    parts = [x[..., s] for _, s in tiles(in_sizes)]
    if fast:
        return [tuple(ref.wide(extreme) for extreme in part.aminmax()) for part in parts]
    return [(_std(part),) for part in parts]


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

    Args:
        x: input of the site: (..., groups * I), or (B, C, *image) with a window.
        input_range, x_min, x_max: (k,) float32; count: (k,) int64.
        range_mode: "static" (running mean of alpha * std) or "fast" (running extremes).
        window: geometry of a convolution whose patches are not made, else None.

    Returns:
        Fresh tensors: input_range, count, x_min, x_max.
    """
    closed = x.device.type == "cpu" and bool((count >= init_from_data).all())
    if closed or in_backward() or x.numel() == 0:  # reading a count on the CPU is no sync
        return input_range.clone(), count.clone(), x_min.clone(), x_max.clone()
    fast = range_mode == "fast"
    values = _per_tile(x, fast, groups, in_sizes, window)
    columns = [torch.stack(column).to(input_range.dtype) for column in zip(*values, strict=True)]
    if fast:
        low, high = columns
        return ref.range_fast(low, high, input_range, count, x_min, x_max, init_from_data, momentum)
    (std,) = columns
    new_range, new_count = ref.range_static(std, input_range, count, init_from_data, init_std_alpha)
    return new_range, new_count, x_min.clone(), x_max.clone()
