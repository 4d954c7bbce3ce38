"""The fused product of a layer of experts, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.experts`. Every expert
that has rows is a product of its own, on its rows of the layer's input and output, which are not
copied. Their launches follow one another on the current stream; the offsets are read to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import plan
from analogfx.kernels.experts import clips_of, of_experts, of_one, out_shape, room_for
from analogfx.kernels.linear import is_kept
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import linear


def forward(site: Operands, offsets: Tensor, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the marks of clipped outputs, and nothing.

    Args:
        site: of float32, float16 or bfloat16; rows of x come sorted by expert.
        offsets: (E,), where the rows of each expert end.
    """
    y = site.x.new_zeros(out_shape(site.x, site.weight))
    shape = plan.expert_marks_shape(site.x, site.weight, spec)
    marks = torch.empty(shape, dtype=torch.uint8, device=site.x.device)
    for e, rows, own, one in of_experts(site, offsets, spec):
        linear.forward_into(y[rows], _marks_of(marks, e, rows, own, one), own, one)
    return y, marks, site.weight.new_empty(0)


def _marks_of(marks: Tensor, expert: int, rows: slice, own: Operands, spec: MVMSpec) -> Tensor:
    """An expert's part of the marks, of ``plan.marks_shape``; as they are where none are kept."""
    if not is_kept(marks):
        return marks
    tiles, down, across = plan.marks_shape(own.x, own.weight, spec._replace(keep=True))
    first = -(-rows.start // plan.PATCH[0]) + expert
    return marks[first : first + down].view(tiles, down, across)


def backward(
    grad: Tensor,
    site: Operands,
    marks: Tensor,
    modified: Tensor,
    needs: list[bool],
    offsets: Tensor,
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; the arguments are those of ``experts.backward``."""
    count, input_range = site.weight.shape[0], site.input_range
    of_x, of_weight, of_bias, _, of_clip = needs
    found = [*of_experts(site, offsets, spec)]
    out = room_for(site, needs, [e for e, *_ in found])
    end = found[-1][1].stop if found else 0
    if of_x:
        out.x[end:].zero_()
    out_clips = clips_of(out.clip, count) if of_clip else []
    apart = input_range is not None and input_range.dim() == 2
    total = None
    for e, rows, own, one in found:
        if own.clip is not None:  # columns of all experts' clips
            own = own._replace(clip=own.clip.contiguous())
        sums, for_clip = linear.gradients_into(
            out.x[rows] if of_x else None,
            out.weight[e] if of_weight else None,
            *(grad[rows], own, _marks_of(marks, e, rows, own, one), needs, one),
        )
        if of_bias:
            out.bias[e] = linear.bias_gradient(grad[rows], own.weight)
        if for_clip is not None:
            out_clips[e].copy_(for_clip)  # type: ignore[union-attr]
        if sums is None or own.input_range is None:
            continue
        if apart:
            grads = linear.range_gradient(sums, len(own.x), own.input_range, one)
            out.input_range[e] = grads
        else:
            total = sums if total is None else total + sums
    if total is not None:
        assert input_range is not None
        one = of_one(spec, count)
        out.input_range.copy_(linear.range_gradient(total, end, input_range, one))
    return out
