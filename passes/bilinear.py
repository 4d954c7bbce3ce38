"""The rule of respell for bilinear forms: one product on tiles, the other one digital.

For W (O, I1, I2) every output is a form ``x1^T W[o] x2``. A tile holds the matrix (O * I1, I2): its
rows are the features of the second input, its columns pairs of an output and a feature of the
first. What it gives is multiplied by the first input digitally.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx.passes.contract import Refused
from analogfx.passes.stationary import weight_value


def _bilinear(graph: Graph, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Node:
    """``F.bilinear`` of (..., I1), (..., I2) and (O, I1, I2)."""
    value = weight_value(weight)
    if value is None or not isinstance(input2, Node) or "stationary" in input2.meta:
        raise Refused("only a weight between two activations is a product of a tile")
    matrix = graph.call_method("flatten", (weight, 0, 1))
    forms = graph.call_function(F.linear, (input2, matrix, None))
    forms = graph.call_method("unflatten", (forms, -1, list(value.shape[:2])))
    y = graph.call_function(weighed, (forms, input1))
    return y if bias is None else graph.call_function(operator.add, (y, bias))


def weighed(forms: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums over I1 of (..., O, I1) weighed by (..., I1): (..., O)."""
    return torch.matmul(forms, x.unsqueeze(-1)).squeeze(-1)


RULES: dict[Any, Any] = {F.bilinear: ("bilinear", _bilinear)}
