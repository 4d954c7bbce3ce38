"""select: which canonical products become analog sites, and their tiles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.config import Resolved
from analogfx.passes.contract import (
    CONVOLUTIONS,
    EXPERTS,
    Context,
    Decision,
    Site,
    is_canonical,
    refuse,
    split_sizes,
    where_of,
)
from analogfx.passes.stationary import sources, weight_value
from analogfx.state import StateNames, state_names

# Ops that only rename a parameter's elements: what they give can be written back.
_VIEWS = {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "chunk", "split",
    "select", "narrow", "unbind", "squeeze", "unsqueeze", "getitem", "swapaxes", "movedim",
    "contiguous", "detach", "T", "mT", "split_with_sizes", "unsafe_chunk", "getattr",
}  # fmt: skip


def _is_view(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("get_attr", "placeholder") or name.partition(".")[0] in _VIEWS


def _is_rearranged(weight: Node) -> bool:
    """Whether a weight holds a parameter's elements and nothing computed from them."""
    return all(_is_view(n) for n in sources(weight))


def _objection(weight: Node, config: Resolved | None) -> str | None:
    """Why a canonical product stays digital, None if it need not."""
    value = weight_value(weight)
    assert value is not None
    if config is None:
        return "left digital by the config"
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return f"the weight is {value.dtype}, a tile holds float weights"
    if value.numel() == 0:
        return "the weight has no elements"
    if any(n.meta.get("written") for n in sources(weight)):
        return "the weight is changed in place"
    if config.clip_sigma and not _is_rearranged(weight):
        return "Gaussian clipping cannot be written back to a computed weight"
    return None


def select(graph: Graph, context: Context) -> int:
    """Choose the sites of a normalized graph.

    A chosen product's node carries its :class:`Site` in ``meta["site"]`` and the site is listed
    in the context; every other product gets a decision.

    Returns:
        The number of sites chosen.
    """
    products = [
        n
        for n in graph.nodes
        if is_canonical(n) and not {"site", "decision", "made", "stationary"} & n.meta.keys()
    ]
    chosen = []
    for node in products:
        objection = _objection(node.args[1], context.config_of(node))
        if objection is None:
            chosen.append(node)
        else:
            refuse(node, node.meta["kind"], objection, "select")
    states = state_names([n.args[1].meta["parameter"] for n in chosen])
    for index, (node, state) in enumerate(zip(chosen, states, strict=True)):
        node.meta["site"] = _site(node, index, state, context)
        context.sites.append(node.meta["site"])
    return len(chosen)


def _site(node: Node, index: int, state: StateNames, context: Context) -> Site:
    arguments: tuple[Any, ...] = node.args
    weight: Node = arguments[1]
    config = context.config_of(node)
    assert config is not None
    value: torch.Tensor = weight.meta["stationary"]
    groups = arguments[6] if node.target in CONVOLUTIONS else 1
    experts = value.shape[0] if node.target is EXPERTS else 0
    outputs, *inputs = value.shape[1:] if experts else value.shape
    in_sizes = split_sizes(math.prod(inputs), config.max_input_size)
    out_sizes = split_sizes(outputs, config.max_output_size) * max(experts, 1)
    decision = Decision(
        name=weight.meta["parameter"],
        kind=node.meta["kind"],
        weight_shape=tuple(value.shape),
        tile_grid=(len(in_sizes), len(out_sizes)),
        status="analog",
        reason="",
        decided_by="select",
        where=where_of(node),
    )
    return Site(
        decision,
        index,
        groups,
        tuple(in_sizes),
        tuple(out_sizes),
        state,
        _is_rearranged(weight),
        weight,
        node,
        config,
        context.training_of(node),
        experts,
    )
