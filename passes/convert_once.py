"""convert_once: what a DAC has put on its grid no other DAC puts there again.

Sites that read the same numbers by one range share one conversion, whatever shape each reads them
in, and whether or not they could be one product (see ``share_input``). A site behind an explicit
DAC of its own range and resolution has none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.kernels import integers, prepared
from analogfx.kernels.spec import MVMSpec
from analogfx.passes.contract import Context
from analogfx.passes.frozen import is_frozen, keep
from analogfx.passes.sites import (
    ANALOG_X,
    RANGE,
    X,
    fence_between,
    is_reshape,
    note_not_prepared,
    prepared_sites,
    raw_input,
    spec_of,
)

_DAC = torch.ops.analogfx.dac.default
_GRID_KEEPING = {
    F.relu, torch.relu, "relu", F.max_pool1d, F.max_pool2d, F.max_pool3d,
}  # fmt: skip


def convert_once(graph: Graph, context: Context) -> int:
    """Let sites use what has been converted already.

    Returns:
        The number of sites that gave up a DAC of their own.
    """
    note_not_prepared(graph, context, "convert_once")
    count = 0
    sites: list[Node] = []
    for node in prepared_sites(graph):
        if node.args[ANALOG_X] is not None or not spec_of(node).inp_res:
            continue
        if _on_grid(node, context) or any(_share(graph, s, node, context) for s in sites):
            count += 1
        else:
            sites.append(node)
    return count


def _above(x: Any) -> Iterator[tuple[Node, list[Node]]]:
    """Where an input comes from, through views alone, each with the views from there on."""
    views: list[Node] = []
    while isinstance(x := raw_input(x), Node):
        yield x, views[::-1]
        if not is_reshape(x):
            return
        views.append(x)
        x = x.args[0]


def _share(graph: Graph, first: Node, node: Node, context: Context) -> bool:
    """Let a site use what another one before it converts, if that is the same."""
    source = raw_input(first.args[X])
    views = next((views for x, views in _above(node.args[X]) if x is source), None)
    if views is None:
        return False
    reason = _difference(first, node, views, context)
    if reason:
        context.note("convert_once", node, f"{reason}, beside {first.name}")
        return False
    converted = first.args[ANALOG_X]
    if converted is None:
        with graph.inserting_before(first):
            inputs = (first.args[X], first.args[RANGE], first.args[-1])
            converted = graph.call_function(prepared.convert, inputs)
        first.update_arg(ANALOG_X, converted)
    _use(graph, node, converted, views)
    return True


def _use(graph: Graph, node: Node, converted: Any, views: list[Node]) -> None:
    """Give a site what was converted, in the shape that it reads it in."""
    with graph.inserting_before(node):
        for view in views:
            converted = graph.create_node(
                view.op, view.target, (converted, *view.args[1:]), view.kwargs
            )
    node.update_arg(ANALOG_X, converted)


def _difference(first: Node, node: Node, views: list[Node], context: Context) -> str:
    """What keeps two sites from using one conversion; empty if nothing does."""
    a, b = spec_of(first), spec_of(node)
    if (a.range_mode, a.inp_res) != (b.range_mode, b.inp_res):
        return "another resolution or range mode"
    if bool(integers.depth(a)) != bool(integers.depth(b)):
        return "one of the two multiplies codes"
    one_tile = len(a.in_sizes) == len(b.in_sizes) == 1 and a.range_mode != "dynamic"
    if not one_tile and (views or a.groups + b.groups > 2 or a.in_sizes != b.in_sizes):
        return "another cut of the inputs"
    ranges: tuple[Any, Any] = (first.args[RANGE], node.args[RANGE])
    if None not in ranges and not context.same_value(*ranges):
        return "another range"
    return fence_between(first, node)


def _on_grid(node: Node, context: Context) -> bool:
    """Let a site use the output of an explicit DAC of its own range, if that is its input."""
    spec = spec_of(node)
    if integers.depth(spec):
        return False  # it takes codes, and the DAC in front gives what they stand for
    x = raw_input(node.args[X])
    start = x
    while isinstance(x, Node) and (x.target in _GRID_KEEPING or is_reshape(x)):
        x = raw_input(x.args[0])
    if not isinstance(x, Node) or x.target is not _DAC or not _alike(x, node, spec, context):
        return False
    if fence := fence_between(x, node):
        context.note("convert_once", node, fence)
        return False
    node.update_arg(ANALOG_X, start)
    return True


def _alike(dac: Node, node: Node, spec: MVMSpec, context: Context) -> bool:
    """Whether an explicit DAC converts as a site of one tile would."""
    _, chosen, resolution, mode, *_ = dac.args
    tile: Any = chosen
    if spec.range_mode not in ("static", "fast") or len(spec.in_sizes) > 1:
        return False
    if (resolution, mode) != (spec.inp_res, spec.range_mode):
        return False
    one_of_one = isinstance(tile, Node) and tile.target in (torch.select, operator.getitem)
    if not one_of_one or tile.args[1:] not in ((0, 0), (0,)) or not is_frozen(tile.args[0]):
        return False
    keep(node.graph, tile.args[0])
    return context.same_value(tile.args[0], node.args[RANGE])  # type: ignore[arg-type]
