"""Checkpointed blocks as part of the graph around them, where every pass sees what is in them.

Dynamo keeps such a block in a graph of its own, inside one op. Here its nodes take the op's place
and carry the notes that the op would give them: AOT autograd saves nothing of the block and
computes it again in the backward.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from analogfx.ops.compilers import KEPT

_numbers = itertools.count()


def inline_checkpoints(module: GraphModule) -> int:
    """Put the nodes of checkpointed blocks where the blocks are called.

    A block that chooses by ``context_fn`` what to save stays as it is where gradients are on.

    Returns:
        The number of blocks.
    """
    count = 0
    while blocks := [*_blocks(module)]:  # those inside of others come next
        for node in blocks:
            _inline(module, node)
        count += len(blocks)
    return count


def _blocks(module: GraphModule) -> Iterable[Node]:
    for node in module.graph.find_nodes(op="call_function", target=tag_activation_checkpoint):
        chooses = "_checkpoint_context_fn" in _body(module, node).meta
        if not (chooses and torch.is_grad_enabled()):
            yield node


def _body(module: GraphModule, node: Node) -> GraphModule:
    attribute: Any = node.args[0]
    return module.get_submodule(attribute.target)  # type: ignore[return-value]


def _inline(module: GraphModule, node: Node) -> None:
    graph, body = module.graph, _body(module, node)
    inputs = body.graph.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(inputs, node.args[1:], strict=True))
    outside = {*graph.nodes}
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(body.graph, copies)
    number = next(_numbers)
    for made in [n for n in graph.nodes if n not in outside]:
        if made.target is operator.getitem and not made.users:
            graph.erase_node(made)  # Dynamo takes apart whatever has several results
            continue
        if made.op == "get_attr":
            made.target = _moved(module, body, str(made.target))
        made.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        made.meta["ac_graph_id"] = number
    for user in [*node.users]:
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    attribute: Any = node.args[0]
    graph.erase_node(node)
    if not attribute.users:
        graph.erase_node(attribute)


def _moved(module: GraphModule, body: GraphModule, name: str) -> str:
    """A new name for an attribute of a block, of the module around it."""
    new = f"inlined_{next(_numbers)}"
    setattr(module, new, operator.attrgetter(name)(body))
    return new


def keep_results(module: GraphModule) -> None:
    """Let what draws or counts in checkpointed blocks run once: the backward gets its results."""
    for node in module.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else node
        if "recompute" in node.meta and source.target in KEPT:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
