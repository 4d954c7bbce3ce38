"""How a batch of any usual kind is passed to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from analogfx.errors import CalibrationError


def caller(model: nn.Module) -> Callable[[Any], Any]:
    """A function that calls the model on a batch, moved to the device of its first parameter.

    A tensor is the only argument; ``(args, kwargs)``, a tuple or list and a dict, are those; any
    other tuple or list are positional arguments, a mapping keywords. What a forward cannot take
    of these last two (labels, indices) is left out.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    takes = inspect.signature(model.forward).parameters.values()

    def call(batch: Any) -> Any:
        args, kwargs = _arguments(batch, list(takes))
        move = lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        return model(*tree_map(move, args), **tree_map(move, kwargs))

    return call


def _arguments(
    batch: Any, takes: list[inspect.Parameter]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), _known(batch, takes)
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], dict):
            return tuple(batch[0]), dict(batch[1])
        return tuple(batch[: _places(takes, len(batch))]), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"a batch is a {type(batch).__name__}: expected a tensor, a tuple, a dict or (args, kwargs)"
    )


def _places(takes: list[inspect.Parameter], given: int) -> int:
    if any(p.kind is p.VAR_POSITIONAL for p in takes):
        return given
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)


def _known(batch: Mapping[str, Any], takes: list[inspect.Parameter]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in takes):
        return dict(batch)
    names = {p.name for p in takes}
    known = {key: value for key, value in batch.items() if key in names}
    if not known:
        raise CalibrationError(
            f"a batch has {', '.join(map(str, batch))}, of which the model's forward takes none; "
            f"it takes {', '.join(names)}"
        )
    return known
