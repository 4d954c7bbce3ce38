"""expand: a call that hides products becomes the products that it hides, and the rest.

A rule is a function of the call's arguments, with proxies for what the graph computes. It computes
the same with the calls that ``normalize`` knows, or returns None for arguments that it leaves to
torch. Rules stand in a file for every family of functions, in a table by the function called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from analogfx.passes import attention, cells, recurrent
from analogfx.passes.contract import Context, keep_origin

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {**attention.RULES, **cells.RULES, **recurrent.RULES}
"""What computes the same as a function, by the function."""


class RuleTracer(GraphAppendingTracer):
    """Adds what a rule computes to a graph, and has the context for rules that ask it."""

    def __init__(self, graph: Graph, context: Context) -> None:
        super().__init__(graph)
        self.context = context


def expand(graph: Graph, context: Context) -> int:
    """Replace calls that hide products.

    Returns:
        The number of calls replaced.
    """
    count = 0
    tracer = RuleTracer(graph, context)
    for target, rule in RULES.items():
        for node in graph.find_nodes(op="call_function", target=target):
            args, kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda a: Proxy(a, tracer) if isinstance(a, Node) else a,  # type: ignore
            )
            before = node.prev
            with graph.inserting_before(node):
                out = rule(*args, **kwargs)
            if out is None:
                continue
            _note_origin(node, before)
            node.replace_all_uses_with(out.node)
            graph.erase_node(node)
            count += 1
    return count


def _note_origin(call: Node, before: Node) -> None:
    """Note on what stands for a call where it comes from.

    Each product belongs to the module that holds its weight, on all ways to compute it.
    """
    made = call.prev
    while made is not before:
        keep_origin(made, call)
        made.meta["from_fused"] = True
        made = made.prev
