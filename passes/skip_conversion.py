"""skip_conversion: a DAC does not do again what its input has been through.

Behind a relu a clamp needs its upper side alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.kernels import patches, prepared
from analogfx.kernels.spec import encode
from analogfx.passes.contract import Context
from analogfx.passes.sites import (
    ANALOG_X,
    RESIDUAL,
    fence_between,
    prepared_sites,
    raw_input,
    spec_of,
)

_NONNEGATIVE = {
    F.relu, torch.relu, torch.relu_, "relu", "relu_", F.relu6, torch.sigmoid, "sigmoid",
    F.softmax, torch.softmax, "softmax", torch.abs, "abs",
}  # fmt: skip
_ORDER_KEEPING = {
    "reshape", "flatten", "contiguous", "transpose", "permute", "unsqueeze", "squeeze",
    torch.flatten, torch.reshape, torch.transpose, torch.permute, F.max_pool1d, F.max_pool2d,
    F.max_pool3d, F.avg_pool2d, F.adaptive_avg_pool2d, patches.with_batch,
}  # fmt: skip


def skip_conversion(graph: Graph, context: Context) -> int:
    """Drop the side of clamps that nothing reaches.

    Returns:
        The number of DACs that clamp one side only.
    """
    linear = [n for n in prepared_sites(graph) if n.target is prepared.linear]
    dacs = [
        *graph.find_nodes(op="call_function", target=prepared.convert),
        *(n for n in linear if n.args[ANALOG_X] is None),
        *graph.find_nodes(op="call_function", target=prepared.conv),
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
    fence = fence_between(source, node)
    if fence is not None:
        context.note("skip_conversion", node, f"{fence.name} stands between")
        return False
    node.update_arg(len(node.args) - 1, encode(spec._replace(nonnegative=True)))
    return True


def _nonnegative_source(x: Any) -> Node | None:
    """The node that keeps an input from being below 0, if there is one."""
    x = raw_input(x)
    while isinstance(x, Node) and (x.target in _ORDER_KEEPING or _is_reshape(x)):
        x = raw_input(x.args[0])
    if not isinstance(x, Node):
        return None
    if x.target in (prepared.linear, prepared.conv):
        bare = spec_of(x).activation == "relu" and x.args[RESIDUAL] is None
        return x if bare else None
    return x if x.target in _NONNEGATIVE else None


def _is_reshape(node: Node) -> bool:
    """Whether a call is a view of the same numbers, and not of their bits as another dtype."""
    return node.target == "view" and not any(isinstance(a, torch.dtype) for a in node.args)
