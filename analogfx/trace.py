"""One graph of a whole analog model, for reading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from analogfx.errors import CaptureError
from analogfx.modules.program import explicit_level


class _Tensors(nn.Module):
    """A model whose output is its tensors alone, for outputs that torch.export cannot describe."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        leaves = tree_leaves(self.model(*inputs, **keywords))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def trace(analog: nn.Module, *inputs: Any, **keywords: Any) -> GraphModule:
    """The whole model as one graph at the explicit level: a node for every analog role.

    The model is traced as it runs on the inputs given, in its present mode. The result computes
    what the model computes; read it with ``print_readable()``. Nothing of the model changes.
    Where an output holds objects that torch.export does not know (a key-value cache), the graph
    returns the output's tensors alone.

    Args:
        inputs, keywords: what the model's forward takes.

    Raises:
        CaptureError: the model's control flow depends on values, so it has no single graph.
    """
    first: Exception | None = None
    with explicit_level():
        for model in (analog, _Tensors(analog)):
            try:
                program = torch.export.export(model, inputs, keywords or None, strict=False)
                return program.module()
            except Exception as error:
                first = first or error
    raise CaptureError(f"{type(analog).__name__} has no single graph: {first}") from first
