"""share_input: sites that read one activation the same way share one product.

Q, K and V of an attention, gate and up of a feed-forward: their weights become tiles along the
outputs of one wider product, whose result is split. Sites whose inputs are converted alike but
whose outputs are not share the DAC alone, see ``convert_once``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode, scalars
from analogfx.passes.contract import Context, sweep
from analogfx.passes.frozen import keep
from analogfx.passes.sites import (
    ADC,
    ANALOG_X,
    BIAS,
    RANGE,
    RESIDUAL,
    WEIGHT,
    X,
    fence_between,
    note_not_prepared,
    prepared_sites,
    raw_input,
    spec_of,
)


def share_input(graph: Graph, context: Context) -> int:
    """Join prepared linear sites that read the same input.

    Returns:
        The number of sites that gave up a product of their own.
    """
    note_not_prepared(graph, context, "share_input")
    groups = _groups(graph, context)
    for nodes in groups:
        _join(graph, nodes)
    sweep(graph)
    return sum(len(nodes) - 1 for nodes in groups)


def _groups(graph: Graph, context: Context) -> list[list[Node]]:
    """Sites that read one input in one way and end alike, two or more of them together."""
    groups: list[list[Node]] = []
    for node in prepared_sites(graph):
        spec = spec_of(node)
        taken = node.target is not prepared.linear or node.args[ANALOG_X] is not None
        if taken or spec.groups > 1 or spec.activation or node.args[RESIDUAL] is not None:
            continue
        for group in groups:
            if raw_input(group[0].args[X]) is not raw_input(node.args[X]):
                continue
            reason = fence_between(group[0], node) or _difference(group[0], node, context)
            if not reason:
                group.append(node)
                break
            context.note("share_input", node, f"{reason}, beside {group[0].name}")
        else:
            groups.append([node])
    return [group for group in groups if len(group) > 1]


def _difference(first: Node, second: Node, context: Context) -> str:
    """What keeps two sites from being rows of tiles side by side; empty if nothing does."""
    a, b = spec_of(first), spec_of(second)
    if (scalars("dac", a), a.in_sizes) != (scalars("dac", b), b.in_sizes):
        return "another resolution, range mode or cut of the inputs"
    if scalars("adc", a) != scalars("adc", b):
        return "another resolution or bound of the outputs"
    if scalars("quantize", a) != scalars("quantize", b):
        return "another number of weight states"
    ranges: tuple[Any, Any] = (first.args[RANGE], second.args[RANGE])
    if None not in ranges and not context.same_value(*ranges):
        return "another range"
    return ""


def _join(graph: Graph, nodes: list[Node]) -> None:
    """One wider product for several, split after."""
    specs = [spec_of(node) for node in nodes]
    sizes = [sum(spec.out_sizes) for spec in specs]
    first = nodes[0]
    with graph.inserting_before(first):
        weight = _beside(graph, nodes, WEIGHT, 0)
        adc = _beside(graph, nodes, ADC, -1) if specs[0].out_bound else None
        bias = _biases(graph, nodes)
        for node in (weight, adc, bias):
            keep(graph, node)
        spec = specs[0]._replace(out_sizes=[size for s in specs for size in s.out_sizes])
        inputs = (first.args[X], weight, adc, bias, None, first.args[RANGE], None)
        wide = graph.call_function(prepared.linear, (*inputs, encode(spec)))
        parts = graph.call_function(torch.split, (wide, sizes, -1))
        for number, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (parts, number))
            part.meta |= node.meta
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def _beside(graph: Graph, nodes: list[Node], argument: int, axis: int) -> Node:
    return graph.call_function(torch.cat, ([n.args[argument] for n in nodes], axis))


def _biases(graph: Graph, nodes: list[Node]) -> Node | None:
    biases = [n.args[BIAS] for n in nodes]
    if not any(b is not None for b in biases):
        return None
    filled = [
        graph.call_function(prepared.no_bias, (node.args[WEIGHT],)) if b is None else b
        for node, b in zip(nodes, biases, strict=True)
    ]
    return graph.call_function(torch.cat, (filled,))
