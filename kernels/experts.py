"""A product of many matrices, of which every row of the input takes one: a layer of experts.

    y[n] = W[e(n)] x[n] + b[e(n)]

Rows come sorted by their expert, with the end of every expert's rows (``offsets``), as in
``torch.nn.functional.grouped_mm``. An expert is a site of its own on its own rows: range, DAC,
weights, noise and ADC are those of :mod:`analogfx.kernels.linear`, with the ranges of the expert
or with one that all of them share. An expert without rows is not computed and gets no gradient.
Rows behind the last offset belong to none, and give 0.

An expert's noise is that of the call's seed plus its number.

torch's loop over experts reads the offsets to the host, on a GPU with a synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import linear, noise, statistics
from analogfx.kernels import reference as ref
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.spec import ROLES, MVMSpec

# --------------------------------------------------------------------------- in plain torch


def product(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """The digital product; see :func:`forward`."""
    y = x.new_zeros(out_shape(x, weight))
    for e, rows in spans(offsets):
        y[rows] = F.linear(x[rows], weight[e], None if bias is None else bias[e])
    return y


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """How rows are sorted by their expert.

    Args:
        ids: (N,), the expert of every row; a number out of range is of none, and comes last.
        experts: E.

    Returns:
        order (N,): the rows in their new order; and the offsets (E,).
    """
    keys = torch.where(ids < 0, experts, ids)
    order = torch.sort(keys).indices  # as transformers sorts: noise of outputs goes by the order
    numbers = torch.arange(experts, device=ids.device)
    return order, (keys.unsqueeze(-1) <= numbers).sum(0)


def unsorted(y: Tensor, order: Tensor) -> Tensor:
    """Rows that :func:`route` has sorted, in their first order again."""
    return y.index_select(0, torch.argsort(order))


def broadcast(x: Tensor, experts: int) -> Tensor:
    """The left operand of ``x @ W`` for W (E, I, O), with W's batch axis: (..., E, C, I)."""
    x = x if x.dim() > 1 else x.unsqueeze(0)
    x = x if x.dim() > 2 else x.unsqueeze(0)
    return x.expand(*x.shape[:-3], experts, *x.shape[-2:])


def unbroadcast(y: Tensor, x: Tensor) -> Tensor:
    """The product of what :func:`broadcast` made of x, without the axis that a vector lacks."""
    return y if x.dim() > 1 else y.squeeze(-2)


def columns(x: Tensor) -> Tensor:
    """The right operand of ``W @ x`` with its vectors as rows; a vector is one."""
    return x.mT if x.dim() > 1 else x


def columns_back(y: Tensor, x: Tensor) -> Tensor:
    """The product of what :func:`columns` made of x, with vectors as columns again."""
    return y.mT if x.dim() > 1 else y


def as_rows(x: Tensor, axis: int) -> Tensor:
    """All vectors along x's last axis as rows, sorted by their place along the axis of experts."""
    return x.movedim(axis, 0).reshape(-1, x.shape[-1])


