"""map_tiles: the chain of one tile, copied for every tile that the weight is cut into.

Tiles along the inputs get a chain each, and their outputs are summed digitally. Tiles along the
outputs share the chain: they differ only in which rows a per-tile maximum is taken over, so they
live in the sizes of ``tile_max``.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.passes.chain import PER_TILE, made_for, role
from analogfx.passes.contract import Context, Site, keep_origin


def map_tiles(graph: Graph, context: Context) -> int:
    """Cut every site that does not fit one tile.

    Returns:
        The number of sites cut.
    """
    return sum(_cut(graph, site) for site in context.sites)


def _cut(graph: Graph, site: Site) -> bool:
    nodes = made_for(graph, site)
    chain = [n for n in nodes if role(n) in PER_TILE]
    products = [n for n in chain if role(n) == "mvm"]
    tile_maxima = [n for n in chain if role(n) == "tile_max"]
    outputs = list(site.out_sizes)
    fits = len(site.in_sizes) == len(products) and all(n.args[1] == outputs for n in tile_maxima)
    if fits or not products:
        return False
    for node in nodes:
        if role(node) == "update_range":
            node.update_arg(7, list(site.in_sizes))
    for node in tile_maxima:
        node.update_arg(1, outputs)
    if len(site.in_sizes) == 1:
        return True

    last = chain[-1]
    with graph.inserting_before(last.next):
        total, start = None, 0
        for tile, size in enumerate(site.in_sizes):
            y = _copy(graph, site, chain, tile, start, size)
            if total is None:
                total = y
            else:
                total = graph.call_function(operator.add, (total, y))
                total.meta["made"] = (site.index, "accumulate")
                keep_origin(total, site.product)
            start += size
    assert total is not None
    last.replace_all_uses_with(total, delete_user_cb=lambda user: user not in chain)
    for node in reversed(chain):
        if not node.users:
            graph.erase_node(node)
    return True


def _copy(graph: Graph, site: Site, chain: list[Node], tile: int, start: int, size: int) -> Node:
    """The chain once more, for one tile's slice of the inputs."""
    inside = set(chain)
    copies: dict[Node, Node] = {}

    def tiled(node: Node) -> Node:
        if node not in copies and node not in inside:
            copies[node] = _slice(graph, site, node, start, size)
        return copies[node]

    for node in chain:
        new = graph.node_copy(node, tiled)
        copies[node] = new
        if role(node) in ("tile_range", "tile_clip") and node.target is torch.select:
            new.update_arg(2, tile)
        elif role(node) == "output_normal":
            new.update_arg(2, tile + 1)
        elif role(node) == "output_noise":
            strength: Any = node.args[4]
            new.update_arg(4, strength / math.sqrt(len(site.in_sizes)))
    return copies[chain[-1]]


def _slice(graph: Graph, site: Site, node: Node, start: int, size: int) -> Node:
    """One tile's share of a value from outside the chain: a slice of whatever has inputs last."""
    if role(node) not in ("input", "weight", "weight_normal"):
        return node
    new = graph.call_function(torch.narrow, (node, -1, start, size))
    new.meta["made"] = (site.index, "slice")
    keep_origin(new, site.product)
    return new
