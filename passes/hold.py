"""hold: a module's fused graph multiplies by what a chip holds, which a call brings along."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.kernels.spec import encode
from analogfx.ops.held import next_seed
from analogfx.passes.contract import Context, sweep
from analogfx.passes.sites import FusedSite, fused_sites

_dialect = torch.ops.analogfx


def hold(graph: Graph, context: Context) -> int:
    """Give the graph an argument in front, what its sites hold, and let every site use its own.

    Returns:
        The number of sites.
    """
    sites = list(fused_sites(graph))
    if not sites:
        return 0
    with graph.inserting_before(next(iter(graph.nodes))):
        holdings = graph.placeholder("_held")
    for site in sites:
        _rewrite(graph, site, holdings)
    sweep(graph)
    return len(sites)


def _rewrite(graph: Graph, site: FusedSite, holdings: Node) -> None:
    number = site.node.meta["made"][0]
    x, _, bias, input_range, *_ = site.node.args
    others: list[Any] = [*site.node.args[6:-1], encode(site.spec)]
    with graph.inserting_before(site.node):
        held = graph.call_function(operator.getitem, (holdings, number))
        parts = [graph.call_function(operator.getitem, (held, part)) for part in range(6)]
        parts[-1] = graph.call_function(next_seed, (parts[-1],))
        op = getattr(_dialect, f"held_{site.op}").default
        y = graph.call_function(op, (x, parts[0], bias, input_range, *parts[1:], *others))
    y.meta |= site.y.meta
    site.y.replace_all_uses_with(y)
    graph.erase_node(site.y)
    graph.erase_node(site.node)
