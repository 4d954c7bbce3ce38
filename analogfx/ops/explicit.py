"""The explicit level: an op for every role of a tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import experts, linear
from analogfx.kernels import reference as ref
from analogfx.kernels.spec import ROLES
from analogfx.ops.define import define, wide_like


def straight_through(role: str, tensors: int) -> tuple[Any, Any]:
    """The derivative of an op that hands its gradient on to the first of its tensors."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    others = (None,) * (tensors - 1 + len(ROLES[role].names))
    return setup, lambda ctx, grad: (grad.to(ctx.dtype), *others)


def _dac_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, input_range, *settings = inputs
    ctx.settings = dict(zip(ROLES["dac"].names, settings, strict=True))
    ctx.save_for_backward(x, input_range)


def _dac_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, input_range = ctx.saved_tensors
    of = ctx.settings
    rest = (None for _ in of)
    if of["range_mode"] == "dynamic":
        return grad.to(x.dtype), None, *rest
    grad_range = None
    if ctx.needs_input_grad[1]:
        if of["range_mode"] == "fast":
            grad_range = ref.range_grad_fast(grad, x, input_range)
        else:
            grad_range = ref.range_grad_static(
                grad, x, input_range, *(of[name] for name in ROLES["dac"].backward)
            )
    return (grad * ref.inside(x, input_range)).to(x.dtype), grad_range, *rest


define(
    "dac",
    f"Tensor x, Tensor input_range, {ROLES['dac'].schema}",
    "Tensor",
    lambda x, input_range, *settings: ref.dac(
        x, input_range, *settings[: len(ROLES["dac"].forward)]
    ),
    lambda x, *_: wide_like(x),
    _dac_setup,
    _dac_backward,
)

define(
    "row_max",
    "Tensor w",
    "Tensor",
    lambda w: ref.row_max(w),
    lambda w: wide_like(w, w.shape[:-1]),
)

define(
    "tile_max",
    "Tensor row_max, int[] out_sizes",
    "Tensor",
    lambda row, out_sizes: ref.tile_max(row, out_sizes).clone(),
    lambda row, out_sizes: torch.empty_like(row),
)

define(
    "quantize_weight",
    f"Tensor w, Tensor bound, {ROLES['quantize'].schema}",
    "Tensor",
    lambda w, bound, *settings: ref.quantize_weight(w, bound.unsqueeze(-1), *settings),
    lambda w, *_: wide_like(w),
    *straight_through("quantize", 2),
)


_CLIP = ROLES["clip"]


def _clip_weight(w: Tensor, clip: Tensor, *settings: Any) -> Tensor:
    return ref.clip_weight(w, clip.unsqueeze(-1), *settings[: len(_CLIP.forward)])


def _clip_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, clip, *settings = inputs
    ctx.count, ctx.experts = len(settings), settings[len(_CLIP.names) :]
    ctx.settings = dict(zip(_CLIP.names, settings, strict=False))
    ctx.save_for_backward(w, clip)


def _clip_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, clip = ctx.saved_tensors
    grad_w, grad_clip = ref.weight_backward(grad, w, clip, ctx.settings["weight_states"])
    for count in ctx.experts:
        grad_clip = grad_clip * experts.shared_factor(count)
    return (grad_w.to(w.dtype), grad_clip.to(clip.dtype), *(None for _ in range(ctx.count)))


define(
    "clip_weight",
    f"Tensor w, Tensor clip, {_CLIP.schema}, int experts=1",
    "Tensor",
    _clip_weight,
    lambda w, *_: wide_like(w),
    _clip_weight_setup,
    _clip_weight_backward,
)

define(
    "weight_noise",
    f"Tensor w, Tensor a, Tensor normal, {ROLES['weight_noise'].schema}",
    "Tensor",
    lambda w, a, normal, *settings: (
        normal * ref.weight_sigma(a, *settings).unsqueeze(-1) + ref.wide(w)
    ),
    lambda w, *_: wide_like(w),
    *straight_through("weight_noise", 3),
)


def _rows(x: Tensor, w: Tensor) -> Tensor:
    """(..., I) or (..., groups, I) as (N, ...)."""
    return ref.wide(x).reshape(-1, *x.shape[1 - w.dim() :])


def _mvm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mvm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    flat_x, flat_g = _rows(x, w), grad.reshape(-1, *w.shape[:-1])
    grad_x = linear.product(flat_g, ref.wide(w).mT).view(x.shape)
    return grad_x.to(x.dtype), linear.outer(flat_g, flat_x).to(w.dtype)


def _mvm(x: Tensor, w: Tensor) -> Tensor:
    y = linear.product(_rows(x, w), ref.wide(w))
    return y.reshape(*x.shape[: 1 - w.dim()], *w.shape[:-1]).contiguous()


define(
    "mvm",
    "Tensor x, Tensor w",
    "Tensor",
    _mvm,
    lambda x, w: wide_like(x, (*x.shape[: 1 - w.dim()], *w.shape[:-1])),
    _mvm_setup,
    _mvm_backward,
)

define(
    "output_noise",
    f"Tensor y, Tensor a, Tensor input_range, Tensor normal, {ROLES['output_noise'].schema}",
    "Tensor",
    ref.output_noise,
    lambda y, *_: wide_like(y),
    *straight_through("output_noise", 4),
)


def _adc(y: Tensor, a: Tensor, input_range: Tensor, *settings: float) -> Tensor:
    return ref.clamp_to(*ref.adc_(y.clone(), a, input_range, *settings))


def _adc_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, a, input_range, *ctx.settings = inputs
    ctx.save_for_backward(y, a, input_range)


def _adc_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, a, input_range = ctx.saved_tensors
    z, bound = ref.adc_(y.clone(), a, input_range, *ctx.settings)
    passed = grad.masked_fill(z.abs() > bound, 0.0)
    return passed, None, None, *(None for _ in ctx.settings)


define(
    "adc",
    f"Tensor y, Tensor a, Tensor input_range, {ROLES['adc'].schema}",
    "Tensor",
    _adc,
    lambda y, *_: wide_like(y),
    _adc_setup,
    _adc_backward,
)
