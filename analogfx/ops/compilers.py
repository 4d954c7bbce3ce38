"""What torch's compilers must be told of ops that draw or count: never merge, reorder or repeat."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.library import EffectType, Library  # type: ignore[attr-defined]
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

from analogfx import versions

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
        if versions.there(versions.UNBOXED):
            return ir.TensorBox.create(result)
        return result.wrap_for_lowering()

    lowering.register_lowering(op, type_promotion_kind=None)(lower)
