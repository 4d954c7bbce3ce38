"""One tile's share of a block of outputs: what the forward product and its repetition share.

    q_t = DAC(x[t])                                  integers, or the clamped input without a DAC
    y_t = (q_t W~[t]^T) s_t                          s_t: the DAC's step (times the weights' codes')
    z_t = round((y_t + strength r_t a N(0, 1)) / d) d,  d = 2 B_t / n,  B_t = r_t b a

Where the ADC's codes are a function of integers (``kernels.integers``):

    z_t = round((q_t q_w^T) rho) d                   the sum of products of codes is exact

Output noise of tile t is stream t + 1 over the elements of y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from analogfx.kernels import integers, plan
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.device import (
    dac,
    dot,
    normal_at,
    normal_quads,
    on_grid,
    round_even,
    rounded_to,
    step_of,
)
from analogfx.kernels.triton.inputs import Operand
from analogfx.kernels.triton.launch import geometry, is_even, is_interpreted, range_mode
from analogfx.kernels.triton.weights import code_scale, scaled_by


@triton.jit
def summed(x, w, acc, low, SUM: tl.constexpr, PRECISION: tl.constexpr):
    """A sum of products and one block more.

    Args:
        SUM: "values", or for the sum of products of codes "codes", and "long" where float32 does
            not hold it: then it is summed in two numbers, and rounded once.
    """
    if SUM == "long":
        more = dot(x, w, tl.zeros_like(acc), PRECISION)
        total = acc + more
        taken = total - acc
        low += (acc - (total - taken)) + (more - taken)  # what the sum lost, exactly (Knuth)
        acc = total
    else:
        acc = dot(x, w, acc, PRECISION)
    return acc, low


@triton.jit
def product_of(acc, low, r, INP_RES: tl.constexpr, SUM: tl.constexpr):
    """A tile's product, float32, from the sum of products of what the DAC gave."""
    y = acc.to(tl.float32)
    if SUM == "long":
        y += low
    if SUM == "values" and INP_RES > 0:
        y *= step_of(r, INP_RES)
    return y


