"""The fused convolution of one site on one tile: patches are read from the image, and never made.

    y[b, o, p] = clamp(z, +-B) + bias          z: see ``tile``; its input is the patch at p

Rows are the positions of all images (b, p), inputs the elements of a patch, outputs those of one
group. An element of a patch stands in the image where its patch begins, and so far from there:

    x[b, c, i + j] = x[base(b, i) + offset(c, j)]    i: the patch's corner, j: a kernel offset

What falls outside of the image is 0, which the DAC leaves 0.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels import integers
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import clamp, halves, rounded_to, swizzled
from analogfx.kernels.triton.launch import Launch, blocks_of, range_mode
from analogfx.kernels.triton.tile import (
    Periphery,
    behind_adc,
    precision_of,
    product_of,
    sum_of,
    summed,
)


@triton.jit
def corner(place, stride, padding):
    """Where a patch begins along one axis of the image; before 0 in the padding."""
    return place * stride - padding


@triton.jit
def within(at, size):
    """Whether positions along one axis are those of the image, not of its padding."""
    return (at >= 0) & (at < size)


@triton.jit
def store_outputs(
    y,
    r,
    o_row,
    batch,
    pixel,
    group,
    first,
    n_rows,
    n_outputs,
    per_group,
    p_bias,
    p_code_scale,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_y,
    p_clipped,
    stride_yb,
    stride_yo,
    stride_yp,
    OUT_NOISE: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    OUT_RES: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile's product (ROWS, COLUMNS) behind the ADC, with bias, and what its bound clipped.

    Args:
        first: output of the group that the first column is of.
    """
    first_output = (group * per_group + first).to(tl.int64)
    y, bound = behind_adc(
        y, r, tl.full((), 0, tl.int32), o_row, first_output, n_outputs, None, p_code_scale,
        p_noise_scale, p_bound_scale, p_seed, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS, ROWS, COLUMNS,
    )  # fmt: skip
    m_out = first + tl.arange(0, COLUMNS) < per_group
    m = (o_row < n_rows)[:, None] & m_out[None, :]
    o_out = first_output + tl.arange(0, COLUMNS)
    place = (batch * stride_yb + pixel.to(tl.int64) * stride_yp)[:, None]
    place = place + o_out[None, :] * stride_yo
    if OUT_BOUND > 0:
        if p_clipped is not None:
            tl.store(p_clipped + place, (tl.abs(y) > bound).to(tl.uint8), mask=m)
        y = clamp(y, bound)
    if p_bias is not None:
        y += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + place, rounded_to(y, p_y.dtype.element_ty), mask=m)


