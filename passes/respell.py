"""respell: products in forms that are seldom written, in those that ``normalize`` knows.

A rule gets the call's arguments and returns the node that stands for it, or None for a call that
is written in a known form already. Rules stand in a file for every family of forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.passes import bilinear, contractions, einsum_terms, transposed
from analogfx.passes.contract import Context, Refused, keep_origin, refuse, sweep
from analogfx.passes.stationary import propagate_stationary, weight_value

Rule = Callable[..., Node | None]

RULES: dict[Any, tuple[str, Rule]] = {
    **bilinear.RULES,
    **contractions.RULES,
    **einsum_terms.RULES,
    **transposed.RULES,
}
"""How a function or method is respelled, and what reports call it."""

_ATEN: dict[str, Any] = {
    "linear": F.linear,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "convolution": torch.convolution,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
    **{
        name: getattr(torch, name)
        for name in (
            "matmul", "mm", "bmm", "mv", "dot", "addmm", "addmv", "addbmm", "baddbmm", "einsum",
            "tensordot", "inner", "bilinear",
        )
    },
}  # fmt: skip
"""The function for an op of torch.ops.aten, by the op's name."""


def respell(graph: Graph, context: Context) -> int:
    """Rewrite products with a parameter that are spelled in other ways than most.

    Returns:
        The number of products rewritten.
    """
    propagate_stationary(graph)
    count = 0
    for node in list(graph.nodes):
        target = _function(node)
        operands = [contractions.unexpanded(n) or n for n in node.all_input_nodes]
        weights = [n for n in operands if weight_value(n) is not None]
        if target is None or not weights or {"stationary", "decision"} & node.meta.keys():
            continue
        kind, rule = RULES.get(target, (str(getattr(target, "__name__", target)), _as_it_is))
        before = node.prev
        try:
            with graph.inserting_before(node):
                new = _apply(rule, graph, node)
                if new is None and target is not node.target:
                    new = graph.call_function(target, node.args, _renamed(node))
        except Refused as reason:
            refuse(node, kind, str(reason), "respell")
            continue
        if new is None:
            continue
        _note_origin(node, before, kind)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    if count:
        propagate_stationary(graph)
        sweep(graph)
    return count


def _function(node: Node) -> Any:
    """What a node calls, as the tables name it; None for what is in none of them."""
    if node.op not in ("call_function", "call_method"):
        return None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target._overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, _, name = target._qualified_op_name.partition("::")
        return _ATEN.get(name) if space == "aten" else None
    return target if target in RULES else None


def _as_it_is(*_: Any, **__: Any) -> None:
    """The rule of a form that ``normalize`` knows."""


def _renamed(node: Node) -> dict[str, Any]:
    """The keyword arguments of an op by the names that functions have for them."""
    return {"input" if k == "self" else k: v for k, v in node.kwargs.items()}


def _apply(rule: Rule, graph: Graph, node: Node) -> Node | None:
    try:
        return rule(graph, *node.args, **_renamed(node))
    except TypeError as error:
        raise Refused(f"called with arguments that it does not take ({error})") from None


def _note_origin(node: Node, before: Node, kind: str) -> None:
    """Note on what stands for a product where it comes from, and how it was spelled."""
    made = node.prev
    while made is not before:
        keep_origin(made, node)
        made.meta["spelled"] = kind
        made = made.prev
