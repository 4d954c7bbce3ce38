"""torch's fused attention and encoder layer, taken apart into the products that they hide."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from analogfx.passes.contract import keep_origin


def expand_attention(graph: Graph) -> int:
    """Replace fused calls by their projections, as products of their own, and the rest.

    ``nn.MultiheadAttention`` makes such a call, and ``nn.TransformerEncoderLayer`` another one in
    eval mode without gradients: the same products must be analog on both ways.

    Returns:
        The number of calls taken apart.
    """
    count = 0
    tracer = GraphAppendingTracer(graph)
    for target, rule in _RULES.items():
        for node in graph.find_nodes(op="call_function", target=target):
            operands: Any = torch.fx.node.map_aggregate(
                (node.args, node.kwargs),
                lambda a: Proxy(a, tracer) if isinstance(a, torch.fx.Node) else a,  # type: ignore
            )
            before = node.prev
            with graph.inserting_before(node):
                out = rule(*operands[0], **operands[1])
            if out is None:
                continue
            _note_origin(node, before)
            node.replace_all_uses_with(out.node)
            graph.erase_node(node)
            count += 1
    return count


def _note_origin(call: Node, before: Node) -> None:
    """Note on what stands for a call where it comes from.

    Each projection belongs to the module that holds its weight, on all ways to compute it.
    """
    made = call.prev
    while made is not before:
        keep_origin(made, call)
        made.meta["from_fused"] = True
        made = made.prev


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    average_weights: bool = True,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention between projected vectors, (L, E) or (L, N, E), as torch's own computes it.

    Args:
        bias_k, bias_v: one more key and its value for every sequence, (1, 1, E).
        add_zero_attn: whether there is a key of zeros, too.
    """
    more = []
    if bias_k is not None and bias_v is not None:
        more.append((bias_k.flatten(), bias_v.flatten()))
    if add_zero_attn:
        more.append((k.new_zeros(1), v.new_zeros(1)))
    for key, value in more:
        k = torch.cat([k, key.expand_as(k[:1])])
        v = torch.cat([v, value.expand_as(v[:1])])
    pad = (0, len(more))
    attn_mask = None if attn_mask is None else F.pad(attn_mask, pad)
    key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, pad)
    q, k, v = (t.unflatten(-1, (heads, -1)).movedim(0, -2) for t in (q, k, v))
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q)
        if mask.dim() == 3 and q.dim() == 4:
            mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q).unflatten(-1, (1, 1, -1))
        mask = padding if mask is None else mask + padding
    weights = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = weights @ v
        weights = weights.mean(-3) if average_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return out.movedim(-2, 0).flatten(-2), weights


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    """A mask to add to scores; one of bools is True where nothing may be looked at."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))
    return mask.to(x.dtype)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    heads: int,
    in_weight: Any,
    in_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Any,
    out_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``F.multi_head_attention_forward``; None for what no module of torch's asks for.

    That is keys or values that are projected already, and more keys under a causal hint, which
    torch lets nothing look at.
    """
    more = add_zero_attn or bias_k is not None
    if static_k is not None or static_v is not None or (more and is_causal):
        return None
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _projected(query, key, value, embed_dim, separate, in_weight, in_bias)
    dropout = dropout if training else 0.0
    rest = (attn_mask, key_padding_mask, dropout, need_weights, average_attn_weights)
    both = _leaf(q, k, v, heads, *rest, bias_k, bias_v, add_zero_attn)
    out = F.linear(both[0], out_weight, out_bias)
    return query.tracer.create_proxy("call_function", _pair, (out, both[1]), {})


def _pair(first: Any, second: Any) -> tuple[Any, Any]:
    return first, second


def _projected(
    query: Any, key: Any, value: Any, width: int, separate: Any, weight: Any, bias: Any
) -> Any:
    """Queries, keys and values: in one product for one input, as torch does it."""
    biases = bias.chunk(3) if bias is not None else (None,) * 3
    if separate is None:
        if query.node is key.node is value.node:
            return F.linear(query, weight, bias).chunk(3, -1)
        if key.node is value.node:
            own, shared = weight.split([width, 2 * width])
            own_bias, shared_bias = (None, None)
            if bias is not None:
                own_bias, shared_bias = bias.split([width, 2 * width])
            keys_values = F.linear(key, shared, shared_bias).chunk(2, -1)
            return F.linear(query, own, own_bias), keys_values[0], keys_values[1]
        separate = weight.chunk(3)
    inputs = (query, key, value)
    return [F.linear(inputs[i], separate[i], biases[i]) for i in range(3)]


def _leaf(*args: Any) -> Any:
    return args[0].tracer.create_proxy("call_function", attend, args, {})


def _encoder_layer(
    src: Any,
    embed_dim: int,
    heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    """``torch._transformer_encoder_layer_fwd`` of (N, L, E)."""

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attention(x: Any) -> Any:
        qkv = F.linear(x, qkv_weight, qkv_bias).transpose(0, 1).chunk(3, -1)
        hidden = None if mask is None else mask.to(torch.bool)
        masks = (None, hidden) if mask_type == 1 else (hidden, None)
        out = _leaf(qkv[0], qkv[1], qkv[2], heads, *masks)[0]
        return F.linear(out.transpose(0, 1), out_weight, out_bias)

    def feed_forward(x: Any) -> Any:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


_RULES: dict[Any, Any] = {
    F.multi_head_attention_forward: _attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
