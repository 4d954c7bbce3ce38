"""The batched rules of normalize: products with a stack of matrices (E, O, I).

    every matrix has rows of its own     bmm(x (E, N, I), W), einsum("eni,eoi->eno", x, W)
    every row picks its matrix           bmm(W[ids], x[..., None]), einsum("ni,noi->no", x, W[ids])
    rows are sorted by their matrix      grouped_mm(x, W.mT, offs)

All become :data:`~analogfx.passes.contract.EXPERTS`, between moves of rows.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from analogfx.kernels import experts
from analogfx.passes.contract import EXPERTS, Refused
from analogfx.passes.stationary import weight_value


class Gathered(NamedTuple):
    """A matrix of a stack for each of many indices: ``W[ids]``."""

    weight: Node
    ids: Node
    transposed: bool
    """Whether every matrix is transposed afterwards."""


def grouped(graph: Graph, kind: str, x: Any, weight: Any, bias: Any, offsets: Any) -> Node:
    """The canonical product of rows that are sorted by their matrix."""
    node = graph.call_function(EXPERTS, (x, weight, bias, offsets))
    node.meta["kind"] = kind
    return node


def stacked(graph: Graph, kind: str, x: Node, weight: Node, count: int, axis: int) -> Node:
    """Every matrix by rows of its own: x has the axis of matrices at ``axis``, inputs last.

    Args:
        weight: (count, O, I).
    """
    rows = graph.call_function(experts.as_rows, (x, axis))
    offsets = graph.call_function(experts.even_offsets, (rows, count))
    y = grouped(graph, kind, rows, weight, None, offsets)
    return graph.call_function(experts.from_rows, (y, x, axis))


def right(graph: Graph, kind: str, x: Node, weight: Node) -> Node:
    """``x (..., E, N, I) @ W (E, I, O)``."""
    count = _count(weight)
    wide = graph.call_function(experts.broadcast, (x, count))
    y = stacked(graph, kind, wide, graph.call_method("transpose", (weight, 1, 2)), count, -3)
    return graph.call_function(experts.unbroadcast, (y, x))


def left(graph: Graph, kind: str, weight: Node, x: Node) -> Node:
    """``W (E, O, I) @ x (..., E, I, N)``."""
    count = _count(weight)
    columns = graph.call_function(experts.columns, (x,))
    wide = graph.call_function(experts.broadcast, (columns, count))
    y = stacked(graph, kind, wide, weight, count, -3)
    y = graph.call_function(experts.unbroadcast, (y, x))
    return graph.call_function(experts.columns_back, (y, x))


def _count(weight: Node) -> int:
    """Matrices in a stack."""
    value = weight_value(weight)
    assert value is not None
    return value.shape[0]


def picked(graph: Graph, kind: str, x: Node, found: Gathered) -> Node:
    """Every row by the matrix that it picks: ``x (..., R, I)`` by W[ids] (..., O, I).

    Args:
        found: with matrices (O, I), or (I, O) and transposed.
    """
    weight = found.weight
    count = _count(weight)
    if found.transposed:
        weight = graph.call_method("transpose", (weight, 1, 2))
    pair = graph.call_function(experts.gathered_rows, (x, found.ids))
    rows, of_rows = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    route = graph.call_function(experts.route, (of_rows, count))
    order, offsets = (graph.call_function(operator.getitem, (route, i)) for i in (0, 1))
    in_order = graph.call_function(operator.getitem, (rows, order))
    y = grouped(graph, kind, in_order, weight, None, offsets)
    y = graph.call_function(experts.unsorted, (y, order))
    return graph.call_function(experts.gathered_back, (y, x, found.ids))


def gathered(node: Any) -> Gathered | None:
    """What a node picks out of a stack of matrices, if it does."""
    if not isinstance(node, Node):
        return None
    if node.target in ("mT", "transpose", "swapaxes", torch.transpose, getattr):
        inner = gathered(node.args[0])
        if inner is None or not _swaps_last(node):
            return None
        return inner._replace(transposed=not inner.transposed)
    found = _indexed(node)
    if found is None:
        return None
    weight, ids = found
    value = weight_value(weight)
    activation = isinstance(ids, Node) and "stationary" not in ids.meta
    known = value is not None and value.dim() == 3 and activation
    return Gathered(weight, ids, False) if known else None


def _indexed(node: Node) -> tuple[Any, Any] | None:
    """(tensor, index) of a node that indexes the first axis of a tensor by another tensor."""
    if node.target is operator.getitem:
        return node.args[0], node.args[1]
    if node.target in ("index_select", torch.index_select) and len(node.args) == 3:
        return (node.args[0], node.args[2]) if node.args[1] == 0 else None
    return None


def _swaps_last(node: Node) -> bool:
    """Whether a transposition is of the last two axes."""
    if node.target is getattr:
        return node.args[1] == "mT"
    return {*node.args[1:]} == {-1, -2}


def matmul(graph: Graph, kind: str, input: Any, other: Any) -> Node | None:
    """``input @ other`` with a stack of matrices on one side; None for any other product."""
    for operand, is_right in ((other, True), (input, False)):
        x = input if is_right else other
        value = weight_value(operand)
        if value is not None and value.dim() == 3:
            if is_right:
                return right(graph, kind, x, operand)
            return left(graph, kind, operand, x)
        found = gathered(operand)
        if found is None:
            continue
        if is_right:
            return picked(graph, kind, x, found._replace(transposed=not found.transposed))
        y = picked(graph, kind, graph.call_method("transpose", (x, -1, -2)), found)
        return graph.call_method("transpose", (y, -1, -2))
    return None


def grouped_mm(
    graph: Graph,
    node: Node,
    kind: str,
    input: Any,
    weight: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Node:
    """``grouped_mm(x (N, I), W (E, I, O), offs)`` of torch and of transformers."""
    value = weight_value(weight)
    if value is None or value.dim() != 3 or offs is None:
        raise Refused("only rows of an activation by a stack of matrices are products of tiles")
    if bias is not None or out_dtype is not None:
        raise Refused("grouped_mm with a bias or a dtype of its own")
    return grouped(graph, kind, input, graph.call_method("transpose", (weight, 1, 2)), None, offs)


def bmm(graph: Graph, node: Node, kind: str, input: Any, mat2: Any) -> Node:
    """``torch.bmm``."""
    y = matmul(graph, kind, input, mat2)
    if y is None:
        raise Refused("neither operand is a stack of matrices that are parameters")
    return y


def baddbmm(
    graph: Graph,
    node: Node,
    kind: str,
    input: Any,
    batch1: Any,
    batch2: Any,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Node:
    """``torch.baddbmm``: the addend is digital."""
    if (beta, alpha) != (1, 1):
        raise Refused("baddbmm with factors")
    product = bmm(graph, node, kind, batch1, batch2)
    return graph.call_function(operator.add, (input, product))
