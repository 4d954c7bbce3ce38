"""The fused convolution of one site on one tile, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.conv`. In half precision
the forward is one launch that makes no patches: its sums stay in float32 up to the ADC. Elsewhere,
and for groups of few outputs, the product is the vendor's in float32. The products of the gradients
are the vendor's in x's dtype: nothing stands between them and the tile but the mask of what was
clipped, a byte for each output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analogfx.kernels import conv, integers, plan
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import is_kept
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks, inputs
from analogfx.kernels.triton.conv_forward import conv_launch, offsets_table
from analogfx.kernels.triton.tile import periphery
from analogfx.kernels.triton.weights import maxima, modified_weight, multiplied


def forward(site: Operands, window: Window, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the marks of clipped outputs, and nothing.

    Args:
        site: of float32, float16 or bfloat16.
    """
    x, weight, bias, input_range, clip, seed = site
    nothing = weight.new_empty(0)
    rows = spec._replace(groups=1)  # the rows of all groups are one matrix
    matrix = weight.flatten(1)
    peaks = maxima(matrix, clip, rows)
    w = multiplied(matrix, clip, seed, peaks, rows)
    if not plan.fuses_conv(x.dtype, spec):
        held = ref.wide(w).view(weight.shape)
        return *conv.product(site, held, peaks, window, spec), nothing
    image, spec = _operand(x, input_range, w.dtype, spec)
    y = conv.laid_out(x.new_empty(conv.out_shape(x, weight, window, spec)), x)
    clipped = torch.empty(0, dtype=torch.uint8, device=x.device)
    if spec.keep and spec.out_bound:
        clipped = torch.empty_like(y, dtype=torch.uint8)
    conv_launch(
        image,
        offsets_table(image, weight.shape[1], window),
        w,
        periphery(input_range, seed, peaks, rows),
        window,
        spec,
        y=y,
        block=blocks.of_conv(y, w),
        bias=bias,
        clipped=clipped if is_kept(clipped) else None,
    ).run()
    return y, clipped, nothing


def _operand(
    x: Tensor, input_range: Tensor | None, dtype: torch.dtype, spec: MVMSpec
) -> tuple[Tensor, MVMSpec]:
    """The image behind the DAC in a dtype, and the spec with the DAC that is left to do."""
    if input_range is None:
        return x.to(dtype), spec
    fine = not integers.depth(spec) and plan.largest_code(spec.inp_res) > plan.EXACT[dtype]
    image = _converted(x, input_range, dtype, fine, spec)
    return image, spec._replace(inp_res=0.0) if fine else spec


def _converted(
    x: Tensor, input_range: Tensor, dtype: torch.dtype, values: bool, spec: MVMSpec
) -> Tensor:
    """An image behind the DAC, codes or values, dense and in x's memory format.

    Element by element, so the image is taken for a matrix of any shape.
    """
    dense = conv.laid_out(x, x)
    columns = math.gcd(x.numel(), 1024)
    matrix = dense.as_strided((x.numel() // columns, columns), (columns, 1))
    one = spec._replace(in_sizes=[columns])
    return inputs.converted(matrix, input_range, dtype, values, one).as_strided(
        dense.shape, dense.stride()
    )


def backward(
    grad: Tensor,
    site: Operands,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    window: Window,
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; the arguments are those of ``conv.backward``."""
    x, weight, _, input_range, clip, seed = site
    rows = spec._replace(groups=1)
    matrix = weight.flatten(1)
    held = modified_weight(matrix, clip, seed, maxima(matrix, clip, rows), rows)
    if spec.out_bound and grad.numel() and not is_kept(clipped):
        clipped = forward(site, window, spec._replace(keep=True))[1]
    image = x if input_range is None else _converted(x, input_range, x.dtype, True, spec)
    held = held.view(weight.shape)
    return conv.gradients(grad, site, clipped, image, held, needs, window, spec)
