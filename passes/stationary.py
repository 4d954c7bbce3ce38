"""Weight-stationary values: what in a graph is computed from parameters alone.

Whoever captured a graph marks the nodes that bring parameters and buffers in; the rest follows.
The notes on a node, in its ``meta``:

``stationary``
    The value on the meta device, for a node that no input of the model reaches.
``parameter``
    The name of a parameter that the value is computed from, None for buffers and constants.
``cast_of``
    The weight that the node casts to another dtype.
``cut_from``
    The weight that the node computes its value from, together with an input's shape, or with an
    input that chooses among matrices.
``cut_why``
    What keeps such a value off a tile.
``activation``
    The value counts as one that an input reaches, though it is computed from parameters alone.
``written``
    The weight is changed in place somewhere.
``describes``
    The value is a shape, dtype or device, or computed from such.
"""

from __future__ import annotations

import functools
import inspect
import operator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node


def mark_stationary(node: Node, value: Any, parameter: str | None) -> None:
    """Mark a node whose value does not depend on the model's inputs.

    Args:
        value: tensor on the meta device with the value's shape and dtype.
        parameter: the name of the parameter that it reads, None for a buffer or a constant.
    """
    node.meta["stationary"] = value
    node.meta["parameter"] = parameter


def weight_value(node: Any) -> Tensor | None:
    """The meta tensor of a node that is computed from parameters alone, else None."""
    if isinstance(node, Node) and node.meta.get("parameter") is not None:
        value = node.meta["stationary"]
        return value if isinstance(value, Tensor) else None
    return None


_CASTS = {"to", "type_as", "type", "float", "double", "half", "bfloat16"}


def without_cast(node: Node) -> Node:
    """What a node casts to another dtype, or the node itself."""
    while "cast_of" in node.meta:
        node = node.meta["cast_of"]
    return node


def sources(value: Node) -> list[Node]:
    """The nodes that a weight is computed by, in order, itself included; casts left out."""
    found: dict[Node, None] = {}
    pending = [value]
    while pending:
        node = without_cast(pending.pop())
        if node not in found:
            found[node] = None
            pending.extend(node.all_input_nodes)
    return sorted(found)


_WRITING = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip


def writes(node: Node) -> bool:
    """Whether a call changes its input in place."""
    if node.target in _WRITING:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or _asked_in_place(node) or node.kwargs.get("out") is not None


def _asked_in_place(node: Node) -> bool:
    """Whether a function is told to work in place."""
    place = _inplace_position(node.target) if isinstance(node.target, FunctionType) else None
    by_position = place is not None and len(node.args) > place and bool(node.args[place])
    return by_position or bool(node.kwargs.get("inplace"))


@functools.cache
def _inplace_position(function: FunctionType) -> int | None:
    names = [*inspect.signature(function).parameters]
    return names.index("inplace") if "inplace" in names else None


def _describes(node: Node) -> bool:
    """Whether a node's value is a shape, dtype or device, or computed from such.

    To be asked in the graph's order.
    """
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and all(n.meta["describes"] for n in node.all_input_nodes)


def propagate_stationary(graph: Graph) -> None:
    """Mark every node that is computed from marked nodes alone, with its value's shape.

    A weight that is cast to whatever dtype an input has counts, too. A call that writes to a
    weight is not marked, so that it stays where it is.
    """
    for node in graph.nodes:
        node.meta["describes"] = _describes(node)
        inputs = node.all_input_nodes
        called = node.op in ("call_function", "call_method")
        if "stationary" in node.meta or not called or not inputs or node.meta.get("activation"):
            continue
        if writes(node):
            _note_write(node)
        elif all("stationary" in n.meta for n in inputs):
            _evaluate(node)
        elif _is_cast(node):  # to what an input of the model is
            node.meta["cast_of"], meta = node.args[0], node.args[0].meta
            mark_stationary(node, meta["stationary"], meta["parameter"])
        else:
            _note_cut(node)


def _note_write(node: Node) -> None:
    written = node.kwargs.get("out")
    if written is None and node.args:
        written = node.args[0]
    if isinstance(written, Node) and weight_value(written) is not None:
        for source in sources(written):
            source.meta["written"] = True


def _note_cut(node: Node) -> None:
    if node.target in _CHOOSING and node.args:
        table = weight_value(node.args[0])
        if table is not None and table.dim() > 2:  # matrices, as experts are: no look-up
            _cut(node, node.args[0], "its matrices are chosen by the input")
            return
    inputs = [n for n in node.all_input_nodes if not n.meta["describes"]]
    cut = [n for n in inputs if "cut_from" in n.meta]
    weights = [n for n in inputs if weight_value(n) is not None]
    if cut and all("cut_from" in n.meta or "stationary" in n.meta for n in inputs):
        _cut(node, cut[0].meta["cut_from"], cut[0].meta["cut_why"])
    elif len(inputs) == len(weights) == 1:
        _cut(node, weights[0], "the weight is cut by the input's shape")


_CHOOSING = {
    operator.getitem, torch.index_select, torch.gather, torch.take_along_dim, "index_select",
    "gather", "take_along_dim",
}  # fmt: skip


def _cut(node: Node, weight: Any, why: str) -> None:
    node.meta["cut_from"], node.meta["cut_why"] = weight, why


def _is_cast(node: Node) -> bool:
    return node.target in _CASTS and weight_value(node.args[0]) is not None


def _evaluate(node: Node) -> None:
    """Mark a node by running it on the meta device."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["stationary"])
    try:
        if node.op == "call_function":
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    except Exception as error:  # whatever it is, it is not a weight that we can reason about
        weights = [n for n in node.all_input_nodes if weight_value(n) is not None]
        if weights:
            _cut(node, weights[0], f"its weight needs values to be computed ({_line(error)})")
        return
    parameters = (n.meta["parameter"] for n in node.all_input_nodes)
    mark_stationary(node, value, next((p for p in parameters if p is not None), None))
    if _is_cast(node) and value.is_floating_point():
        node.meta["cast_of"] = node.args[0]


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:120]
