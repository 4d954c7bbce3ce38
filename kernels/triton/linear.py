"""The fused product of one site on its tiles, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.linear`. What differs:
modified weights are kept in x's dtype, as a digital layer would have them; noise is Philox on
every device; and clipped outputs are marked by the patch.

Nothing of the size of x or W is kept for the backward: the modified weights, the converted inputs
and, where a patch is marked, the clipped outputs are found again, from W, x and the seed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analogfx.kernels import integers, plan
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import is_kept
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks, eight_bit, inputs
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.clipped import clipped_launch
from analogfx.kernels.triton.forward import forward_launch
from analogfx.kernels.triton.input_gradient import (
    clamp_launch,
    clipped_input_launch,
    partial_shape,
)
from analogfx.kernels.triton.inputs import Operand
from analogfx.kernels.triton.launch import blocks_of, geometry
from analogfx.kernels.triton.tile import periphery
from analogfx.kernels.triton.weight_gradient import weight_launches
from analogfx.kernels.triton.weights import maxima, modified_weight, multiplied


def forward(site: Operands, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the marks of clipped outputs, and nothing.

    Args:
        site: of float32, float16 or bfloat16.
    """
    x, weight = site.x, site.weight
    # Made in its final shape: an output that is a view may not be written to by what follows.
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    marks = x.new_empty(plan.marks_shape(x, weight, spec), dtype=torch.uint8)
    forward_into(_rows(out), marks, site._replace(x=_rows(x)), spec)
    return out, marks, weight.new_empty(0)


def forward_into(y: Tensor, marks: Tensor, site: Operands, spec: MVMSpec) -> None:
    """Compute the output of :func:`forward` into y, (N, O), and the marks of what was clipped.

    Args:
        y: contiguous, as ``marks`` is, of ``plan.marks_shape``.
        site: with x (N, I).
    """
    x, weight, bias, input_range, clip, seed = site
    ranges = inputs.tile_ranges(x, input_range, spec)
    if plan.in_integers(spec):
        _integer_product(x, weight, bias, ranges, clip, y, spec)
        return
    peaks = maxima(weight, clip, spec)
    w = multiplied(weight, clip, seed, peaks, spec)
    if plan.by_vendor(x.dtype, spec):
        if ranges is not None:
            x = inputs.converted(x, ranges, x.dtype, True, spec)
        if bias is None:
            torch.mm(x, w.T, out=y)
        else:
            torch.addmm(bias, x, w.T, out=y)
        return
    block = blocks.of_forward(x, w, spec)
    forward_launch(
        _operand(x, ranges, w, block, spec),
        w,
        periphery(ranges, seed, peaks, spec),
        bias=bias,
        y=y,
        marks=marks if is_kept(marks) else None,
        block=block,
    ).run()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _operand(x: Tensor, ranges: Tensor | None, w: Tensor, block: Blocks, spec: MVMSpec) -> Operand:
    """x (N, I) for the forward product by w (O, I)."""
    return inputs.operand(x, ranges, w.dtype, blocks_of(w.shape[0], block.outputs), False, spec)


def _integer_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor | None,
    clip: Tensor | None,
    y: Tensor,
    spec: MVMSpec,
) -> None:
    """Inference in integers, into y (N, O)."""
    assert ranges is not None
    held = eight_bit.prepare(weight, clip, spec)
    codes, row_nan = inputs.codes(x, ranges, spec)
    forward_launch(
        codes,
        held.codes,
        periphery(ranges, None, held.peaks, spec, held.step),
        bias=bias,
        row_nan=row_nan,
        y=y,
        block=blocks.of_forward(codes.x, held.codes, spec),
    ).run()


