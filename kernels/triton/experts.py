"""The fused product of a layer of experts, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.experts`. Every expert
that has rows is a product of its own, on its rows of the layer's input and output, which are not
copied. Their launches follow one another on the current stream; the offsets are read to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import plan
from analogfx.kernels.experts import (
    clips_of,
    of_one,
    out_shape,
    range_of,
    room_for,
    seed_of,
    spans,
)
from analogfx.kernels.linear import Gradients, is_kept
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import linear


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor,
    spec: MVMSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the marks of clipped outputs, and nothing.

    Args:
        x: (N, I), sorted by expert, any strides.
        weight: (E, O, I), of x's dtype: float32, float16 or bfloat16.
        bias: (E, O) or None.
        input_range: (k,) or, of every expert, (E, k); None unless the range is static or fast.
        clip: (k, E * O) or None.
        seed: int64 (), None unless something is noisy.
        offsets: (E,), where the rows of each expert end.
    """
    count = weight.shape[0]
    one, clips = of_one(spec, count), clips_of(clip, count)
    y = x.new_zeros(out_shape(x, weight))
    shape = plan.expert_marks_shape(x, weight, spec)
    marks = torch.empty(shape, dtype=torch.uint8, device=x.device)
    for e, rows in spans(offsets):
        linear.forward_into(
            y[rows],
            _marks_of(marks, e, x[rows], weight, rows, one),
            x[rows],
            weight[e],
            None if bias is None else bias[e],
            range_of(input_range, e),
            clips[e],
            seed_of(seed, e),
            one,
        )
    return y, marks, weight.new_empty(0)


def _marks_of(
    marks: Tensor, expert: int, x: Tensor, weight: Tensor, rows: slice, spec: MVMSpec
) -> Tensor:
    """An expert's part of the marks, of ``plan.marks_shape``; as they are where none are kept."""
    if not is_kept(marks):
        return marks
    tiles, down, across = plan.marks_shape(x, weight[expert], spec._replace(keep=True))
    first = -(-rows.start // plan.PATCH[0]) + expert
    return marks[first : first + down].view(tiles, down, across)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    marks: Tensor,
    modified: Tensor,
    needs: list[bool],
    offsets: Tensor,
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; the arguments are those of ``experts.backward``."""
    count = weight.shape[0]
    one, clips = of_one(spec, count), clips_of(clip, count)
    of_x, of_weight, of_bias, _, of_clip = needs
    found = [*spans(offsets)]
    out = room_for(x, weight, input_range, clip, needs, [e for e, _ in found])
    end = found[-1][1].stop if found else 0
    if of_x:
        out.x[end:].zero_()
    out_clips = clips_of(out.clip, count) if of_clip else []
    own = input_range is not None and input_range.dim() == 2
    total = None
    for e, rows in found:
        ranges = range_of(input_range, e)
        sums, for_clip = linear.gradients_into(
            out.x[rows] if of_x else None,
            out.weight[e] if of_weight else None,
            grad[rows],
            x[rows],
            weight[e],
            ranges,
            None if clips[e] is None else clips[e].contiguous(),  # type: ignore[union-attr]
            seed_of(seed, e),
            _marks_of(marks, e, x[rows], weight, rows, one),
            needs,
            one,
        )
        if of_bias:
            out.bias[e] = linear.bias_gradient(grad[rows], weight)
        if for_clip is not None:
            out_clips[e].copy_(for_clip)  # type: ignore[union-attr]
        if sums is None or ranges is None:
            continue
        if own:
            out.input_range[e] = linear.range_gradient(sums, rows.stop - rows.start, ranges, one)
        else:
            total = sums if total is None else total + sums
    if total is not None:
        assert input_range is not None
        out.input_range.copy_(linear.range_gradient(total, end, input_range, one))
    return out
