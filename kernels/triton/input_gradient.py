"""The gradients of the inputs and of their ranges.

With g_t the gradient of the output, 0 where tile t's ADC clipped:

    dx[t]  = (g_t W~[t]) [|x[t]| <= r_t]
    dr_t   = r_t sum_{|x| >= r_t} min(sign(x) (g_t W~[t]), 0)     static: data term; with a count
    dr_t   = sum_{|x| > r_t} sign(x) (g_t W~[t])                  fast

Where nothing was clipped, g_t is g for every tile, and the product is one of the vendor's, which no
hand-written one beats: a pass over it does what the clamp does. The blocks in which something was
clipped are a launch that computes their products anew.

Straight through every rounding and noise. A block lies within one tile; what it adds to a range's
gradient it stores beside the others', to be summed in one order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    PATCH_ROWS,
    any_marked,
    dot,
    halves,
    masked,
    rounded_to,
    swizzled,
    tile_span,
)
from analogfx.kernels.triton.launch import Launch, blocks_of, geometry, is_even
from analogfx.kernels.triton.tile import precision_of


@triton.jit
def through_clamp(
    grad,
    p_x,
    p_range,
    p_dx,
    tile,
    start,
    length,
    o_row,
    first,
    n_rows,
    n_inputs,
    stride_xn,
    stride_xi,
    RANGE: tl.constexpr,
    PARTIAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store what a tile's clamp lets through of a block's gradient; its part of the range's."""
    o_column = first + tl.arange(0, COLUMNS)
    o_input = (start + o_column).to(tl.int64)
    m = (o_row < n_rows)[:, None] & (o_column < length)[None, :]
    data, count = 0.0, 0.0
    if RANGE == "static" or RANGE == "fast":
        at = o_row[:, None] * stride_xn + o_input[None, :] * stride_xi
        x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
        r = tl.load(p_range + tile)
        if PARTIAL:
            signed = tl.where(x > 0, grad, tl.where(x < 0, -grad, 0.0))
            if RANGE == "static":
                beyond = (tl.abs(x) >= r) & m
                signed = tl.minimum(signed, 0.0, propagate_nan=tl.PropagateNan.ALL)
            else:
                beyond = (tl.abs(x) > r) & m
            data = tl.sum(tl.sum(tl.where(beyond, signed, 0.0), axis=1), axis=0)
            count = tl.sum(tl.sum(beyond.to(tl.float32), axis=1), axis=0)
        grad *= (tl.abs(x) <= r).to(tl.float32)
    if p_dx is not None:
        at = o_row[:, None] * n_inputs + o_input[None, :]
        tl.store(p_dx + at, rounded_to(grad, p_dx.dtype.element_ty), mask=m)
    return data, count