def backward(
    grad: Tensor,
    site: Operands,
    marks: Tensor,
    modified: Tensor,
    needs: list[bool],
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; the arguments are those of ``linear.backward``."""
    x, weight, input_range = site.x, site.weight, site.input_range
    need_x, need_w, need_bias, need_range, _ = needs
    g, rows = _rows(grad), site._replace(x=_rows(x))
    out = Gradients(*(x.new_empty(0) for _ in needs))
    if need_x:
        out = out._replace(x=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if need_w:
        of_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
        out = out._replace(weight=of_weight)
    sums, of_clip = gradients_into(
        _rows(out.x) if need_x else None,
        out.weight if need_w else None,
        *(g, rows, marks, needs, spec),
    )
    if of_clip is not None:
        out = out._replace(clip=of_clip)
    if need_range:
        assert sums is not None and input_range is not None
        out = out._replace(input_range=range_gradient(sums, g.shape[0], input_range, spec))
    if need_bias:
        out = out._replace(bias=bias_gradient(g, weight))
    return out


def bias_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(O,), of the weight's dtype."""
    return grad.sum(0, dtype=torch.float32).to(weight.dtype)


def gradients_into(
    dx: Tensor | None,
    dw: Tensor | None,
    g: Tensor,
    site: Operands,
    marks: Tensor,
    needs: list[bool],
    spec: MVMSpec,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (N, I) and of the weight into ``dx`` and ``dw``, where they are wanted.

    Args:
        dx, dw: contiguous; None where they are not wanted.

    Returns:
        Sums for :func:`range_gradient`, (2, k), and the gradient of the clips; None for what is
        not wanted.
    """
    x, weight, _, input_range, clip, seed = site
    _, _, _, need_range, need_clip = needs
    need_x, need_w = dx is not None, dw is not None
    ranges = inputs.tile_ranges(x, input_range, spec)
    sums = of_clip = clipped = None
    if need_x or need_range or (spec.out_bound and (need_w or need_clip)):
        peaks = maxima(weight, clip, spec)
        w = modified_weight(weight, clip, seed, peaks, spec)
        if spec.out_bound:
            if not is_kept(marks):
                shape = plan.marks_shape(x, weight, spec._replace(keep=True))
                marks = torch.ones(shape, dtype=torch.uint8, device=x.device)
            codes = multiplied(weight, clip, seed, peaks, spec) if integers.depth(spec) else w
            clipped = _clipped(x, codes, ranges, peaks, seed, marks, spec)
        if need_x or need_range:
            sums = _input_gradients(g, w, x, ranges, clipped, dx, need_range, spec)
    if need_w or need_clip:
        of_clip = _weight_gradients(g, x, ranges, clipped, weight, clip, dw, spec)
    return sums, of_clip if need_clip else None


class Clipped(NamedTuple):
    """What the bounds clipped."""

    bits: Tensor
    """uint8 (k, N, ceil(O / 8))."""
    rows: Tensor
    """uint8 (k, patches): whether a patch of rows holds something clipped."""
    outputs: Tensor
    """The same for a patch of outputs."""


def _clipped(
    x: Tensor,
    w: Tensor,
    ranges: Tensor | None,
    peaks: Tensor | None,
    seed: Tensor | None,
    marks: Tensor,
    spec: MVMSpec,
) -> Clipped:
    """The outputs that were clipped, from the marks; computed where there is a mark alone."""
    block = blocks.of_forward(x, w, spec)
    shape = len(spec.in_sizes), x.shape[0], (w.shape[0] + 7) // 8
    bits = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    # By its prologue: most blocks hold no mark, and convert nothing.
    operand = inputs.operand(x, ranges, w.dtype, 0, False, spec)
    clipped_launch(
        operand,
        w,
        periphery(ranges, seed, peaks, spec),
        marks=marks,
        bits=bits,
        block=block,
    ).run()
    return Clipped(bits, marks.any(2), marks.any(1))  # of uint8, as any() leaves it


def _input_gradients(
    g: Tensor,
    w: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    clipped: Clipped | None,
    dx: Tensor | None,
    need_range: bool,
    spec: MVMSpec,
) -> Tensor | None:
    """The gradient of x (N, I) into ``dx``, and sums for those of the ranges, (2, k)."""
    product = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    torch.mm(g, w, out=product)
    clamped = ranges if spec.range_mode in ("static", "fast") else None
    block = blocks.of_input_gradient(g, spec)
    partial = None
    if need_range:
        partial = x.new_empty(partial_shape(x.shape[0], spec, block), dtype=torch.float32)
    results: Any = {"dx": dx, "partial": partial, "spec": spec, "block": block}
    marked = None if clipped is None else clipped.rows
    if clamped is not None:
        clamp_launch(product, x, ranges=clamped, marked=marked, **results).run()
    if clipped is not None:
        clipped_input_launch(
            g, w, x, ranges=clamped, bits=clipped.bits, marked=clipped.rows, **results
        ).run()
    return None if partial is None else partial.sum(-1)


def range_gradient(sums: Tensor, rows: int, ranges: Tensor, spec: MVMSpec) -> Tensor:
    """The gradient of the ranges (k,).

    Args:
        sums: (2, k): of the data term, and of saturated inputs.
        rows: how many rows they are sums of.
    """
    data, count = sums
    if spec.range_mode == "fast":
        return data
    share = count / _by_tile(spec, float(rows), ranges)
    return ref.range_grad(data, share, ranges, spec.decay, spec.input_min_percentage)


def _by_tile(spec: MVMSpec, factor: float, like: Tensor) -> Tensor:
    """(k,) float32: ``factor`` times the inputs of every tile, made on the device."""
    size, larger = geometry(spec).values()
    sizes = torch.full((len(spec.in_sizes),), float(size), device=like.device)
    sizes[:larger] += 1.0
    return sizes * factor


def _weight_gradients(
    g: Tensor,
    x: Tensor,
    ranges: Tensor | None,
    clipped: Clipped | None,
    weight: Tensor,
    clip: Tensor | None,
    dw: Tensor | None,
    spec: MVMSpec,
) -> Tensor | None:
    """The gradient of W (O, I) into ``dw``, and that of the learned clips (k, O)."""
    block = blocks.of_weight_gradient(g, clip is not None, spec)
    bits, marked = (None, None) if clipped is None else (clipped.bits, clipped.outputs)
    results: Any = {"bits": bits, "marked": marked, "clip": clip, "dw": dw, "block": block}
    if clip is None:  # the vendor's product, and again the blocks in which something was clipped
        if ranges is not None:
            x = inputs.converted(x, ranges, x.dtype, True, spec)
        torch.mm(g.T, x, out=dw)
        if clipped is not None:
            values = Operand(x, False, spec._replace(range_mode="none", inp_res=0.0))
            weight_launches(g, values, weight, ranges=None, partial=None, **results)[-1].run()
        return None
    across = blocks_of(weight.shape[0], block.outputs)
    dynamic = spec.range_mode == "dynamic"
    shape = len(spec.in_sizes), blocks_of(max(spec.in_sizes), block.inputs), weight.shape[0]
    partial = x.new_empty(shape, dtype=torch.float32)
    operand = inputs.operand(x, ranges, g.dtype, across, dynamic, spec)
    for launch in weight_launches(g, operand, weight, ranges=ranges, partial=partial, **results):
        launch.run()
    states = spec.weight_states
    count = _by_tile(spec, float(weight.shape[0]), partial).clamp_min(1.0)
    factor = 2 * torch.sqrt(states / 2 / count) / states if states else count.rsqrt()
    sign = torch.where(clip < 0, -1.0, 1.0)
    return (partial.sum(1) * factor.unsqueeze(-1) * sign).to(clip.dtype)