def even_offsets(rows: Tensor, experts: int) -> Tensor:
    """Offsets of experts that all have as many rows."""
    return torch.arange(1, experts + 1, device=rows.device) * (rows.shape[0] // experts)


def from_rows(y: Tensor, x: Tensor, axis: int) -> Tensor:
    """What :func:`as_rows` has made rows of, in x's shape but for its last axis."""
    shape = x.movedim(axis, 0).shape[:-1]
    return y.reshape(*shape, y.shape[-1]).movedim(0, axis)


def gathered_rows(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The left operand of ``x @ W[ids]`` as rows, each with its expert.

    Args:
        x: (..., R, I), which broadcasts against ``ids`` (...).

    Returns:
        (N, I), and (N,): the expert of every row.
    """
    x = x.expand(*torch.broadcast_shapes(x.shape[:-2], ids.shape), *x.shape[-2:])
    of_rows = ids.unsqueeze(-1).expand(x.shape[:-1])
    return x.reshape(-1, x.shape[-1]), of_rows.reshape(-1)


def gathered_back(y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """Rows that :func:`gathered_rows` made, in the shape of the product."""
    lead = torch.broadcast_shapes(x.shape[:-2], ids.shape)
    return y.reshape(*lead, x.shape[-2], y.shape[-1])


def spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, by number, and their rows."""
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            yield e, slice(start, end)
            start = end


def by_row(v: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """What every expert has one of, (E, ...), for every row, (N, ...); 0 for rows of no expert."""
    out = v.new_zeros(rows, *v.shape[1:])
    for e, span in spans(offsets):
        out[span] = v[e]
    return out


def sum_of_rows(v: Tensor, offsets: Tensor) -> Tensor:
    """The sum over the rows of every expert, (E, ...)."""
    out = v.new_zeros(offsets.shape[0], *v.shape[1:])
    for e, span in spans(offsets):
        out[e] = v[span].sum(0)
    return out


# ----------------------------------------------------------------------------- one analog site


def out_shape(x: Tensor, weight: Tensor, *_: object) -> tuple[int, ...]:
    """Shape of the output."""
    return x.shape[0], weight.shape[1]


laid_out = linear.laid_out


def clipped_shape(x: Tensor, weight: Tensor, *scalars: object) -> tuple[int, ...]:
    """Shape of the bits that mark clipped outputs."""
    spec = scalars[-1]
    assert isinstance(spec, MVMSpec)
    return linear.clipped_shape(x, weight[0], spec)


def _wide_dtype(like: Tensor) -> torch.dtype:
    """The precision of the computation."""
    return ref.wide(like.new_empty(0)).dtype


def _wide_zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape in the precision of the computation."""
    return like.new_zeros(like.shape, dtype=_wide_dtype(like))


def of_one(spec: MVMSpec, experts: int) -> MVMSpec:
    """The scalars of one expert."""
    return spec._replace(out_sizes=spec.out_sizes[: len(spec.out_sizes) // experts])


def range_of(input_range: Tensor | None, expert: int) -> Tensor | None:
    """An expert's ranges (k,): its own of (E, k), or the shared ones."""
    own = input_range is not None and input_range.dim() == 2
    return input_range[expert] if own else input_range  # type: ignore[index]


def clips_of(clip: Tensor | None, experts: int) -> list[Tensor | None]:
    """The clips of each expert, (k, O)."""
    return [None] * experts if clip is None else [*clip.chunk(experts, dim=1)]


def of_experts(
    site: Operands, offsets: Tensor, spec: MVMSpec
) -> Iterator[tuple[int, slice, Operands, MVMSpec]]:
    """The experts that have rows: number, rows, and the operands and scalars of each."""
    count = site.weight.shape[0]
    one, clips = of_one(spec, count), clips_of(site.clip, count)
    for e, rows in spans(offsets):
        own = Operands(
            site.x[rows],
            site.weight[e],
            None if site.bias is None else site.bias[e],
            range_of(site.input_range, e),
            clips[e],
            None if site.seed is None else site.seed + e,
        )
        yield e, rows, own, one


def forward(site: Operands, offsets: Tensor, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the bits of clipped outputs, and the noisy weights; see ``linear.forward``.

    Args:
        site: rows of x come sorted by expert.
        offsets: (E,), where the rows of each expert end.
    """
    x, weight = site.x, site.weight
    y = x.new_zeros(out_shape(x, weight))
    clipped = torch.zeros(clipped_shape(x, weight, spec), dtype=torch.uint8, device=x.device)
    keeps = linear.keeps_weight(weight, spec)
    # Large, and not read where an expert has no rows.
    kept = weight.new_empty(weight.shape if keeps else 0, dtype=_wide_dtype(weight))
    for e, rows, own, one in of_experts(site, offsets, spec):
        y[rows], marks, held = linear.forward(own, one)
        if linear.is_kept(clipped):
            clipped[:, rows] = marks
        if linear.is_kept(kept):
            kept[e] = held
    return y, clipped, kept


def room_for(site: Operands, needs: list[bool], busy: list[int]) -> Gradients:
    """Room for the gradients that are wanted, with 0 for what no row goes through.

    Args:
        busy: the experts that have rows.
    """
    x, weight, _, input_range, clip, _ = site
    like = (x, weight, weight[..., 0], input_range, clip)
    out = Gradients(
        *(
            t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
            for t, need in zip(like, needs, strict=True)
        )
    )
    idle = sorted({*range(weight.shape[0])}.difference(busy))
    for of_all in (out.weight, out.bias):
        for e in idle if of_all.numel() else ():
            of_all[e].zero_()
    for of_all in (out.input_range, out.clip):
        of_all.zero_()
    return out


def backward(
    grad: Tensor,
    site: Operands,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    offsets: Tensor,
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; see ``linear.backward``."""
    x, count = site.x, site.weight.shape[0]
    of_x, of_weight, of_bias, of_range, of_clip = needs
    found = [*of_experts(site, offsets, spec)]
    out = room_for(site, needs, [e for e, *_ in found])
    out_clips = clips_of(out.clip, count) if of_clip else []
    grad_x = _wide_zeros(x) if of_x or of_range else None
    for e, rows, own, one in found:
        part = linear.backward_to_dac(
            grad[rows],
            own,
            clipped[:, rows] if linear.is_kept(clipped) else clipped,
            modified[e] if linear.is_kept(modified) else modified,
            needs,
            one,
        )
        if grad_x is not None:
            grad_x[rows] = part.x
        if of_weight:
            out.weight[e] = part.weight
        if of_bias:
            out.bias[e] = part.bias
        if of_clip:
            out_clips[e].copy_(part.clip)  # type: ignore[union-attr]
    if grad_x is None:
        return out
    apart = site.input_range is not None and site.input_range.dim() == 2
    end, one = found[-1][1].stop if found else 0, of_one(spec, count)
    for e, rows in [(e, rows) for e, rows, *_ in found] if apart else [(0, slice(0, end))]:
        grads = linear.through_dac(grad_x[rows], x[rows], range_of(site.input_range, e), one)
        if of_range:
            (out.input_range[e] if apart else out.input_range).copy_(grads)
    return out._replace(x=grad_x.to(x.dtype)) if of_x else out


# ---------------------------------------------------------------------------------- statistics


def update_range(
    x: Tensor,
    offsets: Tensor,
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    range_mode: str,
    in_sizes: list[int],
    init_from_data: int,
    init_std_alpha: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges, counts and extremes after one more training forward; see ``statistics``.

    Args:
        x: (N, I), sorted by expert.
        input_range, count, x_min, x_max: (k,) for one range of all rows; (E, k) for ranges that
            follow the rows of their expert, and stay where it has none.
    """
    state = (input_range, count, x_min, x_max)
    settings: tuple[Any, ...] = (range_mode, 1, in_sizes, None)
    settings += init_from_data, init_std_alpha, momentum
    if input_range.dim() == 1:
        end = max((rows.stop for _, rows in spans(offsets)), default=0)
        return statistics.update_range(x[:end], *state, *settings)
    new_range, new_count, new_min, new_max = (t.clone() for t in state)
    closed = x.device.type == "cpu" and bool((count >= init_from_data).all())
    for e, rows in () if closed else spans(offsets):
        of_one: list[Any] = [t[e] for t in state]
        new_range[e], new_count[e], new_min[e], new_max[e] = statistics.update_range(
            x[rows], *of_one, *settings
        )
    return new_range, new_count, new_min, new_max


# ------------------------------------------------------------------------------------- by role


def dac(x: Tensor, input_range: Tensor, offsets: Tensor, *settings: Any) -> Tensor:
    """Every row behind the DAC of its expert, whose range is one of (E,); see ``reference.dac``."""
    out = _wide_zeros(x)
    for e, rows in spans(offsets):
        ref.dac(x[rows], input_range[e], *settings, out=out[rows])
    return out


def dac_backward(
    grad: Tensor, x: Tensor, input_range: Tensor, offsets: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`dac`: to the inputs and to the ranges.

    Args:
        settings: the scalars of the role, its derivative's included.
    """
    rest = [settings[name] for name in ROLES["dac"].backward]
    grad_x, grad_range = x.new_zeros(x.shape), torch.zeros_like(input_range)
    for e, rows in spans(offsets):
        g, part, r = grad[rows], x[rows], input_range[e]
        grad_x[rows] = (g * ref.inside(part, r)).to(x.dtype)
        if settings["range_mode"] == "fast":
            grad_range[e] = ref.range_grad_fast(g, part, r)
        else:
            grad_range[e] = ref.range_grad_static(g, part, r, *rest)
    return grad_x, grad_range


def mvm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """The bare product, (N, O), in the precision of the computation."""
    out = ref.wide(x.new_zeros(out_shape(x, w)))
    for e, rows in spans(offsets):
        out[rows] = linear.product(ref.wide(x[rows]), ref.wide(w[e]))
    return out


def mvm_backward(grad: Tensor, x: Tensor, w: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mvm`: to the inputs and to the weights."""
    grad_x, grad_w = x.new_zeros(x.shape), w.new_zeros(w.shape)
    for e, rows in spans(offsets):
        g = ref.wide(grad[rows])
        grad_x[rows] = linear.product(g, ref.wide(w[e]).mT).to(x.dtype)
        grad_w[e] = linear.outer(g, ref.wide(x[rows])).to(w.dtype)
    return grad_x, grad_w


def weight_normal(w: Tensor, seed: Tensor, stream: int) -> Tensor:
    """Standard normal values for the weights (E, O, I) of all experts."""
    dtype = _wide_dtype(w)
    return torch.stack([noise.normal(seed + e, stream, m.shape, dtype) for e, m in enumerate(w)])


def output_normal(y: Tensor, seed: Tensor, stream: int, offsets: Tensor) -> Tensor:
    """Standard normal values for outputs (N, O)."""
    out = _wide_zeros(y)
    for e, rows in spans(offsets):
        out[rows] = noise.normal(seed + e, stream, out[rows].shape, out.dtype)
    return out


def shared_factor(experts: int) -> float:
    """What scales the gradient of all experts' clips at once: each is that of one matrix."""
    return math.sqrt(experts)
