"""Detects that a weight has changed, for whoever keeps what was computed from it.

torch counts the writes to a tensor, but not those of fused optimizers, nor those through
``.data``. Who makes such a write, or sees that one was made, reports it by :func:`written`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stamp(NamedTuple):
    """The state of a weight at one moment; see :func:`unchanged`."""

    version: int
    """Writes that torch has counted; -1 for a weight of inference mode, which has no count."""
    uncounted: int
    """Writes that were reported by :func:`written`."""
    address: int
    """Where the first element is."""
    storage: StorageWeakRef
    """What holds the elements. As long as this reference exists, no other storage is taken for
    it, even one that the system puts at the same address."""


_WRITES = "_analogfx_writes"
"""Attribute of a weight: how often it was written without being counted by torch.

On the tensor itself, as torch swaps no tensor that has a weak reference.
"""


def stamp(weight: Tensor) -> Stamp:
    """The state of a weight now. It keeps neither the weight nor its elements alive."""
    storage = StorageWeakRef(weight.untyped_storage())
    return Stamp(_version(weight), _reported(weight), weight.data_ptr(), storage)


def unchanged(weight: Tensor, since: Stamp) -> bool:
    """Whether a weight holds what it held when a stamp was made of it.

    False for weights that were made in inference mode: nothing tells whether they were written.
    """
    return (
        since.version >= 0
        and since.version == _version(weight)
        and since.uncounted == _reported(weight)
        and since.address == weight.data_ptr()
        and since.storage.cdata == weight.untyped_storage()._cdata
    )


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _reported(weight: Tensor) -> int:
    return getattr(owner(weight), _WRITES, 0)


def owner(weight: Tensor) -> Tensor:
    """The tensor that a weight is a view of; the weight itself if it is none."""
    return weight if weight._base is None else weight._base


def written(weights: Iterable[Tensor]) -> None:
    """Report that weights may have been written in a way that torch does not count."""
    for weight in weights:
        owned = owner(weight)
        setattr(owned, _WRITES, getattr(owned, _WRITES, 0) + 1)


steps = 0
"""Steps that optimizers have made in this process."""


def _after_step(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():  # a compiled step writes by way of ops that are counted
        return
    global steps
    steps += 1
    for group in optimizer.param_groups:
        if group.get("fused"):
            written(group["params"])


register_optimizer_step_post_hook(_after_step)
