"""normalize: every product with a parameter, however it is spelled, in one of three forms.

    F.linear(x, W (O, I), bias)
    grouped_linear(x (N, I), W (E, O, I), bias (E, O), offsets (E,)), see ops/experts.py
    F.conv{1,2,3}d(x, W, bias, stride, padding, dilation, groups), all lists of ints

A product that has no such form stays as it is and gets a decision that says why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from analogfx import ops
from analogfx.passes import batched, harmless
from analogfx.passes.contract import (
    CONVOLUTIONS,
    EXPERTS,
    Context,
    Refused,
    keep_origin,
    linear_node,
    refuse,
    sweep,
)
from analogfx.passes.einsum import normalize_einsum
from analogfx.passes.stationary import propagate_stationary, weight_value

_CONVOLUTION_ALIASES: dict[Any, Any] = {
    torch.conv1d: F.conv1d,
    torch.conv2d: F.conv2d,
    torch.conv3d: F.conv3d,
}


def transpose_rows(x: Tensor) -> Tensor:
    """The last two axes swapped; a vector stays as it is."""
    return x.mT if x.dim() > 1 else x


def _matmul(graph: Graph, node: Node, kind: str, input: Any, other: Any) -> Node:
    product = batched.matmul(graph, kind, input, other)
    if product is not None:
        return product
    weight = weight_value(other)
    if weight is not None:
        if weight.dim() != 2:
            raise Refused(f"the weight has {weight.dim()} dimensions, a tile has 2")
        return linear_node(graph, kind, input, _transposed(graph, other))
    weight = weight_value(input)
    assert weight is not None
    if weight.dim() != 2:
        raise Refused(f"the weight has {weight.dim()} dimensions, a tile has 2")
    columns = graph.call_function(transpose_rows, (other,))
    rows = linear_node(graph, kind, columns, input)
    return graph.call_function(transpose_rows, (rows,))


def _transposed(graph: Graph, weight: Node) -> Node:
    """W^T, without a second transposition where the weight is one already."""
    twice = weight.op == "call_method" and weight.target == "t" and len(weight.args) == 1
    return weight.args[0] if twice else graph.call_method("t", (weight,))  # type: ignore[return-value]


def _is_bias(value: Any, outputs: int) -> bool:
    """Whether an addend is a vector with an element for every output, and no activation."""
    return _has_shape(value, (outputs,))


def _has_shape(value: Any, shape: Sequence[int]) -> bool:
    """Whether a value is no activation, and of a shape."""
    known = value.meta.get("stationary") if isinstance(value, Node) else None
    return isinstance(known, Tensor) and tuple(known.shape) == tuple(shape)


def _addmm(
    graph: Graph,
    node: Node,
    kind: str,
    input: Any,
    mat1: Any,
    mat2: Any,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Node:
    value = weight_value(mat2)
    if value is None:
        raise Refused("addmm with the weight on the left, or only in the addend")
    weight = _transposed(graph, mat2)
    if (beta, alpha) == (1, 1) and _is_bias(input, value.shape[1]):
        return linear_node(graph, kind, mat1, weight, input)
    product = linear_node(graph, kind, mat1, weight)
    scaled = graph.call_function(operator.mul, (product, alpha))
    if beta == 0:  # which leaves out even a NaN
        return scaled
    addend = graph.call_function(operator.mul, (input, beta))
    return graph.call_function(operator.add, (addend, scaled))


def _linear(
    graph: Graph, node: Node, kind: str, input: Any, weight: Any, bias: Any = None
) -> Node | None:
    value = weight_value(weight)
    if value is None:
        raise Refused("the bias is a parameter, the weight is not")
    if value.dim() != 2:
        raise Refused(f"the weight has {value.dim()} dimensions, a tile has 2")
    if bias is not None and not _is_bias(bias, value.shape[0]):
        product = linear_node(graph, kind, input, weight)
        return graph.call_function(operator.add, (product, bias))
    if len(node.args) == 3 and not node.kwargs:
        return None
    return linear_node(graph, kind, input, weight, bias)


def _experts(
    graph: Graph, node: Node, kind: str, x: Any, weight: Any, bias: Any, offsets: Any
) -> Node | None:
    value = weight_value(weight)
    if value is None or value.dim() != 3:
        raise Refused("the weights of experts are not parameters, one matrix for each")
    if bias is None or _has_shape(bias, value.shape[:2]):
        return None
    product = batched.grouped(graph, kind, x, weight, None, offsets)
    of_rows = graph.call_function(ops.experts.rows_of, (bias, offsets, product))
    return graph.call_function(operator.add, (product, of_rows))


def _conv(
    graph: Graph,
    node: Node,
    kind: str,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node | None:
    target = _CONVOLUTION_ALIASES.get(node.target, node.target)
    value = weight_value(weight)
    if value is None:
        raise Refused("the kernel is not a parameter")
    dims = CONVOLUTIONS[target]
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, value.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        uneven = [p for t in reversed(total) for p in (0, t % 2)]
        if any(uneven):  # torch puts the odd zero at the end
            input = graph.call_function(F.pad, (input, uneven))
    padding = [0] * dims if padding == "valid" else _per_axis(padding, dims)
    args = (input, weight, bias, stride, padding, dilation, groups)
    if node.target is target and tuple(node.args) == args and not node.kwargs:
        return None
    new = graph.call_function(target, args)
    new.meta["kind"] = kind
    return new


def _per_axis(value: Any, dims: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * dims if len(values) == 1 else values


_Rule = Callable[..., Node | None]
_RULES: dict[Any, tuple[str, _Rule]] = {
    F.linear: ("linear", _linear),
    EXPERTS: ("experts", _experts),
    torch.bmm: ("bmm", batched.bmm),
    "bmm": ("bmm", batched.bmm),
    torch.baddbmm: ("baddbmm", batched.baddbmm),
    "baddbmm": ("baddbmm", batched.baddbmm),
    torch.matmul: ("matmul", _matmul),
    operator.matmul: ("matmul", _matmul),
    torch.mm: ("matmul", _matmul),
    torch.linalg.matmul: ("matmul", _matmul),
    "matmul": ("matmul", _matmul),
    "mm": ("matmul", _matmul),
    torch.addmm: ("addmm", _addmm),
    "addmm": ("addmm", _addmm),
    torch.einsum: ("einsum", normalize_einsum),
    **{f: (f"conv{dims}d", _conv) for f, dims in CONVOLUTIONS.items()},
    **{a: (f"conv{CONVOLUTIONS[f]}d", _conv) for a, f in _CONVOLUTION_ALIASES.items()},
}
_DIGITAL: dict[Any, str] = {
    torch.mv: "mv",
    torch.dot: "dot",
    torch.inner: "inner",
    torch.tensordot: "tensordot",
    torch.linalg.multi_dot: "multi_dot",
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
    torch.chain_matmul: "chain_matmul",
    F.bilinear: "bilinear",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    F.multi_head_attention_forward: "multi_head_attention",
    torch._native_multi_head_attention: "multi_head_attention",
    "mv": "mv",
    "dot": "dot",
}


_UNKNOWN = "it may multiply by this weight, in code that no pass knows"


def _is_matrix(node: Node) -> bool:
    """Whether a value is, or is cut from, a weight of two dimensions or more."""
    value = weight_value(node.meta.get("cut_from", node))
    return value is not None and value.dim() > 1


_RECURRENT = {"gru", "lstm", "rnn_relu", "rnn_tanh"}
"""torch's functions that run a whole recurrent layer, by name: they are torch._VF's."""


def normalize(graph: Graph, context: Context) -> int:
    """Give every product with a parameter its canonical form.

    Returns:
        The number of products that were rewritten.
    """
    propagate_stationary(graph)
    count = 0
    for node in list(graph.nodes):
        rule = _rule(node) if node.op in ("call_function", "call_method") else None
        weights = [n for n in node.all_input_nodes if weight_value(n) is not None]
        weights += _picked(node)
        cut = any("cut_from" in n.meta for n in node.all_input_nodes)
        if not (weights or cut) or {"stationary", "decision"} & node.meta.keys():
            continue  # no parameter in it, or nothing but parameters, or decided already
        if "cut_from" in node.meta and rule is None:
            continue  # what a weight is cut by; a product with a constant looks alike
        if rule is None:
            name = _unmapped_product(node)
            if name:
                packed = "the lengths of packed sequences are values: analogize() makes it analog"
                reason = packed if name in _RECURRENT else "no tile computes this product"
                refuse(node, name, reason, "normalize")
            elif any(_is_matrix(n) for n in node.all_input_nodes) and harmless.consumes(node):
                refuse(node, harmless.plain_name(node.target), _UNKNOWN, "normalize")
            continue
        kind, rewrite = rule
        kind = node.meta.get("spelled", kind)
        if not weights:
            why = next(n.meta["cut_why"] for n in node.all_input_nodes if "cut_why" in n.meta)
            refuse(node, kind, why, "normalize")
            continue
        before = node.prev
        try:
            with graph.inserting_before(node):
                new = _apply(rewrite, graph, node, kind)
        except Refused as reason:
            refuse(node, kind, str(reason), "normalize")
            continue
        if new is None:
            node.meta.setdefault("kind", kind)
            continue
        _keep_origin(node, before)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    if count:
        propagate_stationary(graph)
        sweep(graph)
    return count


def _picked(node: Node) -> list[Node]:
    """The operands of a call that are picked out of a stack of matrices."""
    found = [(n, batched.gathered(n)) for n in node.all_input_nodes]
    for operand, origin in found:
        if origin is not None:
            operand.meta["gathered_from"] = origin.weight
    return [operand for operand, origin in found if origin is not None]


def _rule(node: Node) -> tuple[str, _Rule] | None:
    """The rule for a call, if there is one."""
    if _name(node).endswith(("grouped_mm", "grouped_mm_fallback")):  # torch's, transformers'
        return "grouped_mm", batched.grouped_mm
    return _RULES.get(node.target)


def _name(node: Node) -> str:
    """The name of what a node calls, without namespace and overload."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target).split(".")[1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _unmapped_product(node: Node) -> str:
    """The name of a product that no rule knows, empty for anything else."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = _name(node)
    known = "grouped_mm" in name or name in _RECURRENT
    return _DIGITAL.get(node.target) or (name if known else "")


def _keep_origin(node: Node, before: Node) -> None:
    """Note on what a rewrite put before a node where the node came from."""
    made = node.prev
    while made is not before:
        keep_origin(made, node)
        made = made.prev


_KEYWORDS = {"tensor1": "input", "mat2": "other", "self": "input"}


def _apply(rewrite: _Rule, graph: Graph, node: Node, kind: str) -> Node | None:
    kwargs = node.kwargs
    if rewrite is _matmul:
        kwargs = {_KEYWORDS.get(name, name): value for name, value in kwargs.items()}
    try:
        return rewrite(graph, node, kind, *node.args, **kwargs)
    except TypeError as error:
        raise Refused(f"called with arguments that {kind} does not take ({error})") from None
