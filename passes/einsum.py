"""The einsum rule of normalize: a contraction with a parameter as one linear product.

For ``x`` with letters A+C, the weight with letters C+B and the output with A+B (in any order, with
leading ``...`` in x and the output):

    einsum(x, W) = permute(linear(x[A, flat C], W[flat B, flat C]))

Letters of all three are an axis of matrices: see ``batched.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.passes import batched
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
    if not arrow:
        raise Refused("an einsum without '->' leaves its output implicit")
    for place, (x, x_term, w_term) in enumerate(
        ((operands[1], right, left), (operands[0], left, right))
    ):
        found = batched.gathered(operands[place])
        if found is not None:
            return _pick(graph, kind, x, found, x_term, w_term, result)
    if weight_value(operands[1]) is None:
        operands, left, right = operands[::-1], right, left
    x, weight = operands
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
    batch = [c for c in w_letters if c in x_letters and c in y_letters]
    outputs = [c for c in w_letters if c not in contracted + batch]
    kept = [c for c in x_letters if c not in contracted + batch]
    if not contracted or any(c not in y_letters for c in kept + outputs):
        raise Refused("not a contraction of the weight with the activation")

    size = dict(zip(w_letters, value.shape, strict=True))
    groups = [batch, outputs, contracted] if batch else [outputs, contracted]
    order = [w_letters.index(c) for group in groups for c in group]
    shape = [math.prod(size[c] for c in letters) for letters in groups]
    matrix = weight
    if order != sorted(order):
        matrix = graph.call_method("permute", (matrix, order))
    if any(len(letters) != 1 for letters in groups):
        matrix = graph.call_method("reshape", (matrix, shape))
    columns = _moved(graph, x, x_letters, batch + kept + contracted)
    if len(contracted) > 1:
        columns = graph.call_method("flatten", (columns, -len(contracted)))
    if batch:
        y = _stacked(graph, kind, columns, matrix, [size[c] for c in batch], len(kept))
    else:
        y = linear_node(graph, kind, columns, matrix)
    y_now = batch + kept + outputs
    if len(outputs) != 1:
        y = graph.call_method("unflatten", (y, -1, [size[c] for c in outputs] or [1]))
        if not outputs:
            y = graph.call_method("squeeze", (y, -1))
    return _moved(graph, y, y_now, list(y_letters))


def _stacked(graph: Graph, kind: str, x: Node, matrices: Node, batch: list[int], kept: int) -> Node:
    """A product of x (..., *batch, *kept, I) with matrices (E, O, I), E the batch axes in one."""
    first = -1 - kept - len(batch)
    if len(batch) > 1:
        x = graph.call_method("flatten", (x, first, -2 - kept))
    y = batched.stacked(graph, kind, x, matrices, math.prod(batch), -2 - kept)
    return y if len(batch) == 1 else graph.call_method("unflatten", (y, -2 - kept, batch))


def _pick(
    graph: Graph,
    kind: str,
    x: Node,
    found: batched.Gathered,
    x_term: str,
    w_term: str,
    result: str,
) -> Node:
    """A product of every row with the matrix that it picks."""
    terms = x_term, w_term, result
    if any("..." in term or len(set(term)) < len(term) for term in terms):
        raise Refused("'...', or a letter twice in one term, in a product of picked matrices")
    ids, matrix = list(w_term[:-2]), list(w_term[-2:])
    contracted = [c for c in matrix if c in x_term and c not in result]
    outputs = [c for c in matrix if c not in contracted]
    kept = [c for c in x_term if c not in ids + contracted]
    known = all(c in result for c in ids + outputs + kept)
    if len(contracted) != 1 or outputs[0] in x_term or not known or len(kept) > 1:
        raise Refused("not a contraction of picked matrices with the activation")
    if matrix[0] == contracted[0]:
        found = found._replace(transposed=not found.transposed)
    present = [c for c in ids if c in x_term]
    x = _moved(graph, x, x_term, present + kept + contracted)
    for place, c in enumerate(ids):
        if c not in present:
            x = graph.call_method("unsqueeze", (x, place))
    if not kept:
        x = graph.call_method("unsqueeze", (x, -2))
    y = batched.picked(graph, kind, x, found)
    if not kept:
        y = graph.call_method("squeeze", (y, -2))
    return _moved(graph, y, ids + kept + outputs, list(result))


def _named(*terms: str) -> list[str]:
    return [term.replace("...", "") for term in terms]


def _moved(graph: Graph, x: Node, now: list[str] | str, wanted: list[str]) -> Node:
    """The trailing axes ``now`` of a tensor in another order; leading axes stay in front."""
    if list(now) == wanted:
        return x
    source = [now.index(c) - len(now) for c in wanted]
    target = [i - len(wanted) for i in range(len(wanted))]
    return graph.call_function(torch.movedim, (x, source, target))
