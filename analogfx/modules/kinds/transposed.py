"""Transposed convolutions: the size that a call asks for is computed in the call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

_FUNCTIONS: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    """What ``nn.ConvTranspose1d`` to ``3d`` compute, with their arguments and shapes."""
    window = (self.stride, self.padding, self.kernel_size, self.dilation)
    more = self.output_padding if output_size is None else padding_for(input, output_size, *window)
    function = _FUNCTIONS[len(self.kernel_size)]
    operands = (input, self.weight, self.bias, self.stride, self.padding)
    return function(*operands, more, self.groups, self.dilation)


@torch.fx.wrap
def padding_for(
    input: Tensor,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    kernel_size: list[int],
    dilation: list[int],
) -> list[int]:
    """The padding at the end that gives an output its size, as torch computes it.

    Raises:
        ValueError: no padding gives this size.
    """
    dims = len(kernel_size)
    compute: Any = _ConvTransposeNd._output_padding
    return compute(None, input, output_size, stride, padding, kernel_size, dims, dilation)


FORWARDS = {
    kind.forward: forward for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
