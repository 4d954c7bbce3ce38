"""``nn.MultiheadAttention``: its slow path, in one call that the passes take apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention.forward`` computes, with its arguments and shapes."""
    if self.batch_first:
        query, key, value = sequences_first(query, key, value)
    out, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        self.embed_dim,
        self.num_heads,
        self.in_proj_weight,
        self.in_proj_bias,
        self.bias_k,
        self.bias_v,
        self.add_zero_attn,
        self.dropout,
        self.out_proj.weight,
        self.out_proj.bias,
        training=self.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=not self._qkv_same_embed_dim,
        q_proj_weight=self.q_proj_weight,
        k_proj_weight=self.k_proj_weight,
        v_proj_weight=self.v_proj_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return swapped(out) if self.batch_first else out, weights


@torch.fx.wrap
def sequences_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, L, E) as (L, N, E), each; what was one tensor is one afterwards."""
    q = swapped(query)
    k = q if key is query else swapped(key)
    v = q if value is query else k if value is key else swapped(value)
    return q, k, v


@torch.fx.wrap
def swapped(x: Tensor) -> Tensor:
    """(N, L, E) as (L, N, E) and back; one sequence, (L, E), as it is."""
    return x if x.dim() < 3 or x.is_nested else x.transpose(0, 1)


FORWARDS = {nn.MultiheadAttention.forward: forward}
