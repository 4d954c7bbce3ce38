"""The fused level: ``analog_linear``, ``analog_conv``, ``analog_experts``, a whole site each.

What computes them is a row of the table in :mod:`analogfx.kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import conv, dispatch, experts, linear
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.ops.define import define, wide_like

# The scalars of a site travel as texts, see `analogfx.kernels.spec.encode`.
_KINDS: dict[str, dict[str, Any]] = {
    "linear": {"spec": MVMSpec},
    "conv": {"window": Window, "spec": MVMSpec},
    "experts": {"spec": MVMSpec},
}
_SHAPES: dict[str, Any] = {"linear": linear, "conv": conv, "experts": experts}
_OPERANDS = {"experts": "Tensor offsets, "}
"""What an op takes between the seed and its scalars."""

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? input_range, Tensor? clip, Tensor? seed, "
_BACKWARD_INPUTS = (
    "Tensor grad, Tensor x, Tensor weight, Tensor? input_range, Tensor? clip, Tensor? seed, "
    "Tensor clipped, Tensor modified, bool[] needs, "
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *state = inputs[:6]
    ctx.texts = [text for text in inputs[6:] if isinstance(text, str)]
    ctx.others = len(inputs) - 5
    operands = inputs[6 : len(inputs) - len(ctx.texts)]
    _, clipped, modified = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(clipped, modified)
    ctx.save_for_backward(x, weight, *state, clipped, modified, *operands)


def _fused_backward(
    op: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * ctx.others  # the seed and what comes after it
        needs = list(ctx.needs_input_grad[:5])
        if grad is None:
            return (None,) * 5 + nothing
        saved = ctx.saved_tensors
        gradients = op(grad, *saved[:7], needs, *saved[7:], *ctx.texts)
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (*wanted, *nothing)

    return backward


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "analog products have no second derivative: a gradient of a gradient needs the digital "
        "model, see to_digital()"
    )


def _fake_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    *texts: Any,
) -> tuple[Tensor, ...]:
    experts = not isinstance(texts[0], str)  # whose offsets come first
    bias = weight.new_empty(weight.shape[: 2 if experts else 1])
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip((x, weight, bias, input_range, clip), needs, strict=True)
    )


def _define_site(op: str) -> None:
    """Define ``analog_<op>`` and its backward."""
    kinds, shapes = _KINDS[op], _SHAPES[op]

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of an op with its texts decoded."""
        texts = zip(kinds.values(), args[-len(kinds) :], strict=True)
        return (*args[: -len(kinds)], *(decode(kind, text) for kind, text in texts))

    def fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        scalars = split(rest)[4:]
        y = x.new_empty(shapes.out_shape(x, weight, *scalars))
        clipped_shape = dispatch.clipped_shape(op, x, weight, *scalars)
        clipped = x.new_empty(clipped_shape, dtype=torch.uint8)
        if linear.is_kept(clipped):
            clipped = shapes.laid_out(clipped, x)
        keeps = dispatch.keeps_weight(op, x, weight, *scalars)
        kept = wide_like(weight) if keeps else weight.new_empty(0)
        return shapes.laid_out(y, x), clipped, kept

    def fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        of_x, of_weight, *others = _fake_gradients(grad, x, weight, *rest)
        return (
            shapes.laid_out(of_x, x) if linear.is_kept(of_x) else of_x,
            shapes.laid_out(of_weight, weight) if linear.is_kept(of_weight) else of_weight,
            *others,
        )

    texts = _OPERANDS.get(op, "") + ", ".join(f"str {name}" for name in kinds)
    define(
        f"analog_{op}_backward",
        _BACKWARD_INPUTS + texts,
        _GRADIENTS,
        lambda *args: dispatch.backward(op, *split(args)),
        fake_backward,
        lambda ctx, inputs, output: None,
        _no_second_derivative,
    )
    define(
        f"analog_{op}",
        _INPUTS + texts,
        "(Tensor, Tensor, Tensor)",
        lambda *args: dispatch.forward(op, *split(args)),
        fake,
        _fused_setup,
        _fused_backward(getattr(torch.ops.analogfx, f"analog_{op}_backward").default),
    )


for _op in _KINDS:
    _define_site(_op)
