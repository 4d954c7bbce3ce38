"""Inputs behind the DAC, once for all blocks of outputs that read them.

    q = round(clamp(x, +-r) / s), s = 2 r / n        |q| <= n/2: exact in bfloat16, float16, int8

The range r is a factor outside the product, so half precision loses nothing to the DAC. A product
can do this in its prologue, too; then each of its O / block columns of programs does it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels import integers, plan
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.device import dac, rounded_to, tile_range, tile_span
from analogfx.kernels.triton.launch import Launch, blocks_of, geometry, is_even, range_mode
from analogfx.kernels.triton.weights import row_max_launch


class Operand(NamedTuple):
    """Inputs (N, I) as a product takes them."""

    x: Tensor
    convert: bool
    """Whether the product's prologue converts them."""
    spec: MVMSpec
    """The site's, without the DAC where ``x`` holds what its codes stand for."""


@triton.jit
def convert_input(
    p_x,
    p_range,
    p_out,
    p_row_nan,
    n_rows,
    n_inputs,
    size,
    larger,
    stride_xn,
    stride_xi,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
    RANGE: tl.constexpr,
    INP_RES: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One block of one tile's inputs, clamped and converted, into a contiguous (N, I)."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(2)
    start, length = tile_span(tile, size, larger, EVEN)
    o_column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_row = o_row < n_rows
    m = m_row[:, None] & (o_column < length)[None, :]
    o_input = (start + o_column).to(tl.int64)
    at = o_row[:, None] * stride_xn + o_input[None, :] * stride_xi
    x = tl.load(p_x + at, mask=m, other=0.0).to(tl.float32)
    if p_row_nan is not None:  # whoever finds a NaN writes the same
        holds = tl.max((x != x).to(tl.int32), axis=1) != 0
        tl.store(p_row_nan + o_row, tl.full((BLOCK_ROWS,), float("nan"), tl.float32), mask=holds)
    r = tile_range(p_range, tile, o_row, n_rows, RANGE, TILES)
    x = dac(x, r, RANGE, INP_RES, VALUES)
    at = o_row[:, None] * n_inputs + o_input[None, :]
    tl.store(p_out + at, rounded_to(x, p_out.dtype.element_ty), mask=m)


def convert_launch(
    x: Tensor,
    ranges: Tensor,
    out: Tensor,
    row_nan: Tensor | None,
    values: bool,
    spec: MVMSpec,
) -> Launch:
    """Convert x (N, I) into ``out``: contiguous, (N, I), of a dtype that holds the codes exactly.

    Args:
        ranges: (k,), or (N, k) where they are dynamic; float32.
        row_nan: (N,) float32, set to NaN where a row holds one: for integers, which cannot.
        values: write what the codes stand for, not the codes.
    """
    rows, inputs = x.shape
    grid = (
        blocks_of(rows, blocks.ROWS),
        blocks_of(max(spec.in_sizes), blocks.COLUMNS),
        len(spec.in_sizes),
    )
    return Launch(
        convert_input,
        grid,
        {
            "p_x": x,
            "p_range": ranges,
            "p_out": out,
            "p_row_nan": row_nan,
            "n_rows": rows,
            "n_inputs": inputs,
            **geometry(spec),
            "stride_xn": x.stride(0),
            "stride_xi": x.stride(1),
        },
        {
            "EVEN": is_even(spec),
            "TILES": len(spec.in_sizes),
            "RANGE": range_mode(ranges, spec),
            "INP_RES": float(spec.inp_res),
            "VALUES": values,
            "BLOCK_ROWS": blocks.ROWS,
            "BLOCK_COLUMNS": blocks.COLUMNS,
        },
    )


def converted(x: Tensor, ranges: Tensor, dtype: torch.dtype, values: bool, spec: MVMSpec) -> Tensor:
    """All tiles' inputs (N, I) behind the DAC, contiguous; see :func:`convert_launch`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    convert_launch(x, ranges, out, None, values, spec).run()
    return out


def operand(
    x: Tensor, ranges: Tensor | None, dtype: torch.dtype, across: int, values: bool, spec: MVMSpec
) -> Operand:
    """Inputs (N, I) for a product whose operands are of a dtype.

    Args:
        across: blocks that read every input.
        values: what the codes stand for, not the codes: the step is no factor of this product.
    """
    if ranges is None:
        return Operand(x, False, spec)
    exact = integers.depth(spec) > 0  # then the dtype was chosen to hold the codes
    if not values and not exact and plan.largest_code(spec.inp_res) > plan.EXACT[dtype]:
        x = converted(x, ranges, dtype, True, spec)
        return Operand(x, False, spec._replace(inp_res=0.0))
    if plan.prepares(x.shape[0], across):
        return Operand(converted(x, ranges, dtype, values, spec), False, spec)
    return Operand(x, True, spec)


def codes(x: Tensor, ranges: Tensor, spec: MVMSpec) -> tuple[Operand, Tensor]:
    """All tiles' inputs (N, I) in int8, and (N,) float32: NaN for a row that holds one, else 0."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_nan = torch.zeros(x.shape[0], device=x.device)
    convert_launch(x, ranges, out, row_nan, False, spec).run()
    return Operand(out, False, spec), row_nan


def tile_ranges(x: Tensor, input_range: Tensor | None, spec: MVMSpec) -> Tensor | None:
    """(k,) learned or measured ranges, (N, k) dynamic ones, None where there are none."""
    if spec.range_mode != "dynamic":
        return input_range
    out = x.new_empty((x.shape[0], len(spec.in_sizes)), dtype=torch.float32)
    row_max_launch(x, out.T, spec).run()
    return out
