"""What training forwards saw of their inputs since the last step, for the step to make ranges of.

A forward that shares its ranges with other processes may not write them: the write would be this
process's alone, or land in a temporary. It notes what it saw instead, and uses the range that
follows from it:

    static: r = (r_0 n_0 + m alpha s) / (n_0 + m)      fast: r = max(|low|, |high|), running

with r_0 and n_0 the range and the count at the last step, m the forwards since, and s the standard
deviation of everything that they saw, taken as one batch. For m = 1 that is the rule of
:mod:`analogfx.kernels.statistics`. Notes of several processes are added up and give the range of
all their data.

Notes are float64 (k, 8), one row for each tile; the columns are listed below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from analogfx.kernels import patches
from analogfx.kernels import reference as ref
from analogfx.kernels.part import group_named
from analogfx.kernels.patches import Window
from analogfx.kernels.statistics import in_backward
from analogfx.kernels.weights import grouped, tiles

FORWARDS, NUMBER, MEAN, SQUARES, LOW, HIGH, BEYOND, INPUTS = range(8)
"""Forwards that fed the tile; number, mean and sum of squared distances to it of their inputs; the
inputs' extremes; of all forwards, those after the initialisation too: inputs that were saturated,
and inputs."""
COLUMNS = 8


class Rule(NamedTuple):
    """How ranges follow the data."""

    range_mode: str
    """"static" or "fast"."""
    init_from_data: int
    init_std_alpha: float
    momentum: float


@dataclass(frozen=True)
class Ranges:
    """Ranges and the statistics that set them, (k,) each: the state at the last step."""

    input_range: Tensor
    count: Tensor
    x_min: Tensor
    x_max: Tensor


def nothing(k: int, device: torch.device) -> Tensor:
    """Notes of k tiles before any forward."""
    notes = torch.zeros(k, COLUMNS, dtype=torch.float64, device=device)
    forget_(notes)
    return notes


def forget_(notes: Tensor) -> None:
    """Make notes those before any forward, in place."""
    notes.zero_()
    notes[:, LOW] = float("inf")
    notes[:, HIGH] = -float("inf")


def collect(
    x: Tensor,
    state: Ranges,
    rule: Rule,
    groups: int,
    in_sizes: list[int],
    window: Window | None,
    notes: Tensor,
    initializes: Tensor,
    processes: str,
    shares: bool,
) -> tuple[Tensor, Tensor]:
    """The ranges that a training forward uses, and the notes after it; nothing is written.

    In the recomputation of an activation checkpoint nothing is noted, and the ranges are those of
    the first time.

    Args:
        x: input of the site: (..., groups * I), or (B, C, *image) with a window.
        initializes: bool () in host memory: False says without a look at the device that every
            tile has been fed often enough.
        processes: names of process groups, with commas between them, whose members share what
            they see at once, in every forward of the initialisation; empty for none.
        shares: whether to count saturated inputs.

    Returns:
        Fresh tensors: ranges (k,) of the dtype of ``state.x_min``, notes (k, 8).
    """
    dtype = state.x_min.dtype
    state = replace(state, input_range=state.input_range.to(dtype))
    if in_backward() or (x.numel() == 0 and not processes):
        return updated(state, rule, notes).input_range.clone(), notes.clone()
    if initializes:
        open_ = state.count + notes[:, FORWARDS] < rule.init_from_data
        news = _noted(x, rule, groups, in_sizes, window)
        more = added(notes, gathered(news, rule, processes.split(",")) if processes else news)
        after = updated(state, rule, more).input_range
        fed = open_ & _feeds(more, rule) & after.isfinite()
        notes = torch.where(fed.unsqueeze(1), more, notes)
    else:
        notes = notes.clone()
    ranges = updated(state, rule, notes).input_range
    if shares and x.numel():
        for t, part in enumerate(_parts(x, groups, in_sizes, window)):
            beyond = ref.saturated(part, ranges[t].abs())
            if window is None:
                count, inputs = beyond.sum(), part.numel()
            else:  # padding is never saturated
                weight = patches.multiplicity(x, window)
                count = (beyond.sum((0, 1)) * weight).sum()
                inputs = patches.elements(x, window)
            notes[t, BEYOND] += count
            notes[t, INPUTS] += inputs
    return ranges.clone(), notes


def updated(state: Ranges, rule: Rule, notes: Tensor) -> Ranges:
    """The state at the last step brought up to date by notes; what was not fed is as it was."""
    forwards = notes[:, FORWARDS]
    fed = forwards > 0
    count = state.count + forwards.to(state.count.dtype)
    dtype = state.x_min.dtype
    if rule.range_mode == "fast":
        low, high = (notes[:, c].to(dtype) for c in (LOW, HIGH))
        old = (state.input_range.to(dtype), state.count, state.x_min, state.x_max)
        every = torch.iinfo(torch.int64).max  # what was noted was open when it was
        new_range, _, x_min, x_max = ref.range_fast(low, high, *old, every, rule.momentum)
        return Ranges(new_range, count, x_min, x_max)
    std = (notes[:, SQUARES] / (notes[:, NUMBER] - 1).clamp_min(1)).sqrt()
    total = state.input_range * state.count + forwards * rule.init_std_alpha * std
    mean = (total / (state.count + forwards).clamp_min(1)).to(dtype).abs()
    return replace(
        state, input_range=torch.where(fed, mean, state.input_range.to(dtype)), count=count
    )


def added(first: Tensor, second: Tensor) -> Tensor:
    """Notes of what two saw, one after the other (Chan's update of mean and squares)."""
    out = first + second
    n, m = first[:, NUMBER], second[:, NUMBER]
    share = m / (n + m).clamp_min(1)
    apart = second[:, MEAN] - first[:, MEAN]
    out[:, MEAN] = torch.where(m > 0, first[:, MEAN] + apart * share, first[:, MEAN])
    between = torch.where(m > 0, apart.square() * n * share, 0)
    out[:, SQUARES] = first[:, SQUARES] + second[:, SQUARES] + between
    out[:, LOW] = torch.minimum(first[:, LOW], second[:, LOW])
    out[:, HIGH] = torch.maximum(first[:, HIGH], second[:, HIGH])
    return out


def summands(notes: Tensor) -> Tensor:
    """Notes as numbers of which the sum over processes is taken, (k, 7); not their extremes."""
    n, mean = notes[:, NUMBER], notes[:, MEAN]
    fed = (notes[:, FORWARDS] > 0).to(notes.dtype)
    squares = notes[:, SQUARES] + n * mean.square()
    columns = (fed, notes[:, FORWARDS], n, n * mean, squares, notes[:, BEYOND], notes[:, INPUTS])
    return torch.stack(columns, dim=1)


def of_all(sums: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Notes of all processes together, each forward of one with a forward of every other.

    Args:
        sums: what :func:`summands` gave, summed over processes.
        low, high: (k,) extremes over processes.
    """
    fed, forwards, n, total, squares, beyond, inputs = sums.unbind(1)
    forwards = (forwards / fed.clamp_min(1)).ceil()  # a process may have been fed less often
    mean = total / n.clamp_min(1)
    squares = (squares - n * mean.square()).clamp_min(0)
    return torch.stack((forwards, n, mean, squares, low, high, beyond, inputs), dim=1)


def with_inputs_of(notes: Tensor, sums: Tensor) -> Tensor:
    """Notes with the numbers of inputs that were summed over processes, see :func:`summands`."""
    return torch.cat((notes[:, :BEYOND], sums[:, -2:]), dim=1)


def gathered(notes: Tensor, rule: Rule, processes: list[str]) -> Tensor:
    """Notes of all members of process groups, which all call this."""
    groups = [group_named(name) for name in processes]
    sums, extremes = summands(notes), torch.stack((-notes[:, LOW], notes[:, HIGH]))
    for group in groups:
        dist.all_reduce(sums, group=group)
    if rule.range_mode == "fast":
        for group in groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return of_all(sums, -extremes[0], extremes[1])


def _parts(x: Tensor, groups: int, in_sizes: list[int], window: Window | None) -> list[Tensor]:
    """What each tile sees: a slice of the inputs, or the image of a convolution."""
    if window is not None:
        return [x]
    x = grouped(x, groups, -1)
    return [x[..., s] for _, s in tiles(in_sizes)]


def _noted(
    x: Tensor, rule: Rule, groups: int, in_sizes: list[int], window: Window | None
) -> Tensor:
    """Notes of one forward's inputs."""
    if x.numel() == 0:
        return nothing(len(in_sizes), x.device)
    rows = []
    for part in _parts(x, groups, in_sizes, window):
        row = torch.zeros(COLUMNS, dtype=torch.float64, device=x.device)
        row[FORWARDS] = 1
        if rule.range_mode == "fast":
            extremes = part.aminmax() if window is None else patches.extremes(x, window)
            row[LOW], row[HIGH] = extremes
        elif window is None:
            n = part.numel()
            std, mean = torch.std_mean(ref.wide(part)) if n > 1 else (row.new_zeros(()),) * 2
            row[NUMBER], row[MEAN], row[SQUARES] = n, mean, std.double().square() * (n - 1)
        else:
            n = patches.elements(x, window)
            std = patches.std(x, window).double()
            row[NUMBER], row[MEAN], row[SQUARES] = (
                n,
                patches.mean(x, window),
                std.square() * (n - 1),
            )
        rows.append(row)
    return torch.stack(rows)


def _feeds(notes: Tensor, rule: Rule) -> Tensor:
    """Whether notes set a range: they are finite, and spread where the spread counts."""
    if rule.range_mode == "fast":
        return ref.believable(notes[:, LOW]) & ref.believable(notes[:, HIGH])
    std = (notes[:, SQUARES] / (notes[:, NUMBER] - 1).clamp_min(1)).sqrt()
    return (std > 0) & ref.believable(std)
