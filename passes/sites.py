"""Fused sites as the whole-graph passes find them: by their op, whoever put it there."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node

from analogfx import ops
from analogfx.kernels import patches, prepared
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.passes.contract import Context
from analogfx.passes.stationary import writes

_LINEAR = torch.ops.analogfx.analog_linear.default
_CONV = torch.ops.analogfx.analog_conv.default
_OPS: dict[Any, str] = {
    _LINEAR: "linear",
    _CONV: "conv",
    torch.ops.analogfx.analog_experts.default: "experts",
}

# Positions in the arguments of the prepared products.
X, WEIGHT, ADC, BIAS, RESIDUAL, RANGE, ANALOG_X = range(7)


@dataclass(frozen=True)
class FusedSite:
    """One call of a fused op, and the only one of its results that the model uses."""

    node: Node
    y: Node
    spec: MVMSpec

    @property
    def op(self) -> str:
        """What it computes: "linear", "conv" or "experts"."""
        return _OPS[self.node.target]

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.op == "conv"


def fused_sites(graph: Graph) -> Iterator[FusedSite]:
    """Every site that ``lower`` fused, in order."""
    for node in list(graph.nodes):
        if node.target in _OPS:
            results = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
            if len(results) == len(node.users) == 1:
                yield FusedSite(node, results[0], spec_of(node))


def prepared_sites(graph: Graph) -> list[Node]:
    """Every site that ``freeze`` prepared, in order."""
    return [n for n in graph.nodes if n.target in (prepared.linear, prepared.conv)]


def note_not_prepared(graph: Graph, context: Context, decided_by: str) -> None:
    """Say of every fused site that a pass over prepared ones has nothing to do with it."""
    for site in fused_sites(graph):
        context.note(decided_by, site.node, "its weights are not prepared: see freeze")


def spec_of(node: Node) -> MVMSpec:
    """The scalars of a fused or prepared site: its last argument."""
    text: Any = node.args[-1]
    return decode(MVMSpec, text)


def raw_input(x: Any) -> Any:
    """A site's input before the casts and checks that every site adds for itself."""
    while isinstance(x, Node) and x.target in (ops.autocast, ops.checked):
        x = x.args[0]
    return x


_RESHAPES = {
    "reshape", "flatten", "unflatten", "contiguous", "transpose", "permute", "unsqueeze", "squeeze",
    torch.flatten, torch.reshape, torch.transpose, torch.permute, patches.with_batch,
}  # fmt: skip


def is_reshape(node: Node) -> bool:
    """Whether a call gives the same numbers in another shape, and not their bits otherwise."""
    if node.target == "view":
        return not any(isinstance(a, torch.dtype) for a in node.args)
    return node.target in _RESHAPES


def fence_between(first: Node, last: Node) -> str:
    """What keeps a node from moving past those between it and another; empty if nothing does.

    That is a write in place, a change of mode, or an op that runs a graph of its own.
    """
    node = first.next
    while node is not last and node.op != "root":
        if writes(node) or switches_mode(node) or isinstance(node.target, HigherOrderOperator):
            return f"{node.name} stands between"
        node = node.next
    return ""


def switches_mode(node: Node) -> bool:
    """Whether a call switches autocast or gradients, for the nodes after it."""
    return node.target in _SWITCHES


_SWITCHES = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
}
