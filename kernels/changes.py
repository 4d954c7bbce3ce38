"""When a weight has changed, for whoever keeps what was computed from it.

torch counts most writes to a tensor, but not those of fused optimizers, nor those through
``.data``. Who makes such a write, or sees that one was made, says so by :func:`written`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[int, int, int]

_WRITES = "_analogfx_writes"
"""Attribute of a weight: how often it was written without being counted by torch.

On the tensor itself, as torch swaps no tensor that has a weak reference.
"""


def stamp(weight: Tensor) -> Stamp:
    """What is another after a weight has changed: writes are counted, new storage has an address.

    Of weights made in inference mode torch counts no writes.
    """
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), getattr(owner(weight), _WRITES, 0)


def owner(weight: Tensor) -> Tensor:
    """The tensor that a weight is a view of; the weight itself if it is none."""
    return weight if weight._base is None else weight._base


def written(weights: Iterable[Tensor]) -> None:
    """Say that weights may have been written in a way that torch does not count."""
    for weight in weights:
        owned = owner(weight)
        setattr(owned, _WRITES, getattr(owned, _WRITES, 0) + 1)


def _after_step(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():  # a compiled step writes by way of ops that are counted
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            written(group["params"])


register_optimizer_step_post_hook(_after_step)