@triton.jit
def conv_forward(
    p_x,
    p_w,
    p_bias,
    p_range,
    p_code_scale,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    p_y,
    p_clipped,
    n_rows,
    n_outputs,
    n_inputs,
    per_group,
    pixels,
    out_1,
    out_2,
    size_0,
    size_1,
    size_2,
    step_0,
    step_1,
    step_2,
    pad_0,
    pad_1,
    pad_2,
    taps,
    kernel_1,
    kernel_2,
    dilation_0,
    dilation_1,
    dilation_2,
    stride_xb,
    stride_xc,
    stride_xg,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_yb,
    stride_yo,
    stride_yp,
    AXES: tl.constexpr,
    RANGE: tl.constexpr,
    INP_RES: tl.constexpr,
    SUM: tl.constexpr,
    OUT_NOISE: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    OUT_RES: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one group's outputs; the axes of an image are the last AXES of three."""
    row, column = swizzled(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(per_group, BLOCK_OUT), GROUP
    )
    group = tl.program_id(1)
    o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_row = tl.minimum(o_row, n_rows - 1)  # beyond the edge the last row again, not stored
    batch = in_row // pixels
    pixel = (in_row % pixels).to(tl.int32)
    at_2 = corner(pixel % out_2, step_2, pad_2)
    at_1 = corner(pixel // out_2 % out_1, step_1, pad_1)
    at_0 = corner(pixel // out_2 // out_1, step_0, pad_0)
    base = batch * stride_xb + group.to(tl.int64) * stride_xg + at_2.to(tl.int64) * stride_x2
    if AXES > 1:
        base += at_1.to(tl.int64) * stride_x1
    if AXES > 2:
        base += at_0.to(tl.int64) * stride_x0

    first = column * BLOCK_OUT
    o_local = first + tl.arange(0, BLOCK_OUT)
    in_out = group.to(tl.int64) * per_group + tl.minimum(o_local, per_group - 1)
    p_outputs = p_w + in_out[None, :] * n_inputs

    o_k = tl.arange(0, BLOCK_IN)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    low = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for begin in range(0, n_inputs, BLOCK_IN):
        o_input = begin + o_k
        m_in = o_input < n_inputs
        tap = o_input % taps
        along = tap % kernel_2 * dilation_2
        offset = (o_input // taps) * stride_xc + along * stride_x2
        inside = m_in[None, :] & within(at_2[:, None] + along[None, :], size_2)
        if AXES > 1:
            along = tap // kernel_2 % kernel_1 * dilation_1
            offset += along * stride_x1
            inside = inside & within(at_1[:, None] + along[None, :], size_1)
        if AXES > 2:
            along = tap // kernel_2 // kernel_1 * dilation_0
            offset += along * stride_x0
            inside = inside & within(at_0[:, None] + along[None, :], size_0)
        x = tl.load(p_x + (base[:, None] + offset[None, :]), mask=inside, other=0.0)
        w = tl.load(p_outputs + o_input[:, None], mask=m_in[:, None], other=0.0)
        acc, low = summed(x, w, acc, low, SUM, PRECISION)

    r = 1.0
    if RANGE == "fixed":
        r = tl.load(p_range)
    # Half a block at a time, as in the linear product.
    HALF: tl.constexpr = BLOCK_OUT // 2
    left, right = halves(product_of(acc, low, r, INP_RES, SUM), BLOCK_ROWS, BLOCK_OUT)
    store_outputs(
        left, r, o_row, batch, pixel, group, first, n_rows, n_outputs, per_group, p_bias,
        p_code_scale, p_noise_scale, p_bound_scale, p_seed, p_y, p_clipped, stride_yb, stride_yo,
        stride_yp, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS, BLOCK_ROWS, HALF,
    )  # fmt: skip
    store_outputs(
        right, r, o_row, batch, pixel, group, first + HALF, n_rows, n_outputs, per_group, p_bias,
        p_code_scale, p_noise_scale, p_bound_scale, p_seed, p_y, p_clipped, stride_yb, stride_yo,
        stride_yp, OUT_NOISE, OUT_BOUND, OUT_RES, QUADS, BLOCK_ROWS, HALF,
    )  # fmt: skip


def conv_launch(
    x: Tensor,
    w: Tensor,
    around: Periphery,
    window: Window,
    spec: MVMSpec,
    *,
    y: Tensor,
    block: Blocks,
    bias: Tensor | None = None,
    clipped: Tensor | None = None,
) -> Launch:
    """The convolution of an image, dense and behind the DAC, by w (O, inputs of a patch).

    Args:
        x: (B, C, *image).
        w: contiguous, of x's dtype.
        spec: the site's, without the DAC where ``x`` holds what its codes stand for.
        y: (B, O, *out), dense, its axes of the image side by side in memory.
        clipped: uint8 like y, or None.
    """
    axes = len(window.stride)
    out = list(y.shape[2:])

    def three(values: list[int], missing: int) -> list[int]:
        return [missing] * (3 - axes) + list(values)

    per_group = w.shape[0] // spec.groups
    rows = y.shape[0] * (y[0, 0].numel() if y.shape[0] and y.shape[1] else 0)
    sizes, steps = three(list(x.shape[2:]), 1), three(window.stride, 1)
    pads, strides = three(window.padding, 0), three(list(x.stride()[2:]), 0)
    return Launch(
        conv_forward,
        (blocks_of(rows, block.rows) * blocks_of(per_group, block.outputs), spec.groups),
        {
            "p_x": x,
            "p_w": w,
            "p_bias": None if bias is None else bias.contiguous(),
            "p_range": around.ranges,
            "p_code_scale": around.code_scale,
            "p_noise_scale": around.noise_scale,
            "p_bound_scale": around.bound_scale,
            "p_seed": around.seed if spec.out_noise else None,
            "p_y": y,
            "p_clipped": clipped,
            "n_rows": rows,
            "n_outputs": w.shape[0],
            "n_inputs": w.shape[1],
            "per_group": per_group,
            "pixels": rows // max(y.shape[0], 1),
            **{f"out_{axis}": three(out, 1)[axis] for axis in (1, 2)},
            **{f"size_{axis}": size for axis, size in enumerate(sizes)},
            **{f"step_{axis}": step for axis, step in enumerate(steps)},
            **{f"pad_{axis}": pad for axis, pad in enumerate(pads)},
            "taps": math.prod(window.kernel_size),
            **{f"kernel_{axis}": three(window.kernel_size, 1)[axis] for axis in (1, 2)},
            **{f"dilation_{axis}": d for axis, d in enumerate(three(window.dilation, 1))},
            "stride_xb": x.stride(0),
            "stride_xc": x.stride(1),
            "stride_xg": x.stride(1) * (x.shape[1] // spec.groups),
            **{f"stride_x{axis}": stride for axis, stride in enumerate(strides)},
            "stride_yb": y.stride(0),
            "stride_yo": y.stride(1),
            "stride_yp": y.stride(-1),
        },
        {
            "AXES": axes,
            "RANGE": range_mode(around.ranges, spec),
            "INP_RES": float(spec.inp_res) if around.ranges is not None else 0.0,
            "SUM": sum_of(spec, w.dtype),
            "OUT_NOISE": float(spec.out_noise),
            "OUT_BOUND": float(spec.out_bound),
            "OUT_RES": float(spec.out_res),
            "QUADS": per_group % 4 == 0,
            "PRECISION": precision_of(w.dtype, integers.largest_of(spec)),
            "BLOCK_ROWS": block.rows,
            "BLOCK_OUT": block.outputs,
            "BLOCK_IN": block.inputs,
            "GROUP": blocks.GROUP,
        },
        block.options,
    )
