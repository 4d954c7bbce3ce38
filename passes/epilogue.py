"""epilogue: activation and residual become the last step of the site whose output they take."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from analogfx.kernels.spec import encode
from analogfx.passes.contract import Context
from analogfx.passes.sites import (
    RESIDUAL,
    fence_between,
    note_not_prepared,
    prepared_sites,
    spec_of,
)

_SUMS = {operator.add, torch.add, "add"}
_SUMS_IN_PLACE = {operator.iadd, "add_"}
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.gelu: "gelu", F.silu: "silu",
}  # fmt: skip


def epilogue(graph: Graph, context: Context) -> int:
    """Take what follows every prepared site into it.

    Returns:
        The number of nodes taken in.
    """
    note_not_prepared(graph, context, "epilogue")
    return sum(_absorb(graph, node, context) for node in prepared_sites(graph))


def _absorb(graph: Graph, node: Node, context: Context) -> int:
    count = 0
    while node.args[RESIDUAL] is None:  # nothing follows a residual
        reason = _objection(node)
        if reason:
            if not count:
                context.note("epilogue", node, reason)
            break
        (user,) = node.users
        residual = _addend(user, node)
        if residual is not None:
            node.update_arg(RESIDUAL, residual)
        else:
            last = encode(spec_of(node)._replace(activation=_activation(user)))
            node.update_arg(len(node.args) - 1, last)
        user.prepend(node)  # a residual may be computed after the product
        user.replace_all_uses_with(node)
        graph.erase_node(user)
        count += 1
    return count


def _objection(node: Node) -> str:
    """Why what follows a site is not its last step; empty if it is."""
    if len(node.users) != 1:
        return f"{len(node.users)} nodes read its output"
    (user,) = node.users
    if user.op == "output":
        return "nothing follows"
    if user.target is torch.split:
        return "several sites are joined in it, and its output is split"
    taken = _activation(user) and not spec_of(node).activation
    if not taken and _addend(user, node) is None:
        name = user.target if isinstance(user.target, str) else user.target.__name__
        return f"{name} follows, which is no activation or residual that sites know"
    return fence_between(node, user)


def _activation(node: Node) -> str:
    """The name of an activation, empty for anything else."""
    if set(node.kwargs) <= {"inplace"} and len(node.args) == 1:
        return _ACTIVATIONS.get(node.target, "")
    if node.target is F.gelu and len(node.args) == 1:
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(str(node.kwargs.get("approximate")), "")
    return ""


def _addend(node: Node, product: Node) -> Node | None:
    """What a sum adds to a product, None for anything but a plain sum of two tensors."""
    if node.target not in _SUMS | _SUMS_IN_PLACE or node.kwargs or len(node.args) != 2:
        return None
    others = [a for a in node.args if a is not product]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    # A sum in place keeps the dtype of what it writes to, and others may see what it writes to.
    if node.target in _SUMS_IN_PLACE and not (node.args[0] is product and _same_dtype(node)):
        return None
    return others[0]


def _same_dtype(node: Node) -> bool:
    """Whether a call's arguments are tensors that are known to have the dtype of its result."""
    values: list[Any] = [n.meta.get("example_value") for n in (node, *node.all_input_nodes[1:])]
    return all(isinstance(v, Tensor) and v.dtype == values[0].dtype for v in values)