@triton.jit
def place_of(
    size,
    larger,
    n_rows,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program's tile, its first input and length; block row, first column, and partial sum."""
    per_tile = tl.cdiv(size if EVEN else size + 1, BLOCK_IN)
    n_down = tl.cdiv(n_rows, BLOCK_ROWS)
    row, column = swizzled(tl.program_id(0), n_down, per_tile * TILES, GROUP)
    tile = column // per_tile
    start, length = tile_span(tile, size, larger, EVEN)
    column = column % per_tile
    at = (tile * n_down + row) * per_tile + column
    return tile, start, length, row, column * BLOCK_IN, at


@triton.jit
def row_marked(p_marked, tile, row, n_rows, BLOCK_ROWS: tl.constexpr):
    """Whether a patch in a block's rows is marked for a tile."""
    down: tl.constexpr = BLOCK_ROWS // PATCH_ROWS
    patches = tl.cdiv(n_rows, PATCH_ROWS)
    return any_marked(p_marked + tile.to(tl.int64) * patches, row * down, patches, down)


@triton.jit
def clamp_gradient(
    p_product,
    p_x,
    p_range,
    p_marked,
    p_dx,
    p_partial,
    n_rows,
    n_inputs,
    size,
    larger,
    n_partial,
    stride_xn,
    stride_xi,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one tile's inputs, from its product g W~; nothing where a patch is marked."""
    tile, start, length, row, first, at = place_of(
        size, larger, n_rows, EVEN, TILES, BLOCK_ROWS, BLOCK_IN, GROUP
    )
    if p_marked is not None:  # noqa: SIM102, Triton looks at both sides of an "and"
        if row_marked(p_marked, tile, row, n_rows, BLOCK_ROWS):
            return  # linear_backward_input computes it
    o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    data, count = 0.0, 0.0
    for beyond in range(0, BLOCK_IN, COLUMNS):  # the addresses of a whole block would not fit
        o_column = first + beyond + tl.arange(0, COLUMNS)
        m = (o_row < n_rows)[:, None] & (o_column < length)[None, :]
        place = o_row[:, None] * n_inputs + (start + o_column).to(tl.int64)[None, :]
        grad = tl.load(p_product + place, mask=m, other=0.0).to(tl.float32)
        more_data, more_count = through_clamp(
            grad, p_x, p_range, p_dx, tile, start, length, o_row, first + beyond, n_rows, n_inputs,
            stride_xn, stride_xi, RANGE, p_partial is not None, COLUMNS,
        )  # fmt: skip
        data += more_data
        count += more_count
    if p_partial is not None:
        tl.store(p_partial + at, data)
        tl.store(p_partial + n_partial + at, count)


@triton.jit
def linear_backward_input(
    p_g,
    p_w,
    p_x,
    p_range,
    p_bits,
    p_marked,
    p_dx,
    p_partial,
    n_rows,
    n_outputs,
    n_inputs,
    size,
    larger,
    n_partial,
    stride_gn,
    stride_go,
    stride_wo,
    stride_wi,
    stride_xn,
    stride_xi,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one tile's inputs, if a patch in its rows is marked."""
    tile, start, length, row, first, at = place_of(
        size, larger, n_rows, EVEN, TILES, BLOCK_ROWS, BLOCK_IN, GROUP
    )
    if row_marked(p_marked, tile, row, n_rows, BLOCK_ROWS):
        o_row = row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        o_column = first + tl.arange(0, BLOCK_IN)
        o_input = (start + o_column).to(tl.int64)
        # Beyond the edge the last row is read again, and not stored: no mask is held. Not so for
        # the inputs, which lie side by side in memory: the compiler must see that they do.
        in_row = tl.minimum(o_row, n_rows - 1)
        m_in = o_column < length
        p_rows = p_g + in_row[:, None] * stride_gn
        p_inputs = p_w + o_input[None, :] * stride_wi
        o_k = tl.arange(0, BLOCK_OUT)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_IN), tl.float32)
        for begin in range(0, n_outputs, BLOCK_OUT):
            o_out = begin + o_k.to(tl.int64)
            m_out = o_k < (BLOCK_OUT if WHOLE else n_outputs - begin)
            g = tl.load(p_rows + o_out[None, :] * stride_go, mask=m_out[None, :], other=0.0)
            g = masked(
                g, p_bits, tile, in_row[:, None], o_out[None, :], m_out[None, :], n_rows, n_outputs
            )
            m = m_out[:, None] & m_in[None, :]
            w = tl.load(p_inputs + o_out[:, None] * stride_wo, mask=m, other=0.0)
            acc = dot(g, w, acc, PRECISION)

        # Half a block at a time: beside the accumulator, addresses of all of x do not fit.
        HALF: tl.constexpr = BLOCK_IN // 2
        left, right = halves(acc, BLOCK_ROWS, BLOCK_IN)
        data, count = through_clamp(
            left, p_x, p_range, p_dx, tile, start, length, o_row, first, n_rows, n_inputs,
            stride_xn, stride_xi, RANGE, p_partial is not None, HALF,
        )  # fmt: skip
        more_data, more_count = through_clamp(
            right, p_x, p_range, p_dx, tile, start, length, o_row, first + HALF, n_rows, n_inputs,
            stride_xn, stride_xi, RANGE, p_partial is not None, HALF,
        )  # fmt: skip
        if p_partial is not None:
            tl.store(p_partial + at, data + more_data)
            tl.store(p_partial + n_partial + at, count + more_count)


def clamp_launch(
    product: Tensor,
    x: Tensor,
    *,
    ranges: Tensor,
    marked: Tensor | None,
    dx: Tensor | None,
    partial: Tensor | None,
    spec: MVMSpec,
    block: Blocks,
) -> Launch:
    """Gradients of x (N, I) and of the ranges (k,) from g W~, where nothing was clipped.

    Args:
        product: contiguous (N, I); ``dx`` may be the same tensor.
        marked: uint8 (k, patches): patches of rows that hold something clipped; None for none.
        dx: contiguous (N, I), or None where it is not wanted.
        partial: float32 of :func:`partial_shape`, or None: sums and counts for every block.
    """
    return Launch(
        clamp_gradient,
        _grid(x.shape[0], spec, block),
        {
            "p_product": product,
            "p_x": x,
            "p_range": ranges,
            "p_marked": marked,
            "p_dx": dx,
            "p_partial": partial,
            "n_rows": x.shape[0],
            "n_inputs": x.shape[1],
            **geometry(spec),
            "n_partial": _grid(x.shape[0], spec, block)[0],
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "TILES": len(spec.in_sizes),
            "RANGE": spec.range_mode,
            "BLOCK_ROWS": block.rows,
            "BLOCK_IN": block.inputs,
            "COLUMNS": min(block.inputs, 32),
            "GROUP": blocks.GROUP,
        },
        {"num_warps": 8, "num_stages": 1},
    )


def clipped_input_launch(
    g: Tensor,
    w: Tensor,
    x: Tensor,
    *,
    ranges: Tensor | None,
    bits: Tensor,
    marked: Tensor,
    dx: Tensor | None,
    partial: Tensor | None,
    spec: MVMSpec,
    block: Blocks,
) -> Launch:
    """The same from g (N, O) and the modified weights (O, I), where something was clipped.

    Args:
        ranges: None where the clamp lets everything through.
        bits: uint8 (k, N, ceil(O / 8)): what a bound clipped.
    """
    rows, outputs = g.shape
    return Launch(
        linear_backward_input,
        _grid(rows, spec, block),
        {
            "p_g": g,
            "p_w": w,
            "p_x": None if ranges is None else x,
            "p_range": ranges,
            "p_bits": bits,
            "p_marked": marked,
            "p_dx": dx,
            "p_partial": partial,
            "n_rows": rows,
            "n_outputs": outputs,
            "n_inputs": w.shape[1],
            **geometry(spec),
            "n_partial": _grid(rows, spec, block)[0],
            "stride_gn": g.stride(0),
            "stride_go": g.stride(1),
            "stride_wo": w.stride(0),
            "stride_wi": w.stride(1),
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "WHOLE": outputs % block.outputs == 0,
            "TILES": len(spec.in_sizes),
            "RANGE": "none" if ranges is None else spec.range_mode,
            "PRECISION": precision_of(w.dtype),
            "BLOCK_ROWS": block.rows,
            "BLOCK_OUT": block.outputs,
            "BLOCK_IN": block.inputs,
            "GROUP": blocks.GROUP,
        },
        block.options,
    )


def _grid(rows: int, spec: MVMSpec, block: Blocks) -> tuple[int]:
    """A program for every block of every tile."""
    per_tile = blocks_of(max(spec.in_sizes), block.inputs)
    return (blocks_of(rows, block.rows) * per_tile * len(spec.in_sizes),)


def partial_shape(rows: int, spec: MVMSpec, block: Blocks) -> tuple[int, int, int]:
    """(sum and count, k, blocks of a tile) of the partial gradients of the ranges."""
    per_tile = blocks_of(max(spec.in_sizes), block.inputs)
    return 2, len(spec.in_sizes), blocks_of(rows, block.rows) * per_tile
