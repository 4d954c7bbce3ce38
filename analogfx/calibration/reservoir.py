"""A bounded sample of a stream of rows in which every row is as likely as any other."""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """At most ``size`` rows of all that were added; all of them while there are no more.

    Every row draws a key, and the rows with the smallest keys stay: so the sample is uniform
    without replacement, however the rows were divided into batches.

    Args:
        size: rows to keep.
        generator: of the CPU, drawn from once for every row.

    Source: Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1985); the form with keys is
    that of Efraimidis and Spirakis, Inf. Proc. Letters 97 (2006), with equal weights.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self._generator = generator
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Offer more rows, (N, I) on any device; those that stay are copied to the CPU."""
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        enter = _smallest(keys, self.size)
        if len(self._keys) == self.size:
            enter = enter[keys[enter] < self._keys.max()]
        new = rows[enter.to(rows.device)].cpu()
        if self._rows is None:
            self._keys, self._rows = keys[enter], new
            return
        keys, both = torch.cat([self._keys, keys[enter]]), torch.cat([self._rows, new])
        stay = _smallest(keys, self.size)
        self._keys, self._rows = keys[stay], both[stay]

    def rows(self) -> Tensor | None:
        """The sample, (at most size, I) on the CPU; None before any row was added."""
        return self._rows


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest keys, of all where there are no more."""
    if len(keys) <= count:
        return torch.arange(len(keys))
    return keys.topk(count, largest=False, sorted=False).indices