@triton.jit
def tile_product(
    p_x,
    p_w,
    r,
    start,
    length,
    stride_xi,
    stride_wi,
    WHOLE: tl.constexpr,
    RANGE: tl.constexpr,
    CONVERT: tl.constexpr,
    INP_RES: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One tile's product for a block of outputs, float32.

    Args:
        p_x, p_w: pointers to the block's rows (BLOCK_ROWS, 1) and outputs (1, BLOCK_OUT).
        SUM: see :func:`summed`.
    """
    o_in = tl.arange(0, BLOCK_IN)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.int32 if PRECISION == "int8" else tl.float32)
    low = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for first in range(0, length, BLOCK_IN):
        o_input = (start + first + o_in).to(tl.int64)
        m_in = o_in < (BLOCK_IN if WHOLE else length - first)
        x = tl.load(p_x + o_input[None, :] * stride_xi, mask=m_in[None, :], other=0.0)
        if CONVERT:
            x = dac(x.to(tl.float32), r, RANGE, INP_RES, False)
            x = rounded_to(x, p_w.dtype.element_ty)
        w = tl.load(p_w + o_input[:, None] * stride_wi, mask=m_in[:, None], other=0.0)
        acc, low = summed(x, w, acc, low, SUM, PRECISION)
    return product_of(acc, low, r, INP_RES, SUM)


@triton.jit
def draw_block(
    p_seed,
    stream,
    o_row,
    first_output,
    n_outputs,
    QUADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Standard normal values for a block of outputs."""
    seed = tl.load(p_seed)
    row = (o_row * n_outputs)[:, None] + first_output
    if QUADS:  # four outputs side by side share a counter
        counter = row // 4 + tl.arange(0, BLOCK_OUT // 4)[None, :]
        draw = tl.reshape(normal_quads(seed, counter, stream), (BLOCK_ROWS, BLOCK_OUT))
    else:
        draw = normal_at(seed, row + tl.arange(0, BLOCK_OUT)[None, :], stream)
    return draw


@triton.jit
def behind_adc(
    y,
    r,
    tile,
    o_row,
    first_output,
    n_outputs,
    p_weight_step,
    p_code_scale,
    p_noise_scale,
    p_bound_scale,
    p_seed,
    OUT_NOISE: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    OUT_RES: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile's product (ROWS, COLUMNS) with output noise and rounded by its ADC; the bound.

    Not clamped yet. Outputs beyond the edge have a bound of 0.
    """
    o_out = first_output + tl.arange(0, COLUMNS)
    m_out = o_out < n_outputs
    o_scale = tile * n_outputs + o_out
    if p_weight_step is not None:
        y *= tl.load(p_weight_step + o_scale, mask=m_out, other=0.0)[None, :]
    if OUT_NOISE > 0:
        a = tl.load(p_noise_scale + o_scale, mask=m_out, other=0.0)[None, :]
        draw = draw_block(p_seed, tile + 1, o_row, first_output, n_outputs, QUADS, ROWS, COLUMNS)
        y += draw * (a * (OUT_NOISE * r))
    bound = 0.0
    if OUT_BOUND > 0:
        a = tl.load(p_bound_scale + o_scale, mask=m_out, other=0.0)[None, :]
        bound = (r * OUT_BOUND) * a
        if OUT_RES > 0:
            step = step_of(bound, OUT_RES)
            step = tl.where(step == 0, 1.0, step)
            if p_code_scale is not None:
                rho = tl.load(p_code_scale + o_scale, mask=m_out, other=0.0)[None, :]
                # Added 0 to, so that no compiler fuses the product with the rounding's addition.
                y = round_even(tl.fma(y, rho + tl.zeros_like(y), tl.zeros_like(y))) * step
            else:
                y = on_grid(y, step) * step
    return y, bound


def precision_of(operand: torch.dtype, largest_code: int = 0) -> str:
    """How a kernel multiplies operands of a dtype: float32 as torch's own setting says.

    But codes up to a largest one stay exact.
    """
    if operand == torch.int8:
        return "int8"
    if is_interpreted(behind_adc):
        return "interpreted"
    # The older torch.get_float32_matmul_precision() raises where this setting was used.
    single = operand == torch.float32 and largest_code <= plan.EXACT[operand]
    if single and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


class Periphery(NamedTuple):
    """What stands around the tiles: ranges before them, noise and ADC behind."""

    ranges: Tensor | None
    """(k,) or (N, k) float32, None where there are none."""
    seed: Tensor | None
    noise_scale: Tensor | None
    """(k, O) float32, None without output noise."""
    bound_scale: Tensor | None
    """(k, O) float32, None without a bound."""
    weight_step: Tensor | None = None
    """(k, O) float32: what the codes in int8 weights stand for, else None."""
    code_scale: Tensor | None = None
    """(k, O) float32: steps of the ADC for one step of the products of codes, else None."""


def periphery(
    ranges: Tensor | None,
    seed: Tensor | None,
    peaks: Tensor | None,
    spec: MVMSpec,
    weight_step: Tensor | None = None,
) -> Periphery:
    """What stands around the tiles of a site.

    Args:
        ranges: (k,) or (N, k), None where there are none.
        peaks: what ``weights.maxima`` gave.
        weight_step: what a code of the weights stands for, if they are codes.
    """
    noise_scale = bound_scale = None
    if spec.out_noise:
        assert peaks is not None
        noise_scale = scaled_by(peaks, spec.out_noise_per_channel, spec)
    if spec.out_bound:
        assert peaks is not None
        bound_scale = scaled_by(peaks, spec.bound_per_channel, spec)
    rho = None if peaks is None else code_scale(peaks, spec)
    step = weight_step if rho is None else None
    return Periphery(ranges, seed, noise_scale, bound_scale, step, rho)


def arguments(x: Operand, w: Tensor, around: Periphery) -> dict[str, Any]:
    """Arguments of a kernel that computes tiles' outputs from x (N, I) and w (O, I)."""
    return {
        "p_x": x.x,
        "p_w": w,
        "p_range": around.ranges,
        "p_weight_step": around.weight_step,
        "p_code_scale": around.code_scale,
        "p_noise_scale": around.noise_scale,
        "p_bound_scale": around.bound_scale,
        "p_seed": around.seed if x.spec.out_noise else None,
        "n_rows": x.x.shape[0],
        "n_outputs": w.shape[0],
        **geometry(x.spec),
        "stride_xn": x.x.stride(0),
        "stride_xi": x.x.stride(1),
        "stride_wo": w.stride(0),
        "stride_wi": w.stride(1),
    }


def sum_of(spec: MVMSpec, operand: torch.dtype) -> str:
    """How ``tile_product`` sums."""
    depth = integers.depth(spec)
    if not depth:
        return "values"
    return "long" if operand != torch.int8 and max(spec.in_sizes) > depth else "codes"


def constants(x: Operand, w: Tensor, ranges: Tensor | None, block: Blocks) -> dict[str, Any]:
    """Constants of such a kernel."""
    spec = x.spec
    return {
        "EVEN": is_even(spec),
        "WHOLE": all(size % block.inputs == 0 for size in spec.in_sizes),
        "TILES": len(spec.in_sizes),
        "RANGE": range_mode(ranges, spec),
        "CONVERT": x.convert and ranges is not None,
        "INP_RES": float(spec.inp_res) if ranges is not None else 0.0,
        "SUM": sum_of(spec, w.dtype),
        "OUT_NOISE": float(spec.out_noise),
        "OUT_BOUND": float(spec.out_bound),
        "OUT_RES": float(spec.out_res),
        "QUADS": w.shape[0] % 4 == 0,
        "PRECISION": precision_of(w.dtype, integers.largest_of(spec)),
        "BLOCK_ROWS": block.rows,
        "BLOCK_OUT": block.outputs,
        "BLOCK_IN": block.inputs,
        "GROUP": blocks.GROUP,
    }
