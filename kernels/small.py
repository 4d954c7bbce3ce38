"""A small product on one tile: the numbers of :mod:`analogfx.kernels.linear` in fewer calls.

A layer of some dozen inputs spends its time on calls, not on arithmetic. What is known when the
program is built is made then (constants as tensors, since a Python number costs an op twice its
time), what is known of the host is decided there (whether a step is 0, whether anything is
saturated), and there are neither blocks nor loops over tiles.

For float32 on the CPU. ``tests/kernels/test_small.py`` compares every bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from analogfx.kernels import linear, noise
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.spec import MVMSpec, reference_only

LARGEST = 1 << 16
"""Elements of an operand up to which calls cost more than arithmetic."""

_TINY, _HUGE = 2.0**-100, 2.0**100
"""Steps and ranges between them are far from the smallest and the largest numbers."""


class _Step(NamedTuple):
    """Width of a converter's step over +-bound: ``2 bound / res`` or ``2 bound res``."""

    of: Callable[[Any, Any], Any]
    number: float
    constant: Tensor


class Small(NamedTuple):
    """A site's scalars, ready."""

    spec: MVMSpec
    dac: _Step | None
    adc: _Step | None
    out_bound: Tensor
    noise_std: Tensor
    decay: Tensor
    """Of the range where no input is saturated: its gradient over itself."""


def made(spec: MVMSpec) -> Small | None:
    """The scalars of a site; None for one that is not served here.

    That is one of several tiles or groups, one whose weights are quantised, whose outputs are
    noisy, or whose inputs have a range of their own each, and one that only the reference computes.
    """
    plain = len(spec.in_sizes) == len(spec.out_sizes) == spec.groups == 1
    others = spec.weight_states or spec.out_noise or spec.activation or reference_only(spec)
    if not plain or others or spec.range_mode == "dynamic":
        return None
    dac = spec.range_mode != "none" and spec.inp_res
    adc = spec.out_bound and spec.out_res
    # Real tensors, in whatever mode the program is built.
    with _disable_current_modes(), torch.inference_mode(False):
        decays = spec.range_mode == "static" and float(_constant(spec.input_min_percentage)) < 1.0
        return Small(
            spec,
            _step(spec.inp_res) if dac else None,
            _step(spec.out_res) if adc else None,
            _constant(spec.out_bound),
            _constant(spec.noise_std),
            _constant(spec.decay if decays else 0.0),
        )


def _step(res: float) -> _Step:
    # A factor of two changes no digit: it goes into the constant.
    of, number = (operator.truediv, res / 2) if res > 1.0 else (operator.mul, res * 2)
    return _Step(of, number, _constant(number))


def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def serves(x: Tensor, weight: Tensor, value: float, small: Small) -> bool:
    """Whether operands are as small as is meant, and their range in the middle of all numbers.

    Args:
        value: the range; 1 where there is none.
    """
    rows = x.numel() // max(weight.shape[-1], 1)
    return (
        0 < x.numel() <= LARGEST
        and 0 < weight.numel() <= LARGEST
        and rows * weight.shape[0] <= LARGEST
        and _TINY < value < _HUGE
        and (small.dac is None or small.dac.of(value, small.dac.number) > _TINY)
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    value: float,
    seed: Tensor | None,
    small: Small,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``linear.forward``, which goes on where a bound is 0.

    Args:
        x: (..., I) float32 on the CPU, for which :func:`serves` is true, as all others.
        weight: (O, I).
        input_range: (1,), above 0; None for a product without a range.
        value: the same in host memory.
    """
    spec = small.spec
    rows = _converted(x.reshape(-1, x.shape[-1]), input_range, value, small)
    nothing = weight.new_empty(0)
    peak = weight.abs().amax(-1) if spec.noise_std or spec.out_bound else nothing
    bound = step = nothing
    if spec.out_bound:
        assert input_range is not None
        a = peak if spec.bound_per_channel else peak.max()
        bound = (input_range * small.out_bound) * a
        step = bound if small.adc is None else small.adc.of(bound, small.adc.constant)
        if not _TINY < float(step.min()) < _HUGE:  # a row of zeros, or of NaN
            return linear.forward(Operands(x, weight, bias, input_range, None, seed), spec)
    held, modified = weight, nothing
    if spec.noise_std:
        assert seed is not None
        a = peak.unsqueeze(-1) if spec.noise_per_channel else peak.max()
        draw = noise.normal(seed, 0, weight.shape, weight.dtype)
        held = draw.mul_(small.noise_std * a).add_(weight)
        modified = held if spec.keep else nothing
    clipped = nothing.view(torch.uint8)
    if not spec.out_bound:
        y = F.linear(x if input_range is None else rows.view(x.shape), held, bias)
    else:
        y = F.linear(rows, held)
        if small.adc is not None:
            y.div_(step).round_().mul_(step)
        if spec.keep:
            clipped = (y.abs() > bound).view(torch.uint8).unsqueeze(0)
        y.clamp_(-bound, bound)
        if bias is not None:
            y.add_(bias)
    if x.dim() != 2:  # no view: what follows may write to it
        y = y.view(*x.shape[:-1], -1).clone()
    return y, clipped, modified


def _converted(rows: Tensor, input_range: Tensor | None, value: float, small: Small) -> Tensor:
    """Inputs behind the DAC, as ``linear.converted``."""
    if input_range is None:
        return rows
    out = torch.clamp(rows, -value, value)
    if small.dac is not None:
        step = small.dac.of(input_range, small.dac.constant)
        out.div_(step).round_().mul_(step)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    value: float,
    seed: Tensor | None,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    small: Small,
) -> Gradients:
    """As ``linear.backward``, which goes on where inputs are saturated."""
    spec = small.spec
    need_x, need_weight, need_bias, need_range, _ = needs
    noisy = spec.noise_std and modified.dim() < 2
    if noisy or (spec.out_bound and clipped.dim() < 2):  # the forward kept nothing
        site = Operands(x, weight, None, input_range, None, seed)
        return linear.backward(grad, site, clipped, modified, needs, spec)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    flat = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
    g = flat
    if spec.out_bound and clipped.any():
        g = flat.masked_fill(clipped[0].view(torch.bool), 0.0)
    nothing = weight.new_empty(0)
    of_x = of_weight = of_bias = of_range = nothing
    if need_x or need_range:
        of_x = F.linear(g, (modified if spec.noise_std else weight).mT)
    if need_weight:
        of_weight = g.mT @ _converted(rows, input_range, value, small)
    if need_bias:
        of_bias = flat.sum(0)
    if (need_x or need_range) and input_range is not None:
        # Where no input is saturated (and no gradient NaN), the clamp changes none.
        if float(rows.abs().max()) < value and math.isfinite(float(of_x.sum())):
            of_range = input_range * small.decay if need_range else nothing
        else:
            through = linear.through_dac(of_x, rows, input_range, spec)
            of_range = through if need_range else nothing
    of_x = of_x.view(x.shape) if need_x else nothing
    return Gradients(of_x, of_weight, of_bias, of_range, nothing)
