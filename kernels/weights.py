"""Weights as tiles hold them: clipped, quantised and noisy, and what scales their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import integers, noise
from analogfx.kernels import reference as ref
from analogfx.kernels.by_block import row_blocks
from analogfx.kernels.part import Part, largest_of_tiles
from analogfx.kernels.spec import MVMSpec, scalars


def grouped(t: Tensor, groups: int, axis: int) -> Tensor:
    """An axis of a tensor split into (groups, rest); unchanged for one group."""
    return t if groups == 1 else t.unflatten(axis, (groups, t.shape[axis] // groups))


def tiles(in_sizes: list[int]) -> list[tuple[int, slice]]:
    """Every tile's number and its slice of the inputs."""
    slices, start = [], 0
    for number, size in enumerate(in_sizes):
        slices.append((number, slice(start, start + size)))
        start += size
    return slices


def is_modified(spec: MVMSpec, clip: Tensor | None) -> bool:
    """Whether tiles hold anything but the weights themselves."""
    return bool(spec.weight_states or spec.noise_std or clip is not None)


def maxima(w: Tensor, clip: Tensor | None, spec: MVMSpec) -> Tensor | None:
    """What scales noise and bounds of every tile's rows: their largest weight or learned clip.

    Args:
        w: (O, I), or (groups, O / groups, I).
        clip: (k, O) or None.

    Returns:
        (k, O) or (k, groups, O / groups); None where nothing needs it. Where other processes hold
        rows of the same tiles, the maxima of these tiles stand behind those of the rows.
    """
    peaks = _row_maxima(w, clip, spec)
    if peaks is None or not spec.peers:
        return peaks
    of_tiles = largest_of_tiles(peaks, spec.out_sizes, Part(*spec.part), spec.peers)
    return torch.cat((peaks, of_tiles), dim=-1)


def _row_maxima(w: Tensor, clip: Tensor | None, spec: MVMSpec) -> Tensor | None:
    if clip is not None:
        return grouped(ref.wide(clip).abs(), spec.groups, 1)
    if not spec.needs_max:
        return None
    count = len(spec.in_sizes)
    if len(set(spec.in_sizes)) == 1:  # one op for all tiles
        return ref.row_max(w.unflatten(-1, (count, -1))).movedim(-1, 0).contiguous()
    return torch.stack([ref.row_max(w[..., s]) for _, s in tiles(spec.in_sizes)])


def scale(peak: Tensor | None, per_channel: bool, spec: MVMSpec) -> Tensor:
    """Each row's own maximum in one tile, or that of the tile along the outputs that holds it."""
    assert peak is not None
    if spec.peers:
        rows, of_tiles = peak.split([sum(spec.out_sizes), len(spec.out_sizes)], dim=-1)
        if per_channel:
            return rows
        counts = torch.tensor(spec.out_sizes, device=peak.device)
        return of_tiles.repeat_interleave(counts, dim=-1, output_size=sum(spec.out_sizes))
    return peak if per_channel else ref.tile_max(peak, spec.out_sizes)


def summed_at_once(codes: Tensor, spec: MVMSpec) -> int:
    """How many products to sum at a time: 0, all, where these weights keep every sum in bounds.

    Args:
        codes: of the weights, (..., I).
    """
    depth = integers.depth(spec)
    if max(spec.in_sizes) <= depth or codes.device.type != "cpu":  # elsewhere it would be a sync
        return depth
    rows = torch.linalg.vector_norm(codes, 1, dim=-1)
    return 0 if bool(rows.max() <= integers.widest_row(spec)) else depth


def code_scale(peak: Tensor, spec: MVMSpec) -> Tensor:
    """``rho`` of one tile, see ``kernels.integers``: (), or of the shape of ``peak``."""
    ratio = integers.ratio(spec)
    if integers.same_maxima(spec):
        return peak.new_full((), ratio)
    a = scale(peak, spec.bound_per_channel, spec)
    return ref.code_scale(scale(peak, spec.weight_per_channel, spec), a, ratio)


def modified_weight(
    w: Tensor,
    clip: Tensor | None,
    seed: Tensor | None,
    peaks: Tensor | None,
    spec: MVMSpec,
    codes: bool = False,
) -> Tensor:
    """The weights as the tiles hold them.

    Args:
        w: (O, I), or (groups, O / groups, I).
        peaks: what :func:`maxima` gave.
        codes: give the integers of the quantisation, not what they stand for.

    Returns:
        A tensor of w's shape in the precision of the computation; ``w`` itself where nothing
        changes it.
    """
    if not is_modified(spec, clip):
        return ref.wide(w)
    assert peaks is not None

    def by_row(per_channel: bool) -> Tensor:
        return torch.stack([scale(peak, per_channel, spec) for peak in peaks], dim=-1)

    sigma = None
    if spec.noise_std:
        sigma = ref.weight_sigma(by_row(spec.noise_per_channel), *scalars("weight_noise", spec))
    bound = by_row(spec.weight_per_channel) if spec.weight_states else None
    clips = by_row(True) if clip is not None else None
    dtype = ref.wide(w.new_empty(0)).dtype
    if sigma is None:
        out = torch.empty_like(w, dtype=dtype)
    else:
        assert seed is not None
        out = weight_draw(seed, w, dtype, spec)
    for b in row_blocks(w):
        part = w[b]
        if bound is not None:
            spread = _spread(bound[b], spec.in_sizes)
            quantized = ref.weight_codes if codes else ref.quantize_weight
            part = quantized(part, spread, *scalars("quantize", spec))
        elif clips is not None:
            spread = _spread(clips[b], spec.in_sizes)
            part = ref.clip_weight(part, spread, *scalars("clip", spec))
        if sigma is None:
            out[b] = part
        else:
            out[b].mul_(_spread(sigma[b], spec.in_sizes)).add_(part)
    return out


def weight_draw(seed: Tensor, w: Tensor, dtype: torch.dtype, spec: MVMSpec) -> Tensor:
    """Standard normal values for the noise of weights, of their shape."""
    if not spec.part:
        return noise.normal(seed, 0, w.shape, dtype)
    part = Part(*spec.part)
    rows = slice(part.row, part.row + w.shape[0])
    columns = slice(part.column, part.column + w.shape[1])
    return noise.block(seed, 0, (part.rows, part.columns), rows, columns, dtype)


def _spread(v: Tensor, in_sizes: list[int]) -> Tensor:
    """A value for every tile, (..., k), as one for every input, or (..., 1) for one tile."""
    if len(in_sizes) == 1:
        return v
    widest = max(in_sizes)  # sizes differ by one at most, and the larger ones come first
    spread = v.unsqueeze(-1).expand(*v.shape, widest).flatten(-2)
    if widest * len(in_sizes) == sum(in_sizes):
        return spread
    larger = in_sizes.count(widest)
    tail = v[..., larger:].unsqueeze(-1).expand(*v.shape[:-1], -1, widest - 1).flatten(-2)
    return torch.cat([spread[..., : larger * widest], tail], dim=-1)
