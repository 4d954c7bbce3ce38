"""What torch's compilers must be told of ops that draw or count: never merge, reorder or repeat."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.library import EffectType, Library  # type: ignore[attr-defined]
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

KEPT: set[OpOverload] = set()
"""Ops whose results a compiled checkpoint saves, see :func:`keep_result`."""


def keep_in_order(op: OpOverload, library: Library) -> None:
    """Give an op an effect: like calls stay apart, and all calls in the program's order."""
    torch.library._register_effectful_op(op, EffectType.ORDERED, lib=library)


def keep_result(op: OpOverload, library: Library) -> None:
    """Let compiled activation checkpoints save what an op returned, and never run it again.

    Eager ones restore the generator and ask :func:`analogfx.kernels.statistics.in_backward`; a
    compiled backward would draw anew, and read ranges that its own forward has replaced.
    """

    def rule(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracing = get_proxy_mode()
        before = len(tracing.tracer.graph.nodes) if tracing is not None else 0
        out = mode.__torch_dispatch__(func, types, args, kwargs)
        if tracing is not None:
            nodes = tracing.tracer.graph.nodes
            for node in itertools.islice(reversed(nodes), len(nodes) - before):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return out

    torch.library.register_torch_dispatch(op, _CachingTorchDispatchMode, rule, lib=library)
    KEPT.add(op)


def order_in_inductor(op: OpOverload) -> None:
    """Chain the calls of an op with an effect in the graphs that Inductor schedules.

    Inductor notes the order of effects under the names of buffers and looks it up under those of
    operations, so it is free to draw the seeds of parallel branches in any order. To be called
    while a graph is traced: Inductor is loaded by then if it is the one to run it.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or op in lowering.lowerings:
        return
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def lower(*args: Any) -> Any:
        graph = V.graph
        first = len(graph.operations)
        result = ir.FallbackKernel.create(op, *args)
        kernel: Any = graph.operations[first]
        previous = graph.__dict__.get("_analogfx_last_draw")
        if previous is not None:
            graph.additional_star_deps[kernel.get_operation_name()].add(previous.get_name())
        graph.__dict__["_analogfx_last_draw"] = kernel
        return result.wrap_for_lowering()

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


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
