"""What ``torch.func`` and ``torch.vmap`` must be told of ops that differentiate or draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.library import Library


def differentiable(
    op: OpOverload, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An op's kernel for autograd that ``torch.func`` can differentiate, too.

    ``torch.library.register_autograd`` makes one that ``torch.func`` refuses. It meets this one
    inside one of its levels, where an autograd function is an ordinary one, and says so.

    Args:
        setup: notes on a context what the backward needs, ``(ctx, inputs, output)``.
        backward: the gradients of all arguments, None for those without.
    """

    def below(*args: Any) -> Any:
        *inputs, keys = args
        # Levels of torch.func further out have derivatives of their own, which stay on.
        outer = torch._C._are_functorch_transforms_active()
        with (
            torch.set_grad_enabled(outer),
            forward_ad._set_fwd_grad_enabled(outer),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    made = {
        "forward": staticmethod(below),
        "setup_context": staticmethod(lambda ctx, inputs, output: setup(ctx, inputs[:-1], output)),
        "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
    }
    function: Any = type(op._opname, (torch.autograd.Function,), made)

    def kernel(keys: DispatchKeySet, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        _refuse_tangents(op, tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            # Function.apply would ask torch.func, whose levels have had their turn above this key.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*args, keys)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return kernel


def _refuse_tangents(op: OpOverload, tensors: list[Tensor]) -> None:
    """Refuse forward-mode differentiation, which would go on with zeros.

    Raises:
        NotImplementedError: a tensor has a tangent.
    """
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op}: analog products have no forward-mode derivative (jvp, jacfwd, hessian): "
            "use grad, vjp or jacrev"
        )


def draws_by_sample(op: OpOverload, library: Library) -> None:
    """Let ``torch.vmap`` draw as its ``randomness`` says, where it maps the op's one argument."""

    def rule(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int | None]:
        if info.randomness == "error":
            raise RuntimeError(
                'vmap: noise was drawn under randomness="error": ask for "different" or "same", '
                "or call eval(), where there is no noise"
            )
        if info.randomness == "same":
            return op(x.select(in_dims[0], 0)), None
        return torch.stack([op(sample) for sample in x.unbind(in_dims[0])]), 0

    torch.library.register_vmap(op, rule, lib=library)


def in_transform() -> bool:
    """Whether ``torch.func`` or ``torch.vmap`` runs what is running, and no compiler traces it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
