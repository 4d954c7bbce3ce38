"""skip_conversion: behind a relu the clamp of a DAC needs its upper side alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode
from analogfx.passes.contract import Context
from analogfx.passes.sites import (
    ANALOG_X,
    RESIDUAL,
    fence_between,
    is_reshape,
    note_not_prepared,
    prepared_sites,
    raw_input,
    spec_of,
)

_NONNEGATIVE = {
    F.relu, torch.relu, torch.relu_, "relu", "relu_", F.relu6, torch.sigmoid, "sigmoid",
    F.softmax, torch.softmax, "softmax", torch.abs, "abs",
}  # fmt: skip
_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool2d, F.adaptive_avg_pool2d}


def skip_conversion(graph: Graph, context: Context) -> int:
    """Drop the side of clamps that nothing reaches.

    Returns:
        The number of DACs that clamp one side only.
    """
    note_not_prepared(graph, context, "skip_conversion")
    dacs = [
        *graph.find_nodes(op="call_function", target=prepared.convert),
        *(n for n in prepared_sites(graph) if n.args[ANALOG_X] is None),
    ]
    return sum(_one_side(node, context) for node in dacs)


def _one_side(node: Node, context: Context) -> bool:
    spec = spec_of(node)
    if spec.nonnegative or spec.range_mode not in ("static", "fast"):
        return False
    source = _nonnegative_source(node.args[0])
    if source is None:
        context.note("skip_conversion", node, "its input may be below 0")
        return False
    if fence := fence_between(source, node):
        context.note("skip_conversion", node, fence)
        return False
    node.update_arg(len(node.args) - 1, encode(spec._replace(nonnegative=True)))
    return True


def _nonnegative_source(x: Any) -> Node | None:
    """The node that keeps an input from being below 0, if there is one."""
    x = raw_input(x)
    while isinstance(x, Node) and (x.target in _POOLS or is_reshape(x)):
        x = raw_input(x.args[0])
    if not isinstance(x, Node):
        return None
    if x.target in (prepared.linear, prepared.conv):
        bare = spec_of(x).activation == "relu" and x.args[RESIDUAL] is None
        return x if bare else None
    return x if x.target in _NONNEGATIVE else None
