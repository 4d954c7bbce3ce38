"""Causal language models of transformers with the cache of their attention as tensors.

A file takes what the tokens so far left, ``past_key_values.0.key`` and so on, (batch, heads, past,
features), beside the new tokens, and returns ``present.0.key`` and so on beside "logits". These are
the names of optimum's files, so what runs those runs these. A past of no tokens begins a text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from analogfx.errors import OnnxError
from analogfx.onnx.arguments import at_least_two
from analogfx.onnx.sizes import rename_axes

Past = list[dict[str, Tensor]]
"""Keys and values of every layer."""


class _Cached(nn.Module):
    """Mixin in front of a model's class: its cache comes and goes as tensors."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Past
    ) -> dict[str, Tensor]:
        """The logits, and every layer's keys and values behind the new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, layer in enumerate(past_key_values):
            cache.update(layer["key"], layer["value"], number)
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        found = {"logits": out.logits}
        for number, layer in enumerate(_tensors(out.past_key_values)):
            found |= {f"present.{number}.{name}": t for name, t in layer.items()}
        return found


def _tensors(cache: Any) -> Past:
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


@torch.no_grad()
def with_cache(
    analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model whose cache is of tensors, a call of it, and that call's free axes.

    The model shares everything with the one that is given, and its modules have their paths.

    Raises:
        OnnxError: it has no such cache, or the example call has not just tokens and a mask.
    """
    name = type(analog).__name__
    given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | dict(kwargs)
    tokens = given.get("input_ids")
    if len(args) > 2 or set(given) - {"input_ids", "attention_mask"} or tokens is None:
        raise OnnxError(
            f"cache=True takes an example of input_ids and, if you like, an attention_mask: found "
            f"{', '.join(given) or 'nothing'}"
        )
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 2:
        raise OnnxError("cache=True needs input_ids of (batch, sequence) with two tokens at least")
    tokens = at_least_two(tokens)
    before = torch.cat([tokens, tokens[:, :1]], 1)  # of another length than what follows
    try:
        past = _tensors(analog(input_ids=before, use_cache=True).past_key_values)
    except Exception as error:  # whatever the model's own code raises
        raise OnnxError(
            f"cache=True: {name} keeps no keys and values of its attention: expected a causal "
            f"language model of transformers ({type(error).__name__}: {error})"
        ) from error
    shell = copy.copy(analog)
    shell.__class__ = type(name, (_Cached, type(analog)), {})
    call = {
        "input_ids": tokens,
        "attention_mask": tokens.new_ones(len(tokens), before.shape[1] + tokens.shape[1]),
        "past_key_values": past,
    }
    rows, texts = {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}
    axes = {
        "input_ids": rows,
        "attention_mask": rows,
        "past_key_values": [dict.fromkeys(layer, texts) for layer in past],
    }
    return shell, call, axes


_AXES = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "past_key_values": ("batch", None, "past", None),
}
"""What the free axes of a file's inputs are."""


def name_inputs(graph: ir.Graph) -> None:
    """Give a file's caches the names of optimum's, and free axes names that tell what they are."""
    axes: dict[str, str] = {}
    for place in graph.inputs:
        first, *rest = re.split(r"_(?=\d)", str(place.name), maxsplit=1)
        for size, name in zip(place.shape or (), _AXES[first], strict=True):
            if isinstance(size, ir.SymbolicDim) and name is not None:
                axes.setdefault(str(size.value), name)
        place.name = ".".join((first, *(part.replace("_", ".") for part in rest)))
    rename_axes(graph, axes)
