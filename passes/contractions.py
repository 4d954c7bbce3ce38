"""The rules of respell for contractions of matrices and vectors other than ``linear``.

A vector that is a parameter is a matrix with one row. Products of several matrices are multiplied
from the activation outwards, so each that is a parameter is a product of its own. A matrix that is
repeated along a batch is the matrix.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from analogfx.passes.contract import Refused
from analogfx.passes.stationary import weight_value


def _stationary(value: Any) -> bool:
    return isinstance(value, Node) and "stationary" in value.meta


# ---------------------------------------------------------------------------------------- vectors


def columns(x: Tensor) -> Tensor:
    """The last two axes swapped; a vector stays as it is."""
    return x.mT if x.dim() > 1 else x


def _by_vector(graph: Graph, x: Any, vector: Any) -> Node:
    """``x (..., I)`` by a vector (I,) that is a parameter: (...)."""
    row = graph.call_method("unsqueeze", (vector, 0))
    return graph.call_method("squeeze", (graph.call_function(F.linear, (x, row, None)), -1))


def _is_vector(value: Any) -> bool:
    known = weight_value(value)
    return known is not None and known.dim() == 1


def _product(graph: Graph, left: Any, right: Any) -> Node:
    """``left @ right``."""
    return _matmul(graph, left, right) or graph.call_function(torch.matmul, (left, right))


def _matmul(graph: Graph, input: Any, other: Any = None, *, mat2: Any = None) -> Node | None:
    """``input @ other`` where a vector, or a repeated matrix, is a parameter; else None."""
    other = mat2 if other is None else other
    if _is_vector(other):
        return _by_vector(graph, input, other)
    if _is_vector(input):
        return _by_vector(graph, graph.call_function(columns, (other,)), input)
    for operand in (input, other):
        matrix = unexpanded(operand)
        if matrix is None:
            continue
        x = input if operand is other else other
        matrix = _flat(graph, matrix)
        wide = graph.call_function(widened, (x, *_leading(operand)))
        pair = (wide, matrix) if operand is other else (matrix, wide)
        return graph.call_function(torch.matmul, pair)
    return None


def _linear(graph: Graph, input: Any, weight: Any, bias: Any = None) -> Node | None:
    if not _is_vector(weight):
        return None
    y = _by_vector(graph, input, weight)
    return y if bias is None else graph.call_function(operator.add, (y, bias))


def _mv(graph: Graph, input: Any, vec: Any) -> Node:
    if _is_vector(vec):
        return _by_vector(graph, input, vec)
    return graph.call_function(F.linear, (vec, input, None))


def _dot(graph: Graph, input: Any, tensor: Any = None, *, other: Any = None) -> Node:
    return _product(graph, input, other if tensor is None else tensor)


def _inner(graph: Graph, input: Any, other: Any) -> Node:
    """Sums over the last axis of both: (A..., I), (B..., I) to (A..., B...)."""
    left = weight_value(other) is None
    x, weight = (other, input) if left else (input, other)
    return _contracted(graph, x, weight, [-1], [-1], left)


def _tensordot(graph: Graph, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Node:
    if out is not None:
        raise Refused("tensordot writes to a tensor that it is given")
    if isinstance(dims, (Node, Tensor)):
        raise Refused("the axes of tensordot are no constants")
    if isinstance(dims, int):
        of_a, of_b = [*range(-dims, 0)], [*range(dims)]
    else:
        of_a, of_b = ([d] if isinstance(d, int) else list(d) for d in dims)
    if not of_a:
        raise Refused("it contracts nothing")
    if weight_value(b) is not None:
        return _contracted(graph, a, b, of_a, of_b, left=False)
    return _contracted(graph, b, a, of_b, of_a, left=True)


def _contracted(
    graph: Graph, x: Any, weight: Any, of_x: list[int], of_weight: list[int], left: bool
) -> Node:
    """A sum over axes of both; the axes of what is ``left`` come first in the result."""
    value = weight_value(weight)
    assert value is not None
    inner = [axis % value.dim() for axis in of_weight]
    outer = [axis for axis in range(value.dim()) if axis not in inner]
    sizes = [value.shape[axis] for axis in outer]
    shape = [math.prod(sizes), math.prod(value.shape[axis] for axis in inner)]
    matrix = graph.call_method("permute", (weight, outer + inner))
    matrix = graph.call_method("reshape", (matrix, shape))
    if of_x != [*range(-len(of_x), 0)]:
        x = graph.call_function(torch.movedim, (x, of_x, [*range(-len(of_x), 0)]))
    if len(of_x) > 1:
        x = graph.call_method("flatten", (x, -len(of_x)))
    y = graph.call_function(F.linear, (x, matrix, None))
    if not outer:
        return graph.call_method("squeeze", (y, -1))
    if len(outer) > 1:
        y = graph.call_method("unflatten", (y, -1, sizes))
    if left:
        y = graph.call_function(torch.movedim, (y, [*range(-len(outer), 0)], [*range(len(outer))]))
    return y


# ------------------------------------------------------------------------------- sums of products


def _sum(graph: Graph, addend: Any, product: Node, beta: Any, alpha: Any) -> Node:
    """``beta * addend + alpha * product``; beta of 0 leaves out even a NaN."""
    if alpha != 1:
        product = graph.call_function(operator.mul, (product, alpha))
    if beta == 0:
        return product
    if beta != 1:
        addend = graph.call_function(operator.mul, (addend, beta))
    return graph.call_function(operator.add, (addend, product))


def _addmv(graph: Graph, input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> Node:
    if weight_value(mat) is None and weight_value(vec) is None:
        raise Refused("only the addend is a parameter")
    return _sum(graph, input, _mv(graph, mat, vec), beta, alpha)


def _addbmm(
    graph: Graph, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1
) -> Node:
    """A sum over the batch, too."""
    if weight_value(batch1) is None and weight_value(batch2) is None:
        raise Refused("only the addend is a parameter")
    product = graph.call_function(torch.einsum, ("bni,bio->no", batch1, batch2))
    return _sum(graph, input, product, beta, alpha)


# ----------------------------------------------------------------------------------------- chains


def _multi_dot(graph: Graph, tensors: Any, *, out: Any = None) -> Node:
    return _chain(graph, *tensors)


def _chain(graph: Graph, *matrices: Any) -> Node:
    """The product of all, from the first activation to the right, then to the left."""
    start = next(i for i, matrix in enumerate(matrices) if not _stationary(matrix))
    y = matrices[start]
    for matrix in matrices[start + 1 :]:
        y = _product(graph, y, matrix)
    for matrix in reversed(matrices[:start]):
        y = _product(graph, matrix, y)
    return y


# ------------------------------------------------------------------------------ repeated matrices


def unexpanded(operand: Any) -> Node | None:
    """The one matrix, (I, O) or (1, ..., I, O), that an operand repeats along new axes, if so."""
    if not isinstance(operand, Node) or operand.op != "call_method":
        return None
    if operand.target not in ("expand", "repeat") or not operand.args:
        return None
    source, sizes = operand.args[0], _sizes(operand)
    value = weight_value(source)
    if value is None or value.dim() < 2 or len(sizes) < 3 or any(s != 1 for s in value.shape[:-2]):
        return None
    same = (1,) if operand.target == "repeat" else (-1,)
    kept = all(s in same or s == n for s, n in zip(sizes[-2:], value.shape[-2:], strict=True))
    if operand.target == "repeat":
        kept = tuple(sizes[-2:]) == (1, 1)
    return source if kept else None  # type: ignore[return-value]


def _sizes(operand: Node) -> list[Any]:
    sizes = operand.args[1:]
    return list(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else list(sizes)


def _leading(operand: Node) -> list[Any]:
    """The axes along which an operand repeats its matrix."""
    return [1 if isinstance(s, int) and s == -1 else s for s in _sizes(operand)[:-2]]


def _flat(graph: Graph, matrix: Node) -> Node:
    value = weight_value(matrix)
    assert value is not None
    return matrix if value.dim() == 2 else graph.call_method("flatten", (matrix, 0, -2))


def widened(x: Tensor, *leading: int) -> Tensor:
    """``x (..., N, I)`` along the batch axes that it would be multiplied along."""
    batch = torch.broadcast_shapes(x.shape[:-2], leading)
    return x.expand(*batch, *x.shape[-2:])


RULES: dict[Any, Any] = {
    F.linear: ("linear", _linear),
    torch.matmul: ("matmul", _matmul),
    operator.matmul: ("matmul", _matmul),
    torch.linalg.matmul: ("matmul", _matmul),
    "matmul": ("matmul", _matmul),
    torch.bmm: ("bmm", _matmul),
    "bmm": ("bmm", _matmul),
    torch.mv: ("mv", _mv),
    "mv": ("mv", _mv),
    torch.dot: ("dot", _dot),
    "dot": ("dot", _dot),
    torch.addmv: ("addmv", _addmv),
    "addmv": ("addmv", _addmv),
    torch.addbmm: ("addbmm", _addbmm),
    "addbmm": ("addbmm", _addbmm),
    torch.inner: ("inner", _inner),
    "inner": ("inner", _inner),
    torch.tensordot: ("tensordot", _tensordot),
    torch.linalg.multi_dot: ("multi_dot", _multi_dot),
    torch.chain_matmul: ("chain_matmul", _chain),
}
