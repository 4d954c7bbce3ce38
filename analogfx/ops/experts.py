"""Layers of experts: the digital product, and the roles of tiles that differ by a row's expert.

Whatever loops over experts is an op, derivatives included: how many rows an expert has is not known
to a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import experts
from analogfx.kernels.spec import ROLES
from analogfx.ops.define import define, wide_like


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """The digital product of rows with the matrices of their experts.

    Args:
        x: (N, I), sorted by expert.
        weight: (E, O, I), of x's dtype.
        bias: (E, O) or None.
        offsets: (E,) int32 or int64, where the rows of each expert end. Rows behind the last one
            are of no expert, and give 0.

    Returns:
        (N, O) of x's dtype.
    """
    return torch.ops.analogfx.digital_experts.default(x, weight, bias, offsets)


def rows_of(v: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """What every expert has one of, (E, ...), for every row of another tensor."""
    return torch.ops.analogfx.expert_rows.default(v, offsets, like)


def sums_of(v: Tensor, offsets: Tensor) -> Tensor:
    """Sums over the rows of every expert, (E, ...)."""
    return torch.ops.analogfx.expert_sums.default(v, offsets)


def _once(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the product of a layer of experts has no second derivative")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """A context that keeps nothing."""


# ------------------------------------------------------------------------------- the product


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, offsets = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, offsets)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    op = torch.ops.analogfx
    grad_x, grad_w = op.expert_mvm_backward.default(grad, x, weight, offsets)
    grad_bias = sums_of(grad, offsets) if ctx.has_bias else None
    return grad_x, grad_w, grad_bias, None


define(
    "expert_mvm_backward",
    "Tensor grad, Tensor x, Tensor w, Tensor offsets",
    "(Tensor, Tensor)",
    experts.mvm_backward,
    lambda grad, x, w, offsets: (x.new_empty(x.shape), w.new_empty(w.shape)),
    _nothing,
    _once,
)
define(
    "expert_sums",
    "Tensor v, Tensor offsets",
    "Tensor",
    experts.sum_of_rows,
    lambda v, offsets: v.new_empty((offsets.shape[0], *v.shape[1:])),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: (rows_of(grad, ctx.saved_tensors[1], ctx.saved_tensors[0]), None),
)
define(
    "expert_rows",
    "Tensor v, Tensor offsets, Tensor like",
    "Tensor",
    lambda v, offsets, like: experts.by_row(v, offsets, like.shape[0]),
    lambda v, offsets, like: v.new_empty((like.shape[0], *v.shape[1:])),
    lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    lambda ctx, grad: (sums_of(grad, *ctx.saved_tensors), None, None),
)
define(
    "digital_experts",
    "Tensor x, Tensor weight, Tensor? bias, Tensor offsets",
    "Tensor",
    experts.product,
    lambda x, weight, bias, offsets: x.new_empty(experts.out_shape(x, weight)),
    _product_setup,
    _product_backward,
)

# ---------------------------------------------------------------------------- the roles of tiles

_DAC = ROLES["dac"]


def _dac_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, input_range, offsets, *ctx.settings = inputs
    ctx.save_for_backward(x, input_range, offsets)


def _dac_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.analogfx.expert_dac_backward.default
    gradients = op(grad, *ctx.saved_tensors, *ctx.settings)
    wanted = (g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, *(None for _ in ctx.settings))


define(
    "expert_dac_backward",
    f"Tensor grad, Tensor x, Tensor input_range, Tensor offsets, {_DAC.schema}",
    "(Tensor, Tensor)",
    lambda grad, x, r, offsets, *settings: experts.dac_backward(
        grad, x, r, offsets, **dict(zip(_DAC.names, settings, strict=True))
    ),
    lambda grad, x, r, *_: (x.new_empty(x.shape), torch.empty_like(r)),
    _nothing,
    _once,
)
define(
    "expert_dac",
    f"Tensor x, Tensor input_range, Tensor offsets, {_DAC.schema}",
    "Tensor",
    lambda x, input_range, offsets, *settings: experts.dac(
        x, input_range, offsets, *settings[: len(_DAC.forward)]
    ),
    lambda x, *_: wide_like(x),
    _dac_setup,
    _dac_backward,
)


def _mvm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.analogfx.expert_mvm_backward.default(grad, *ctx.saved_tensors), None)


define(
    "expert_mvm",
    "Tensor x, Tensor w, Tensor offsets",
    "Tensor",
    experts.mvm,
    lambda x, w, offsets: wide_like(x, experts.out_shape(x, w)),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    _mvm_backward,
)
define(
    "expert_weight_normal",
    "Tensor w, Tensor seed, int stream",
    "Tensor",
    experts.weight_normal,
    lambda w, seed, stream: wide_like(w),
)
define(
    "expert_output_normal",
    "Tensor y, Tensor seed, int stream, Tensor offsets",
    "Tensor",
    experts.output_normal,
    lambda y, seed, stream, offsets: wide_like(y),
    _nothing,
    lambda ctx, grad: (None,) * 4,  # y gives the shape alone
)
