"""Values that depend on weights alone, which can be kept from call to call.

They carry ``meta["frozen"]`` and come first in the graph; whoever runs it keeps their values until
a weight changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node


def is_frozen(node: Node) -> bool:
    """Whether a value depends on weights alone and is the same at every call."""
    if "stationary" not in node.meta or node.meta.get("written"):
        return False
    if node.op not in ("call_function", "call_method"):
        return node.op in ("placeholder", "get_attr")
    return not _is_random(node) and all(is_frozen(n) for n in node.all_input_nodes)


def _is_random(node: Node) -> bool:
    """Whether a call draws random numbers, as ATen's own tags say."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = (getattr(packet, o) for o in packet.overloads())
    return any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads)


def keep(graph: Graph, node: Any) -> None:
    """Mark a value, and all that it is computed from, as one to keep; move it to the front."""
    if not isinstance(node, Node) or node.op == "placeholder" or node.meta.get("frozen"):
        return
    for source in node.all_input_nodes:
        keep(graph, source)
    node.meta["frozen"] = True
    front = [n for n in graph.nodes if n.op == "placeholder" or n.meta.get("frozen")]
    last = [n for n in front if n is not node][-1]
    last.append(node)
