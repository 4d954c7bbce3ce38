"""Chains of element-wise ops, block by block.

On the CPU a chain of ops over a large tensor spends its time on memory: every op reads and writes
all of it, and every large temporary is new pages from the system. Over a block that fits the cache
the same chain is several times faster. On other devices there is one block, the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK = 1 << 20
"""Elements of a block: 4 MB of float32. Smaller ones cost more in calls than they save."""


def row_blocks(t: Tensor) -> Iterator[slice]:
    """Slices of a tensor's first axis that hold about a block each."""
    rows = t.shape[0]
    if t.device.type != "cpu" or t.numel() <= BLOCK:
        yield slice(0, rows)
        return
    size = max(1, BLOCK * rows // t.numel())
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def parts(t: Tensor) -> Iterator[Tensor]:
    """A tensor in blocks of rows; itself where it is one block."""
    for b in row_blocks(t):
        yield t if b.stop - b.start == t.shape[0] else t[b]
