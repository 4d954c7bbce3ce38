"""What one site multiplies, and the gradients of that: the same for every op and implementation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of one site's product.

    Shapes are those of a linear site of k tiles. A convolution has an image (B, C, *image) and a
    weight (O, C / groups, *kernel), on one tile. Experts have a weight (E, O, I), a bias (E, O),
    clips (k, E * O), and ranges (k,) for all of them or (E, k).
    """

    x: Tensor
    """(..., groups * I), any strides."""
    weight: Tensor
    """(O, I), of x's dtype."""
    bias: Tensor | None = None
    """(O,)."""
    input_range: Tensor | None = None
    """(k,) float32, None unless the range is static or fast."""
    clip: Tensor | None = None
    """(k, O)."""
    seed: Tensor | None = None
    """int64 (), None unless something is noisy."""


class Gradients(NamedTuple):
    """Gradients by input; a tensor without elements where none was asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    input_range: Tensor
    clip: Tensor
