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
from analogfx.passes.sites import RESIDUAL, fence_between, prepared_sites, spec_of

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
    return sum(_absorb(graph, node, context) for node in prepared_sites(graph))


def _absorb(graph: Graph, node: Node, context: Context) -> int:
    count = 0
    while len(node.users) == 1 and node.args[RESIDUAL] is None:  # nothing follows a residual
        (user,) = node.users
        spec, activation, residual = spec_of(node), _activation(user), _addend(user, node)
        if not (activation and not spec.activation) and residual is None:
            break
        fence = fence_between(node, user)
        if fence is not None:
            context.note("epilogue", user, f"{fence.name} stands between")
            break
        if residual is not None:
            node.update_arg(RESIDUAL, residual)
        else:
            node.update_arg(len(node.args) - 1, encode(spec._replace(activation=activation)))
        user.prepend(node)  # a residual may be computed after the product
        user.replace_all_uses_with(node)
        graph.erase_node(user)
        count += 1
    return count


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
