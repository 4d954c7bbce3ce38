"""A site called without torch's dispatcher, where nothing but its numbers is asked for.

The way of an op through the dispatcher costs a small layer more than its arithmetic. It is there
for those who watch, cast, trace or transform ops; where none of them is at work in a thread, the
kernels can be called as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.autograd import forward_ad

from analogfx.kernels import dispatch, noise, small
from analogfx.kernels.small import Small
from analogfx.kernels.spec import MVMSpec, encode

_DENSE = (Tensor, nn.Parameter)


def is_watched() -> bool:
    """Whether anything but the numbers of an op may be asked for in this thread."""
    return bool(
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or _autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


class _Product(torch.autograd.Function):
    """A product of :mod:`analogfx.kernels.small` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        value: float,
        seed: Tensor | None,
        scalars: Small,
    ) -> Tensor:
        y, *kept = small.forward(x, weight, bias, input_range, value, seed, scalars)
        ctx.save_for_backward(x, weight, seed, *kept)
        ctx.known = None if input_range is None else value, scalars
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seed, clipped, modified = ctx.saved_tensors
        value, scalars = ctx.known
        # As the forward used it: the parameter may be another by now.
        r = None if value is None else torch.tensor([value])
        needs = [*ctx.needs_input_grad[:4], False]
        found: Any
        if torch.is_grad_enabled() or type(grad) is not Tensor or is_watched():
            op = torch.ops.analogfx.analog_linear_backward.default
            found = op(
                grad, x, weight, r, None, seed, clipped, modified, needs, encode(scalars.spec)
            )
        else:
            found = small.backward(
                grad, x, weight, r, value, seed, clipped, modified, needs, scalars
            )
        of_x, of_weight, of_bias, of_range, _ = found
        need_x, need_weight, need_bias, need_range, _ = needs
        return (
            of_x if need_x else None,
            of_weight if need_weight else None,
            of_bias if need_bias else None,
            of_range if need_range else None,
            None,
            None,
            None,
        )


_apply: Any = super(torch.autograd.Function, _Product).apply
"""Without asking torch.func, which is not at work."""


def linear(
    spec: MVMSpec, init_from_data: int, chain: Callable[..., Tensor]
) -> Callable[..., Tensor] | None:
    """A linear site as one call; None for a site that :mod:`analogfx.kernels.small` does not serve.

    Args:
        init_from_data: batches that set the range in training, one each.
        chain: the site's ops, for every other call, of the same arguments behind a module.

    Returns:
        A function ``(x, weight, bias, input_range, count, *others)``; ``count`` is None where no
        batch sets the range.
    """
    scalars = small.made(spec)
    if scalars is None:
        return None
    noisy = bool(spec.noise_std)

    def analog_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        count: Tensor | None,
        *others: Any,
    ) -> Tensor:
        operands = x, weight, bias, input_range
        if not _are_plain(operands) or is_watched() or dispatch.asked == "triton":
            return chain(None, *operands, count, *others)
        value = 1.0 if input_range is None else input_range.item()
        follows = count is not None and count.item() < init_from_data
        if follows or not small.serves(x, weight, value, scalars):
            return chain(None, *operands, count, *others)
        seed = noise.draw_seed(x.device) if noisy else None
        if torch.is_grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (input_range is not None and input_range.requires_grad)
        ):
            y: Tensor = _apply(*operands, value, seed, scalars)
            return y
        return small.forward(*operands, value, seed, scalars)[0]

    return analog_linear


def _are_plain(operands: tuple[Any, ...]) -> bool:
    """Whether what there is of a product's operands are dense tensors of its own kernels."""
    for t in operands:
        if t is not None and not (
            type(t) in _DENSE
            and t.dtype is torch.float32
            and t.is_cpu
            and t.layout is torch.strided
            and not t.is_nested
        ):
            return False
    x, weight, *_ = operands
    return x.dim() > 0 and weight.dim() == 2 and bool(x.shape[-1] == weight.shape[1])
