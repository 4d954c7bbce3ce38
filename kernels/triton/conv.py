"""The fused convolution of one site on one tile, by kernels: forward and backward.

The signatures, and but for rounding the numbers, of :mod:`analogfx.kernels.conv`. In half precision
the forward is one launch that makes no patches: its sums stay in float32 up to the ADC. Elsewhere,
and for groups of few outputs, the product is the vendor's in float32. The products of the gradients
are the vendor's in x's dtype: nothing stands between them and the tile but the mask of what was
clipped, a byte for each output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from analogfx.kernels import conv, integers, plan
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import is_kept
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks, inputs
from analogfx.kernels.triton.conv_forward import conv_launch
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
    w = multiplied(matrix, clip, seed, peaks, rows).contiguous()
    shape = conv.out_shape(x, weight, window, spec)
    if not plan.fuses_conv(x.dtype, spec):
        held = ref.wide(w).view(weight.shape)
        return *conv.product(site, held, peaks, window, spec), nothing
    image, spec = _operand(x, input_range, w.dtype, spec)
    options: Any = {"device": x.device, "memory_format": suggest_memory_format(x)}
    y = torch.empty(shape, dtype=x.dtype, **options)
    marks = spec.keep and spec.out_bound
    clipped = torch.empty(shape if marks else 0, dtype=torch.uint8, **options if marks else {})
    conv_launch(
        image,
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
    """The image behind the DAC in a dtype, dense, and the spec with the DAC that is left to do."""
    if input_range is None:
        return conv.laid_out(x, x).to(dtype), spec
    fine = not integers.depth(spec) and plan.largest_code(spec.inp_res) > plan.EXACT[dtype]
    image = _converted(x, input_range, dtype, fine, spec)
    return image, spec._replace(inp_res=0.0) if fine else spec


def _converted(
    x: Tensor, input_range: Tensor, dtype: torch.dtype, values: bool, spec: MVMSpec
) -> Tensor:
    """An image behind the DAC, codes or values, dense and in x's memory format.

    Element by element: it is taken for rows of as many as a program converts, and what is left.
    """
    dense = conv.laid_out(x, x)
    out = torch.empty_like(dense, dtype=dtype)
    rows = x.numel() // blocks.COLUMNS
    for first, shape in (
        (0, (rows, blocks.COLUMNS)),
        (rows * blocks.COLUMNS, (1, x.numel() - rows * blocks.COLUMNS)),
    ):
        if 0 in shape:
            continue
        source, target = (t.as_strided(shape, (shape[1], 1), first) for t in (dense, out))
        one = spec._replace(in_sizes=[shape[1]])
        inputs.convert_launch(source, input_range, target, None, values, one).run()
    return out


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
    held = held.reshape(weight.shape)
    if clip is not None:  # whose gradient is a sum over the weight's
        grad, image, held = map(ref.wide, (grad, image, held))
    return conv.gradients(grad, site, clipped, image, held, needs, window, spec)
