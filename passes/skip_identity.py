"""skip_identity: a site that changes nothing becomes the plain product again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Graph

from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.passes.contract import Context
from analogfx.passes.sites import FusedSite, fused_sites


def skip_identity(graph: Graph, context: Context) -> int:
    """Replace fused sites without range, DAC, weight change, noise and ADC.

    Cutting such a product into tiles only orders its sum differently.

    Returns:
        The number of sites replaced.
    """
    count = 0
    for site in fused_sites(graph):
        reason = _objection(site)
        if reason:
            context.note("skip_identity", site.node, reason)
            continue
        x, weight, bias = site.node.args[:3]
        with graph.inserting_before(site.node):
            if site.is_conv:
                window = decode(Window, site.node.args[6])  # type: ignore[arg-type]
                zeros = [0] * len(window.stride)
                args = (x, weight, bias, window.stride, window.padding, window.dilation)
                y = graph.call_function(torch.convolution, (*args, False, zeros, site.spec.groups))
            else:
                y = graph.call_function(F.linear, (x, weight, bias))
        y.meta |= site.y.meta
        site.y.replace_all_uses_with(y)
        graph.erase_node(site.y)
        graph.erase_node(site.node)
        count += 1
    return count


def _objection(site: FusedSite) -> str:
    spec: MVMSpec = site.spec
    if site.op == "experts":
        return "a layer of experts"
    if spec.groups > 1 and not site.is_conv:
        return "a grouped product on patches"
    if spec.range_mode != "none":
        return f"inputs have a {spec.range_mode} range"
    if spec.needs_max or site.node.args[4] is not None:
        return "weights or outputs are not those of the plain product"
    return ""
