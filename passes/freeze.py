"""freeze: at inference, all that depends on weights alone is computed once.

Every fused site becomes two nodes: ``prepare``, which makes of its weight what the tiles hold and
what scales their bounds, and the product, in plain torch ops that a compiler fuses with what
stands around them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from analogfx import ops
from analogfx.kernels import dispatch, patches, prepared
from analogfx.kernels.spec import encode, reference_only
from analogfx.passes.contract import Context, sweep
from analogfx.passes.frozen import is_frozen, keep
from analogfx.passes.sites import FusedSite, fused_sites, raw_input, switches_mode
from analogfx.passes.stationary import propagate_stationary, without_cast


def freeze(graph: Graph, context: Context) -> int:
    """Prepare the weights of every fused site that runs without gradients.

    Returns:
        The number of sites prepared.
    """
    propagate_stationary(graph)
    count = 0
    ready: dict[Any, Node] = {}
    for site in fused_sites(graph):
        reason = _objection(site, context)
        if reason:
            context.note("freeze", site.node, reason)
            continue
        _prepare(graph, site, ready)
        count += 1
    sweep(graph)
    return count


def _objection(site: FusedSite, context: Context) -> str:
    """Why a site cannot be prepared; empty if it can."""
    if site.op == "experts":
        return "a layer of experts multiplies by those that have rows"
    if context.gradients:
        return "gradients are on: run under torch.no_grad() or torch.inference_mode()"
    _, weight, bias, input_range, clip, seed, *_ = site.node.args
    if seed is not None or site.spec.keep:
        return "the site is in training mode"
    if reason := reference_only(site.spec):
        return reason
    if _served_by_kernels(site):
        return "the Triton kernels serve it as one op"
    if any(map(switches_mode, site.node.graph.nodes)):
        return "the graph switches autocast or gradients on or off"
    for operand in (weight, bias, input_range, clip):
        if isinstance(operand, Node) and not is_frozen(operand):
            return f"{operand.name} is not computed from weights alone, or not always the same"
    return ""


def _served_by_kernels(site: FusedSite) -> bool:
    """Whether a site that stays one op runs in the Triton kernels; a prepared one never does.

    Raises:
        KernelError: they were asked for and refuse.
    """
    x, weight = (ops.autocast(_example(n)) for n in site.node.args[:2])
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return False
    op = "conv" if site.is_conv else "linear"
    # Of the input's dtype, or the site refuses to run; a stand-in may know nothing of autocast.
    return dispatch.serves_whole(op, x, weight.to(x.dtype), site.spec)


def _example(operand: Any) -> Any:
    """A stand-in for what a site's operand was before casts and checks, if there is one."""
    raw = without_cast(raw_input(operand))
    if raw.target is patches.with_batch:
        raw = raw_input(raw.args[0])
    value = raw.meta.get("example_value")
    return raw.meta.get("stationary") if value is None else value


def _prepare(graph: Graph, site: FusedSite, ready: dict[Any, Node]) -> None:
    """Take a site apart.

    Args:
        ready: what was prepared so far, by what it depends on: a weight may serve several sites.
    """
    x, weight, bias, input_range, clip, _, *texts = site.node.args
    spec = encode(site.spec)
    key: tuple[str, ...] = _recipe(weight), _recipe(clip), spec
    with graph.inserting_before(site.node):
        if key not in ready:
            ready[key] = graph.call_function(prepared.prepare, (weight, clip, spec))
        held = _result(ready[key], 0)
        adc = _result(ready[key], 1) if site.spec.out_bound else None
        if adc is not None and site.spec.range_mode != "dynamic":
            key = *key, _recipe(input_range)
            if key not in ready:
                ready[key] = graph.call_function(prepared.limits, (adc, input_range, spec))
            adc = ready[key]
        operands = (x, held, adc, bias, None, input_range, None)
        target = prepared.conv if site.is_conv else prepared.linear
        y = graph.call_function(target, (*operands, *texts))
    y.meta |= site.y.meta
    for node in (held, adc, bias, input_range):
        keep(graph, node)
    site.y.replace_all_uses_with(y)
    graph.erase_node(site.y)
    graph.erase_node(site.node)
    if site.is_conv and isinstance(x, Node) and x.target is patches.with_batch:
        _unwrap_batch(y, x)


def _recipe(operand: Any) -> str:
    """How an operand is computed, as a text that is the same for what is computed alike."""
    if not isinstance(operand, Node):
        return repr(operand)
    raw = raw_input(operand)
    return repr((str(raw.target), torch.fx.node.map_arg((raw.args, raw.kwargs), _recipe)))


def _result(node: Node, number: int) -> Node:
    """One of a node's results, taken once."""
    for user in node.users:
        if user.args[1] == number:
            return user
    return node.graph.call_function(operator.getitem, (node, number))


def _unwrap_batch(y: Node, x: Node) -> None:
    """Take a convolution out of what gives an image without a batch one, if it has a batch."""
    image, dims = x.args
    value = raw_input(image).meta.get("example_value")
    if isinstance(value, Tensor) and value.dim() == dims + 2:  # type: ignore[operator]
        y.update_arg(0, image)
        for user in [n for n in y.users if n.target is patches.like_batch]:
            y.meta |= user.meta
            user.replace_all_uses_with(y)
            user.graph.erase_node(user)
