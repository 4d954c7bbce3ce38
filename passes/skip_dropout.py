"""skip_dropout: a dropout that is off hands its input on.

It would stand between a site and what could be the site's last step, or between a relu and a
clamp behind it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.passes.contract import Context

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
}  # fmt: skip


def skip_dropout(graph: Graph, context: Context) -> int:
    """Drop calls of dropout that are told that they do not train.

    Returns:
        The number of calls dropped.
    """
    count = 0
    for node in [n for n in graph.nodes if n.target in _DROPOUTS]:
        reason = _objection(node)
        if reason:
            context.note("skip_dropout", node, reason)
            continue
        x: Any = node.args[0]
        node.replace_all_uses_with(x)
        graph.erase_node(node)
        count += 1
    return count


def _objection(node: Node) -> str:
    """Why a call of ``(input, p, training, inplace)`` may change its input; empty if not."""
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    if not node.args or not isinstance(training, bool):
        return "whether it trains is not a constant"
    return "its module is in training mode" if training else ""
