"""The chain of nodes that stands for one site at the explicit level.

Every node of a chain carries ``meta["made"] = (site's index, role)``. ``insert`` writes a chain,
``map_tiles`` copies it for every tile, ``lower`` reads it: they meet here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.passes.contract import Context, Site, keep_origin

dialect = torch.ops.analogfx

# Nodes that every tile has its own of; the rest of a site is computed once.
PER_TILE = {
    "tile", "tile_range", "dac", "tile_clip", "row_max", "tile_max", "clip", "quantize",
    "weight_noise", "mvm", "output_normal", "output_noise", "adc",
}  # fmt: skip


def made_for(graph: Graph, site: Site) -> list[Node]:
    """The nodes of one site, in order."""
    return [n for n in graph.nodes if n.meta.get("made", (None,))[0] == site.index]


def of_role(graph: Graph, wanted: str) -> list[Node]:
    """The nodes of all sites that have a role, in order: one for each tile, or one for each site.

    Args:
        wanted: ``"dac"``, ``"mvm"``, ``"adc"``, ``"output"``, ...: the name that a node bears in
            the graphs that ``debug_dir`` writes.

    Example:
        >>> def half(graph, context):  # halves what every tile gives
        ...     for node in of_role(graph, "mvm"):
        ...         insert_after(node, torch.mul, 0.5)
        ...     return len(of_role(graph, "mvm"))
    """
    return [n for n in graph.nodes if n.meta.get("made", (None, None))[1] == wanted]


def insert_after(node: Node, function: Any, *args: Any) -> Node:
    """Put ``function(node, *args)`` in a node's place.

    Returns:
        The new node, which everything that read the old one reads now.
    """
    with node.graph.inserting_after(node):
        made = node.graph.call_function(function, (node, *args))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def role(node: Node) -> str:
    """What a node of a site is for."""
    return node.meta["made"][1]


class Emitter:
    """Adds nodes for one site and notes on each which site it belongs to and its role."""

    def __init__(self, graph: Graph, site: Site, context: Context) -> None:
        """Emit at the graph's present insertion point."""
        self.graph = graph
        self.site = site
        self.context = context

    def _made(self, node: Node, role: str) -> Node:
        node.meta["made"] = (self.site.index, role)
        keep_origin(node, self.site.product)
        return node

    def call(self, role: str, target: Any, *args: Any) -> Node:
        """A call of a function."""
        return self._made(self.graph.call_function(target, args), role)

    def method(self, role: str, name: str, *args: Any) -> Node:
        """A call of a tensor method."""
        return self._made(self.graph.call_method(name, args), role)

    def attribute(self, role: str, name: str) -> Any:
        """An attribute of the module, as whoever captured the graph brings it in."""
        value = self.context.attribute(self.graph, self.site, name)
        # An input that holds state belongs to every site that shares it.
        ours = isinstance(value, Node) and value.op == "get_attr"
        return self._made(value, role) if ours else value

    def path(self, role: str) -> Any:
        """The path of the site's module, for messages."""
        value = self.context.path(self.graph, self.site)
        return self._made(value, role) if isinstance(value, Node) else value
