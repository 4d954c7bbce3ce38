"""The arguments of a model's call: their order, their free axes, and calls of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from analogfx.errors import OnnxError


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of nested arguments or outputs, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of forward's parameters, in its order.

    Raises:
        OnnxError: forward takes no such call.
    """
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise OnnxError(f"{type(model).__name__}.forward: {error}") from error


def in_order(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments in the order of forward's parameters, which is that of a file's inputs.

    Raises:
        OnnxError: forward takes no such call.
    """
    named = [name for name in bound(model, args, kwargs) if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys((*named, *kwargs))}


# ------------------------------------------------------------------------------------ free axes


def at_least_two(value: Any) -> Any:
    """Arguments with a batch of one doubled: a free axis cannot be traced at 1.

    The first tensor tells the batch; what has 1 beside a larger batch is broadcast, and stays.
    """

    def widen(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if _is_single(leaf) else leaf

    return tree_map(widen, value) if _is_single(next(iter(tensors_of(value)), None)) else value


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1


def free_axes(t: Tensor) -> range:
    """The axes of an input that ought to be free: its batch, and its sequence if it has one.

    The first axis is the batch. The second is a sequence in token ids and masks (whole numbers)
    and in (batch, sequence, feature); images have none.
    """
    sequence = t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())
    return range(min(t.dim(), 1 + sequence))


def dynamic_axes(arguments: Any) -> Any:
    """The free axes of all tensors, as ``torch.export.export`` takes them."""

    def axes(value: Any) -> Any:
        free = free_axes(value) if isinstance(value, Tensor) else ()
        return dict.fromkeys(free, Dim.AUTO) or None

    return tree_map(axes, arguments)


# --------------------------------------------------------------------------------- other sizes

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def sharing(tensors: Iterable[Tensor], axis: int) -> list[Tensor]:
    """Those tensors that are as long along an axis as the first of them."""
    held = [t for t in tensors if t.dim() > axis]
    return [t for t in held if t.shape[axis] == held[0].shape[axis]]


def other_batches(call: Call, batched: Iterable[Tensor]) -> list[Call]:
    """Twice the batch, and its first element alone.

    Args:
        batched: the tensors of the call that have the batch as first axis.
    """
    return [
        _changed(call, batched, lambda t: torch.cat([t, t.flip(0)])),
        _changed(call, batched, lambda t: t[:1]),
    ]


def other_lengths(call: Call, sequences: Iterable[Tensor]) -> list[Call]:
    """Sequences that are longer by one, and shorter by one where they may be.

    Args:
        sequences: the tensors of the call that have the sequence as second axis.
    """
    longer = _changed(call, sequences, lambda t: torch.cat([t, t[:, :1]], 1))
    if all(t.shape[1] < 2 for t in sequences):
        return [longer]
    return [longer, _changed(call, sequences, lambda t: t[:, :-1])]


def _changed(call: Call, tensors: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> Call:
    chosen = {id(t) for t in tensors}
    args, kwargs = tree_map(lambda leaf: change(leaf) if id(leaf) in chosen else leaf, call)
    return args, kwargs
