"""delegate: a product that is what a child computes becomes a call of the child.

A module may multiply by the weight of a child that it never calls, as ``nn.MultiheadAttention``
does by that of its ``out_proj``. The child has a site for this product; there must be no other.
"""

from __future__ import annotations

from torch.fx import Graph

from analogfx.passes.contract import Context, is_canonical, sweep


def delegate(graph: Graph, context: Context) -> int:
    """Replace canonical products by calls of the children whose products they are.

    Returns:
        The number of products replaced.
    """
    count = 0
    for node in list(graph.nodes):
        child = context.child_of(node) if is_canonical(node) else None
        if child is None:
            continue
        with graph.inserting_before(node):
            call = graph.call_module(child, (node.args[0],))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        context.delegated.append(child)
        count += 1
    sweep(graph)
    return count
