"""The rules of respell for transposed convolutions: one product for every pixel of the input.

For W (I, O / groups, *kernel) the vector of a pixel's I channels is multiplied by a matrix. The
tile's rows are the input channels, its columns every output channel at every offset of the kernel.
What the tile gives is added up digitally where kernels overlap.

    conv_transpose(x, W) = scatter(conv(x, W as (O * prod(kernel), I / groups, 1, ...)))
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from analogfx.passes.contract import Refused
from analogfx.passes.stationary import weight_value

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv_transpose(
    graph: Graph,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Node:
    value = weight_value(weight)
    if value is None:
        raise Refused("the kernel is not a parameter")
    kernel = list(value.shape[2:])
    dims = len(kernel)
    matrices = graph.call_method("unflatten", (weight, 0, [groups, -1]))
    matrices = graph.call_method("flatten", (matrices, 2))
    matrices = graph.call_method("transpose", (matrices, 1, 2))
    matrix = graph.call_method("flatten", (matrices, 0, 1))
    pixel = graph.call_method("unflatten", (matrix, 1, [value.shape[0] // groups] + [1] * dims))
    ones, zeros = [1] * dims, [0] * dims
    convolution = _CONVOLUTIONS[dims]
    y = graph.call_function(convolution, (input, pixel, None, ones, zeros, ones, groups))
    window = (kernel, _per_axis(stride, dims), _per_axis(padding, dims), _per_axis(dilation, dims))
    if not isinstance(output_padding, Node):
        output_padding = _per_axis(output_padding, dims)
    return graph.call_function(scatter, (y, bias, *window, output_padding))


def _convolution(
    graph: Graph,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Node:
    """``torch.convolution``, of whatever number of axes and either direction."""
    value = weight_value(weight)
    if value is None:
        raise Refused("the kernel is not a parameter")
    if transposed:
        more = (output_padding, groups, dilation)
        return _conv_transpose(graph, input, weight, bias, stride, padding, *more)
    target = _CONVOLUTIONS[value.dim() - 2]
    return graph.call_function(target, (input, weight, bias, stride, padding, dilation, groups))


def _per_axis(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * dims if len(values) == 1 else values


def scatter(
    y: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
) -> Tensor:
    """Kernels added up where they lie: (B, O * prod(kernel), *image) to (B, O, *out).

    Args:
        y: channel slowest, then the kernel's offsets; with or without the batch axis.
        bias: (O,) or None, added once to every pixel.
    """
    dims = len(kernel)
    image = y if y.dim() == dims + 2 else y.unsqueeze(0)
    full = _fold(image, kernel, stride, dilation)
    pairs = zip(reversed(padding), reversed(output_padding), strict=True)
    crop = [part for cut, more in pairs for part in (-cut, more - cut)]
    out = F.pad(full, crop) if any(crop) else full
    if bias is not None:
        out = out + bias.view(-1, *[1] * dims).to(out.dtype)
    return out if y.dim() == dims + 2 else out.squeeze(0)


def _fold(y: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """All of the kernels, nothing cut off: (B, O * prod(kernel), *image) to (B, O, *full)."""
    *image, dims = *y.shape[2:], len(kernel)
    if dims == 1:
        flat = _fold(y.unsqueeze(-2), [1, *kernel], [1, *stride], [1, *dilation])
        return flat.squeeze(-2)
    if dims == 3:  # fold knows two axes: height and width with depth in the batch, then depth
        y = y.unflatten(1, (-1, math.prod(kernel[1:]))).movedim(3, 1)
        planes = _fold(y.flatten(0, 1).flatten(1, 2), kernel[1:], stride[1:], dilation[1:])
        planes = planes.unflatten(0, (-1, image[0])).movedim(1, -1)  # (B, O * depth, H, W, D)
        size = planes.shape[2:4]
        rows = planes.movedim(1, 3).flatten(0, 2)  # (B * H * W, O * depth, D)
        full = _fold(rows, kernel[:1], stride[:1], dilation[:1])
        return full.unflatten(0, (-1, *size)).movedim((1, 2), (-2, -1))
    full_size = [
        (size - 1) * s + d * (k - 1) + 1
        for size, k, s, d in zip(image, kernel, stride, dilation, strict=True)
    ]
    return F.fold(y.flatten(2), tuple(full_size), tuple(kernel), tuple(dilation), 0, tuple(stride))


RULES: dict[Any, Any] = {
    F.conv_transpose1d: ("conv_transpose1d", _conv_transpose),
    F.conv_transpose2d: ("conv_transpose2d", _conv_transpose),
    F.conv_transpose3d: ("conv_transpose3d", _conv_transpose),
    torch.convolution: ("convolution", _convolution),
}
