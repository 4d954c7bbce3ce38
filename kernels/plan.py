"""How the kernels compute a linear product: chosen by shape and config.

Known without data and without triton, so that a report can say it. Block sizes are chosen in
``triton/blocks.py``; a product of the backward for which nothing is masked, clamped or converted is
torch's own, too (``triton/linear.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analogfx.kernels.spec import MVMSpec

FEW = 64
"""Rows up to which a product is bound by reading the weights: decoding, not training."""

REUSED = 4
"""Blocks across from which a product's inputs are converted beforehand: each block across would
convert them again in its prologue, and reading and writing them once costs no more than that."""

LEAST_OUTPUTS = 16
"""Outputs of a group from which on a convolution is one launch."""

CONV_BY_VENDOR = "triton: weights; torch.convolution"

PATCH = (16, 32)
"""Rows and outputs that share a mark, in training, of whether a bound clipped one of them."""

EXACT = {torch.int8: 127, torch.bfloat16: 256, torch.float16: 2048, torch.float32: 2048}
"""Integers up to which a dtype holds all of them; float32 may be multiplied as tf32."""


def largest_code(inp_res: float) -> float:
    """Magnitude of a DAC's largest code; 0 without a DAC."""
    if not inp_res:
        return 0.0
    return inp_res / 2 if inp_res > 1 else 0.5 / inp_res


def by_vendor(dtype: torch.dtype, spec: MVMSpec) -> bool:
    """Whether torch.mm takes the forward product: nothing is left to do for a tile.

    No hand-written product is faster then. In half precision the DAC's step is such a thing: as a
    factor of an operand it would be rounded with it.
    """
    factor = spec.range_mode != "none" and spec.inp_res and dtype != torch.float32
    return not (spec.out_noise or spec.out_bound or factor)


def in_integers(spec: MVMSpec) -> bool:
    """Whether a product is one of 8-bit integers: at inference, without noise.

    The sum of 2**17 products of codes fits int32.
    """
    noisy = spec.noise_std or spec.out_noise or spec.keep
    weights = 0 < spec.weight_states <= 254
    inputs = spec.range_mode != "none" and 0 < largest_code(spec.inp_res) <= EXACT[torch.int8]
    return bool(weights and inputs and not noisy and max(spec.in_sizes) <= 1 << 17)


def prepares(rows: int, across: int) -> bool:
    """Whether inputs are converted before a product that has some blocks across."""
    return across >= REUSED and rows > FEW


def marks_shape(x: Tensor, weight: Tensor, spec: MVMSpec) -> tuple[int, ...]:
    """Shape of the marks of patches of outputs that hold a clipped one; a byte for each.

    The backward finds out which outputs of a marked patch were clipped: to keep a bit for every
    output of every tile would take as much memory as x or W.
    """
    if not (spec.keep and spec.out_bound):
        return (0,)
    rows, outputs = PATCH
    down = (math.prod(x.shape[:-1]) + rows - 1) // rows
    return len(spec.in_sizes), down, (weight.shape[0] + outputs - 1) // outputs


def expert_marks_shape(x: Tensor, weight: Tensor, *scalars: object) -> tuple[int, ...]:
    """The same for a layer of experts: patches of rows, each of one expert, come first.

    An expert's begin behind those that the rows before it fill, and one more for every expert
    before it: how many it has is not known without data.
    """
    spec = scalars[-1]
    assert isinstance(spec, MVMSpec)
    shape = marks_shape(x, weight[0], spec)
    if len(shape) == 1:
        return shape
    tiles, down, across = shape
    return down + weight.shape[0], tiles * across


def fuses_conv(dtype: torch.dtype, spec: MVMSpec) -> bool:
    """Whether a convolution is one launch, and not the vendor's product in float32.

    Not measured yet: the vendor's is taken to be faster for float32, whose blocks are small in
    Triton, and for groups of few outputs, as depthwise convolutions have them, since a block of
    outputs lies within one group.
    """
    return dtype != torch.float32 and sum(spec.out_sizes) >= LEAST_OUTPUTS * spec.groups


def described(op: str, dtype: torch.dtype, spec: MVMSpec) -> str:
    """The forward product of a site, for a report."""
    if op == "conv":
        return "triton: fused" if fuses_conv(dtype, spec) else CONV_BY_VENDOR
    if in_integers(spec):
        return "triton: int8"
    if by_vendor(dtype, spec):
        return "triton: prepared operands, torch.mm"
    return "triton: fused"
