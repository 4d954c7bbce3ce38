"""The rules of expand for torch's fused attention: projections as products, the rest digital.

``in_proj_weight`` holds three matrices, for queries, keys and values. Each is a product of its own,
whatever the inputs are: which inputs are one tensor is not to be seen in a graph, and a site must
be the same in every call. Where ``mapping.packed_projections`` asks for one product, inputs that
differ go through it one after the other, and of each its own third is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy


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
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention between projected vectors, (L, E) or (L, N, E), as torch's own computes it.

    Args:
        attn_mask: (L, S), (N * heads, L, S), or (N, heads, L, S): added to the scores, or of bools
            that are True where nothing may be looked at.
        key_padding_mask: (N, S), or (S,) without a batch.
        bias_k, bias_v: one more key and its value for every sequence, (1, 1, E).
        add_zero_attn: whether there is a key of zeros, too.
        is_causal: the hint that ``attn_mask`` is the causal one. As in torch, it stands in for the
            mask where no weights are asked for and nothing is padded.

    Returns:
        Vectors like ``q``, and the weights: None, or (N, L, S) averaged, (N, heads, L, S) not.

    Raises:
        RuntimeError: a mask of another shape, or a causal hint without a mask.
    """
    _check_masks(q, k, heads, attn_mask, key_padding_mask, is_causal)
    is_causal = is_causal and key_padding_mask is None and not need_weights
    if is_causal:
        attn_mask = None
    more = []
    if bias_k is not None and bias_v is not None:
        more.append((bias_k.flatten(), bias_v.flatten()))
    if add_zero_attn:
        more.append((k.new_zeros(1), v.new_zeros(1)))
    for key, value in more:
        k = torch.cat([k, key.to(k.dtype).expand_as(k[:1])])
        v = torch.cat([v, value.to(v.dtype).expand_as(v[:1])])
    q, k, v = (t.unflatten(-1, (heads, -1)).movedim(0, -2) for t in (q, k, v))
    mask = _merged(q, heads, attn_mask, key_padding_mask, len(more))
    weights = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = weights @ v
        weights = weights.mean(-3) if average_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    return out.movedim(-2, 0).flatten(-2), weights


