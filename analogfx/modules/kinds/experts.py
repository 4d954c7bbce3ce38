"""The experts of transformers' models: classes under its decorator ``use_experts_implementation``.

Such a class has one forward for each implementation that a config may choose ("eager",
"batched_mm", "grouped_mm"; a model that generates may switch). What is traced stands for all of
them: tokens sorted by expert, and two products, :func:`~analogfx.ops.experts.grouped_linear`.
Classes are known by the decorator's wrapper, not by their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from analogfx.kernels.experts import route, unsorted
from analogfx.ops.experts import grouped_linear

# Calls of these are nodes of the graph: what happens in them depends on the tokens.
torch.fx.wrap("route")
torch.fx.wrap("unsorted")


def forward_for(own: FunctionType) -> Callable[..., Any] | None:
    """What to trace in the place of a class's forward; None for any but decorated experts."""
    if {*own.__code__.co_freevars} != {"experts_interface", "original_forward"}:
        return None
    return _BY_NAMES.get(tuple(inspect.signature(own).parameters))


def _run(self: Any, hidden_states: Any, index: Any, weights: Any) -> Any:
    """Every token by its experts.

    Args:
        hidden_states: (tokens, H).
        index: (tokens, k) the experts of each token; one out of range is none.
        weights: (tokens, k) what its experts' outputs are summed with.

    Returns:
        (tokens, H) of the dtype of ``hidden_states``.
    """
    tokens, top_k = hidden_states.shape[0], index.shape[-1]
    order, offsets = route(index.reshape(-1), self.down_proj.shape[0])
    x = hidden_states[order // top_k]
    if self.has_gate:
        x = self._apply_gate(_product(self, "gate_up_proj", x, offsets))
    else:
        x = self.act_fn(_product(self, "up_proj", x, offsets))
    x = _product(self, "down_proj", x, offsets)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * weights.reshape(-1)[order].unsqueeze(-1)
    by_token = unsorted(x, order).reshape(tokens, top_k, x.shape[-1])
    return by_token.sum(dim=1).to(hidden_states.dtype)


def _product(self: Any, name: str, x: Any, offsets: Any) -> Any:
    weight = getattr(self, name)
    if self.is_transposed:
        weight = weight.transpose(1, 2)
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    return grouped_linear(x, weight, bias, offsets)


def _experts(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    return _run(self, hidden_states, top_k_index, top_k_weights)


def _gpt_oss(self: Any, hidden_states: Any, router_indices: Any, routing_weights: Any) -> Any:
    return _run(self, hidden_states, router_indices, routing_weights)


_BY_NAMES = {tuple(inspect.signature(f).parameters): f for f in (_experts, _gpt_oss)}
"""By the names of a forward's arguments, which a caller may use."""
