"""The einsum rule of normalize: a contraction with a parameter as one linear product.

For ``x`` with letters A+C, the weight with letters C+B and the output with A+B (in any order, with
leading ``...`` in x and the output):

    einsum(x, W) = permute(linear(x[A, flat C], W[flat B, flat C]))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.passes.contract import Refused, linear_node
from analogfx.passes.stationary import weight_value


def normalize_einsum(
    graph: Graph, node: Node, kind: str, equation: Any, *operands: Any
) -> Node | None:
    """Rewrite ``torch.einsum`` of an activation and a parameter; :class:`Refused` says why not."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise Refused("only an einsum of two operands, with its equation as a string, is one MVM")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    left, right = terms.split(",")
    if weight_value(operands[1]) is None:
        operands, left, right = operands[::-1], right, left
    x, weight = operands
    if not arrow:
        raise Refused("an einsum without '->' leaves its output implicit")
    return _contract(graph, kind, x, weight, left, right, result)


def _contract(
    graph: Graph, kind: str, x: Node, weight: Node, left: str, right: str, result: str
) -> Node:
    value = weight_value(weight)
    assert value is not None
    if any(len(set(term)) < len(term) for term in _named(left, right, result)):
        raise Refused("a letter stands twice in one term")
    for term in (left, result):
        if "..." in term and not term.startswith("..."):
            raise Refused("'...' must lead a term")
    if "..." in right:
        raise Refused("the weight has '...'")
    x_letters, w_letters, y_letters = _named(left, right, result)
    contracted = [c for c in x_letters if c in w_letters and c not in y_letters]
    outputs = [c for c in w_letters if c not in contracted]
    if any(c in x_letters for c in outputs):
        raise Refused("the weight has a batch axis")
    kept = [c for c in x_letters if c not in contracted]
    if not contracted or any(c not in y_letters for c in kept + outputs):
        raise Refused("not a contraction of the weight with the activation")

    size = dict(zip(w_letters, value.shape, strict=True))
    order = [w_letters.index(c) for c in outputs + contracted]
    matrix = graph.call_method("permute", (weight, order))
    shape = [math.prod(size[c] for c in letters) for letters in (outputs, contracted)]
    matrix = graph.call_method("reshape", (matrix, shape))
    columns = _moved(graph, x, x_letters, kept + contracted)
    if len(contracted) > 1:
        columns = graph.call_method("flatten", (columns, -len(contracted)))
    y = linear_node(graph, kind, columns, matrix)
    y_now = kept + outputs
    if len(outputs) != 1:
        y = graph.call_method("unflatten", (y, -1, [size[c] for c in outputs] or [1]))
        if not outputs:
            return graph.call_method("squeeze", (y, -1))
    return _moved(graph, y, y_now, list(y_letters))


def _named(*terms: str) -> list[str]:
    return [term.replace("...", "") for term in terms]


def _moved(graph: Graph, x: Node, now: list[str] | str, wanted: list[str]) -> Node:
    """The trailing axes ``now`` of a tensor in another order; leading axes stay in front."""
    if list(now) == wanted:
        return x
    source = [now.index(c) - len(now) for c in wanted]
    target = [i - len(wanted) for i in range(len(wanted))]
    return graph.call_function(torch.movedim, (x, source, target))
