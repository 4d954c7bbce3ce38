"""What a chip holds: ``held_linear``, ``held_conv`` and ``held_experts``, for inference alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import conv, held
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.ops.define import define

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? input_range, Tensor? peaks, Tensor? gain, "
    "Tensor? variance, Tensor? deviation, Tensor? seed, "
)


def _linear(*args: Any) -> Tensor:
    *tensors, text = args
    return held.linear(*(*tensors, decode(MVMSpec, text)))


def _experts(*args: Any) -> Tensor:
    *tensors, text = args
    return held.experts(*(*tensors, decode(MVMSpec, text)))


def _conv(*args: Any) -> Tensor:
    *tensors, window, text = args
    return held.conv(*(*tensors, decode(Window, window), decode(MVMSpec, text)))


def next_seed(calls: Tensor | None) -> Tensor | None:
    """The seed of one more product, which raises the count of all; None where none draws."""
    return None if calls is None else calls.add_(1)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("a programmed chip has no gradient: leave device.at() to train the model")


define(
    "held_linear",
    _INPUTS + "str spec",
    "Tensor",
    _linear,
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    lambda ctx, inputs, output: None,
    _no_gradient,
)

define(
    "held_experts",
    _INPUTS + "Tensor offsets, str spec",
    "Tensor",
    _experts,
    lambda x, weight, *rest: x.new_empty((x.shape[0], weight.shape[0] // rest[-2].shape[0])),
    lambda ctx, inputs, output: None,
    _no_gradient,
)


def _fake_conv(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    window, spec = decode(Window, rest[-2]), decode(MVMSpec, rest[-1])
    return conv.laid_out(x.new_empty(conv.out_shape(x, weight, window, spec)), x)


define(
    "held_conv",
    _INPUTS + "str window, str spec",
    "Tensor",
    _conv,
    _fake_conv,
    lambda ctx, inputs, output: None,
    _no_gradient,
)

IMPLEMENTATIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.analogfx.held_linear.default: _linear,
    torch.ops.analogfx.held_experts.default: _experts,
    torch.ops.analogfx.held_conv.default: _conv,
}
"""What computes each op, for whoever watches the steps of a product."""
