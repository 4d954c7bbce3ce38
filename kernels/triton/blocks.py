"""Block sizes, chosen by a table: the one place to tune.

No autotuning: it needs a driver at import, measures anew in every process, and would let a noisy
machine decide which numbers come out. What is in the table compiles for sm_80 and sm_90 without
spilling (``tools/kernel_report.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from analogfx.kernels import plan


class Blocks(NamedTuple):
    """What one program of a product computes, and with what."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    @property
    def text(self) -> str:
        """As it appears in a report."""
        return f"{self.rows}x{self.outputs}x{self.inputs}"


TABLE: dict[tuple[str, str], dict[torch.dtype, Blocks]] = {
    # Two accumulators live at once, this tile's and the sum of the tiles before it: 128 x 128
    # needs 8 warps for them to fit the registers.
    ("forward", "many"): {
        torch.bfloat16: Blocks(128, 128, 64, 8, 3),
        torch.float16: Blocks(128, 128, 64, 8, 3),
        torch.float32: Blocks(64, 32, 32, 4, 3),
        torch.int8: Blocks(128, 128, 128, 8, 3),
    },
    ("forward", "few"): {
        torch.bfloat16: Blocks(16, 64, 128, 4, 3),
        torch.float16: Blocks(16, 64, 128, 4, 3),
        torch.float32: Blocks(16, 32, 64, 4, 3),
        torch.int8: Blocks(16, 64, 128, 4, 3),
    },
    # Output noise, or an ADC whose step is another for every row, takes registers of its own.
    ("heavy", "many"): {
        torch.bfloat16: Blocks(128, 64, 64, 8, 4),
        torch.float16: Blocks(128, 64, 64, 8, 4),
        torch.float32: Blocks(64, 32, 32, 4, 3),
        torch.int8: Blocks(128, 64, 128, 8, 3),
    },
    # Tiles that begin anywhere: elements are loaded one by one, each with an address of its own.
    ("unaligned", "many"): {
        torch.bfloat16: Blocks(128, 64, 64, 8, 3),
        torch.float16: Blocks(128, 64, 64, 8, 3),
        torch.float32: Blocks(64, 32, 32, 4, 3),
        torch.int8: Blocks(64, 64, 64, 8, 2),
    },
    ("unaligned", "few"): {
        torch.bfloat16: Blocks(16, 64, 64, 4, 3),
        torch.float16: Blocks(16, 64, 64, 4, 3),
        torch.float32: Blocks(16, 32, 64, 4, 3),
        torch.int8: Blocks(16, 32, 64, 4, 3),
    },
    # One accumulator: g W, rows by inputs, summed over outputs.
    ("input", "many"): {
        torch.bfloat16: Blocks(128, 64, 128, 8, 3),
        torch.float16: Blocks(128, 64, 128, 8, 3),
        torch.float32: Blocks(64, 32, 64, 4, 3),
    },
    # One accumulator: g^T x, outputs by inputs, summed over rows.
    ("weight", "many"): {
        torch.bfloat16: Blocks(64, 128, 128, 8, 3),
        torch.float16: Blocks(64, 128, 128, 8, 3),
        torch.float32: Blocks(32, 64, 64, 4, 3),
    },
    # The same with a learned clip, whose gradient is taken from the block and the weights.
    ("clip", "many"): {
        torch.bfloat16: Blocks(64, 64, 128, 8, 3),
        torch.float16: Blocks(64, 64, 128, 8, 3),
        torch.float32: Blocks(32, 64, 64, 8, 3),
    },
}


def choose(product: str, dtype: torch.dtype, rows: int) -> Blocks:
    """Blocks of a product of operands of a dtype; the products are the table's."""
    few = TABLE.get((product, "few"))
    return few[dtype] if few is not None and rows <= plan.FEW else TABLE[product, "many"][dtype]


ELEMENTS = 2048
"""Elements of one program of an element-wise kernel."""

ROWS, COLUMNS = 4, 1024
"""Block of a reduction along rows."""
