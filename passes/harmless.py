"""What an op does with a weight: a product, or something that no tile computes anyway.

After the passes every op that takes a weight of two dimensions or more together with an activation
is analog, listed as digital, or harmless: a look-up, a norm, arithmetic by element.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.fx import Node

from analogfx.passes.code import functions_of, mentions

PRODUCTS = frozenset({
    "linear", "bilinear", "matmul", "mm", "addmm", "bmm", "baddbmm", "addbmm", "einsum",
    "tensordot", "inner", "mv", "addmv", "dot", "vdot", "vecdot", "multi_dot", "chain_matmul",
    "matrix_power", "cdist", "smm", "sspaddmm", "hspmm", "conv1d", "conv2d", "conv3d",
    "conv_tbc", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "grouped_mm", "scaled_grouped_mm", "scaled_mm", "int_mm", "scaled_dot_product_attention",
    "multi_head_attention_forward", "native_multi_head_attention",
    "transformer_encoder_layer_fwd", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell",
    "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "deform_conv2d", "matvec",
})  # fmt: skip
"""Names of torch's products, without the underscores that mark private and in-place ones."""


def plain_name(target: Any) -> str:
    """The name of what a node calls, without underscores around it, namespace and overload."""
    if isinstance(target, torch._ops.OpOverload):
        name: Any = target._opname
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return str(name).strip("_").removeprefix("linalg_")


def is_product(target: Any) -> bool:
    """Whether a node's target is one of torch's products, or an op or function that may hold one.

    A function in Python holds none if nothing that it calls is one.
    """
    name = plain_name(target)
    if isinstance(target, str) or name in PRODUCTS:
        return name in PRODUCTS
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _namespace(target) not in ("aten", "prims", "prim", "analogfx")
    home = getattr(target, "__module__", None) or ""
    if home.partition(".")[0] in ("torch", "_operator", "math", "builtins", "analogfx", ""):
        return False
    if isinstance(target, types.FunctionType):
        return mentions([*functions_of(target)], PRODUCTS)
    return True  # there is no telling


def _namespace(target: Any) -> str:
    overload = isinstance(target, torch._ops.OpOverload)
    return str(target.namespace if overload else target._qualified_op_name.partition("::")[0])


def consumes(node: Node) -> bool:
    """Whether a call, which takes a weight, may multiply an activation by it.

    Whoever captured the graph notes it of modules, as ``may_multiply`` in a node's ``meta``.
    """
    if node.op == "call_module":
        return bool(node.meta.get("may_multiply"))
    return node.op in ("call_function", "call_method") and is_product(node.target)