def _check_masks(
    q: Tensor,
    k: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> None:
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    length, batch, keys = q.shape[0], q.shape[1:-1], k.shape[0]
    if attn_mask is not None:
        rows = batch.numel() * heads
        expected = {2: (length, keys), 3: (rows, length, keys), 4: (*batch, heads, length, keys)}
        _check_shape("attn_mask", attn_mask, expected.get(attn_mask.dim(), expected[2]))
    if key_padding_mask is not None:
        _check_shape("key_padding_mask", key_padding_mask, (*batch, keys))


def _check_shape(name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise RuntimeError(f"The shape of {name} is {tuple(mask.shape)}, but should be {expected}.")


def _merged(
    q: Tensor, heads: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None, more: int
) -> Tensor | None:
    """Both masks as one that is added to scores, (..., L, S + more); None for none."""
    mask = None
    if attn_mask is not None:
        mask = _additive("attn_mask", attn_mask, q)
        if mask.dim() == 3 and q.dim() == 4:
            mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        other = F._none_or_dtype(attn_mask)
        padding = _additive("key_padding_mask", key_padding_mask, q, other).unflatten(
            -1, (1, 1, -1)
        )
        mask = padding if mask is None else mask + padding
    return mask if mask is None else F.pad(mask, (0, more))


def _additive(name: str, mask: Tensor, x: Tensor, other: Any = None) -> Tensor:
    """A mask to add to scores; one of bools is True where nothing may be looked at."""
    made = F._canonical_mask(mask, name, other, "attn_mask", x.dtype, other is not None)
    assert made is not None
    return made.to(x.dtype)


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
    """``F.multi_head_attention_forward``; None for keys or values that are projected already."""
    if static_k is not None or static_v is not None:
        return None
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    inputs = (query, key, value)
    if use_separate_proj_weight:
        q, k, v = _each(inputs, separate, in_bias)
    else:
        q, k, v = _projected(inputs, in_weight, in_bias)
    dropout = dropout if training else 0.0
    rest = (attn_mask, key_padding_mask, dropout, need_weights, average_attn_weights)
    out = _leaf(q, k, v, heads, *rest, bias_k, bias_v, add_zero_attn, is_causal)
    return _both(F.linear(out[0], out_weight, out_bias), out[1])


def _projected(inputs: Any, weight: Any, bias: Any) -> Any:
    """Queries, keys and values by a packed weight: three products, or one."""
    if not weight.tracer.context.packs(weight.node):
        return _each(inputs, weight.chunk(3), bias)
    rows = _call(together, *inputs)
    parts = _call(apart, F.linear(rows, weight, bias), *inputs)
    return [parts[i] for i in range(3)]


def _each(inputs: Any, weights: Any, bias: Any) -> Any:
    biases = _in_thirds(bias)
    return [F.linear(inputs[i], weights[i], biases[i]) for i in range(3)]


def together(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Sequences one after the other, each tensor once: (L, ...), (S, ...), (S, ...)."""
    if query is key and key is value:
        return query
    return torch.cat([query, key] if key is value else [query, key, value])


def apart(y: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The third of every projected sequence that is meant for it, see :func:`together`."""
    if query is key and key is value:
        parts = (y, y, y)
    elif key is value:
        q, k = y.split([len(query), len(key)])
        parts = (q, k, k)
    else:
        parts = y.split([len(query), len(key), len(value)])
    q, k, v = (part.chunk(3, -1)[i] for i, part in enumerate(parts))
    return q, k, v


def _in_thirds(bias: Any) -> Any:
    """The biases of queries, keys and values; those that a caller put together, as they are."""
    if bias is None:
        return (None,) * 3
    parts = bias.node.args[0] if bias.node.target is torch.cat and bias.node.args else ()
    if isinstance(parts, (tuple, list)) and len(parts) == 3 and len(bias.node.args) == 1:
        return [Proxy(part, bias.tracer) for part in parts]
    return bias.chunk(3)


def _leaf(*args: Any) -> Any:
    return _call(attend, *args)


def _both(first: Any, second: Any) -> Any:
    return _call(_pair, first, second)


def _call(function: Any, *args: Any) -> Any:
    """A call that stays one in the graph."""
    return args[0].tracer.create_proxy("call_function", function, args, {})


def _pair(first: Any, second: Any) -> tuple[Any, Any]:
    return first, second


def _native_attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    mask: Any = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """``torch._native_multi_head_attention`` of (N, L, E)."""
    swapped = {x.node: x.transpose(0, 1) for x in (query, key, value)}
    inputs = [swapped[x.node] for x in (query, key, value)]
    q, k, v = _projected(inputs, qkv_weight, qkv_bias)
    rest = (*_masks(mask, mask_type), 0.0, need_weights, average_attn_weights)
    out = _leaf(q, k, v, heads, *rest)
    return _both(F.linear(out[0].transpose(0, 1), out_weight, out_bias), out[1])


def _masks(mask: Any, mask_type: int | None) -> tuple[Any, Any]:
    """The mask of torch's fused kernels as an attention mask or one of padding."""
    hidden = None if mask is None else mask.to(torch.bool)
    return (None, hidden) if mask_type == 1 else (hidden, None)


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
        out_proj = (qkv_weight, qkv_bias, out_weight, out_bias, mask, False, True, mask_type)
        return _native_attention(x, x, x, embed_dim, heads, *out_proj)[0]

    def feed_forward(x: Any) -> Any:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


RULES: dict[Any, Any] = {
    F.multi_head_attention_forward: _attention,
    torch._native_multi_head_attention: _native_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
