"""Linear sites of a module's graph as single calls, for eager execution.

The ops of a site are what compilers, exporters and observers read. A call that none of them sees
may be one function, which has the ops' numbers; see :mod:`analogfx.ops.direct`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx import ops
from analogfx.modules.capture import bind
from analogfx.ops import direct
from analogfx.passes.sites import FusedSite, fused_sites, raw_input

_dialect = torch.ops.analogfx
_STORE = torch.ops.aten.copy_.default
_OURS = {
    ops.autocast, ops.checked, operator.getitem, _STORE, "detach", "abs",
    _dialect.draw_seed.default, _dialect.update_range.default, _dialect.stored_range.default,
    _dialect.analog_linear.default,
}  # fmt: skip
"""What the ops of a site that is called directly may be."""

_INIT = 9
"""Which argument of ``update_range`` is the number of batches that set the range."""


def called_directly(graph: Graph) -> Graph:
    """A copy of a fused graph whose linear sites are single calls."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    for site in fused_sites(copy):
        if site.op == "linear":
            _call_directly(copy, site)
    return copy


def _call_directly(graph: Graph, site: FusedSite) -> None:
    """Put one call in the place of a site's ops, where they are those that ``lower`` leaves."""
    number = site.node.meta["made"][0]
    made = [n for n in graph.nodes if n.meta.get("made", (None,))[0] == number]
    chain = [n for n in made if n.op != "get_attr"]
    users = {user for node in chain if node is not site.y for user in node.users}
    clip = site.node.args[4]
    if clip is not None or not _OURS.issuperset(n.target for n in chain) or not users <= {*chain}:
        return
    update = next((n for n in chain if n.target is _dialect.update_range.default), None)
    inputs = [raw_input(a) for a in site.node.args[:3]]
    inputs += [_parameter(site.node.args[3]), None if update is None else update.args[2]]
    needed = dict.fromkeys(i for n in chain for i in n.all_input_nodes if i not in chain)
    others = [node for node in needed if node not in inputs]
    initial: Any = 0 if update is None else update.args[_INIT]
    function = direct.linear(site.spec, initial, bind(_cut(chain, [*inputs, *others], site.y)))
    if function is None:
        return
    with graph.inserting_before(site.y):
        y = graph.call_function(function, (*inputs, *others))
    site.y.replace_all_uses_with(y)
    for node in reversed(chain):
        graph.erase_node(node)


def _parameter(r: Any) -> Any:
    """What holds the range that an op is given, ``stored_range(parameter, new).abs()``."""
    while isinstance(r, Node) and r.op != "get_attr":
        r = r.args[0]
    return r


def _cut(chain: list[Node], inputs: list[Node | None], output: Node) -> Graph:
    """A chain of ops as a graph of its own."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(inputs):
        place = graph.placeholder(f"input_{number}")
        if node is not None:
            copies[node] = place
    for node in chain:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[output])
    return graph
