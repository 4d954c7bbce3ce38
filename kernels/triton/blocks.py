"""Block sizes, chosen by a table: the one place to tune.

No autotuning: it needs a driver at import, measures anew in every process, and would let a noisy
machine decide which numbers come out. What is in the table compiles for sm_80 and sm_90 without
spilling (``tools/kernel_report.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from analogfx.kernels import plan
from analogfx.kernels.spec import MVMSpec


class Blocks(NamedTuple):
    """What one program of a product computes, and with what.

    Rows are whole patches of ``plan.PATCH``, and half of the forward's outputs are.
    """

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread, where ptxas would spill a register or two for one more program at a time."""

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return chosen if self.max_registers is None else {**chosen, "maxnreg": self.max_registers}

    @property
    def text(self) -> str:
        """As it appears in a report."""
        return f"{self.rows}x{self.outputs}x{self.inputs}"


def _half_and_float(half: Blocks, single: Blocks) -> dict[torch.dtype, Blocks]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: single}


TABLE: dict[tuple[str, str], dict[torch.dtype, Blocks]] = {
    # Two accumulators live at once, this tile's and the sum of the tiles before it: 128 x 128
    # needs 8 warps for them to fit the registers.
    ("forward", "many"): {
        **_half_and_float(Blocks(128, 128, 64, 8, 3), Blocks(32, 64, 32, 8, 3, 255)),
        torch.int8: Blocks(128, 128, 128, 8, 3),
    },
    ("forward", "few"): {
        **_half_and_float(Blocks(16, 64, 64, 4, 4, 255), Blocks(16, 64, 32, 4, 3, 255)),
        torch.int8: Blocks(16, 64, 128, 4, 3, 255),
    },
    # Output noise, or an ADC whose step is another for every row, takes registers of its own.
    ("heavy", "many"): {
        **_half_and_float(Blocks(128, 64, 64, 8, 4), Blocks(32, 64, 32, 8, 3, 255)),
        torch.int8: Blocks(128, 64, 128, 8, 3),
    },
    # Tiles that begin anywhere, or rows of W that do: elements are loaded one by one, each with an
    # address of its own.
    ("unaligned", "many"): {
        **_half_and_float(Blocks(64, 64, 64, 8, 3, 255), Blocks(32, 64, 32, 8, 3, 255)),
        torch.int8: Blocks(64, 64, 64, 8, 2, 255),
    },
    ("unaligned", "few"): {
        **_half_and_float(Blocks(16, 64, 32, 4, 3, 255), Blocks(16, 64, 32, 4, 3, 255)),
        torch.int8: Blocks(16, 64, 64, 4, 3, 255),
    },
    # Elements of patches are loaded one by one, each with an address and a place in the image; for
    # three axes, or where patches end within 16 elements, there is less room for an accumulator.
    ("conv", "many"): _half_and_float(Blocks(128, 64, 32, 8, 3), Blocks(32, 64, 32, 8, 2, 255)),
    ("conv, unaligned", "many"): _half_and_float(
        Blocks(64, 64, 32, 8, 3), Blocks(32, 64, 32, 8, 2, 255)
    ),
    ("conv", "few"): _half_and_float(Blocks(16, 64, 64, 4, 3), Blocks(16, 64, 32, 4, 2, 255)),
    # One accumulator: g W, rows by inputs, summed over outputs.
    ("input", "many"): _half_and_float(Blocks(128, 64, 128, 8, 3), Blocks(64, 32, 64, 4, 3)),
    ("input, unaligned", "many"): _half_and_float(
        Blocks(64, 64, 128, 8, 3), Blocks(32, 32, 64, 4, 3)
    ),
    # One accumulator: g^T x, outputs by inputs, summed over rows.
    ("weight", "many"): _half_and_float(Blocks(64, 128, 128, 8, 3), Blocks(64, 32, 64, 4, 3)),
    ("weight, unaligned", "many"): _half_and_float(
        Blocks(64, 64, 128, 8, 3), Blocks(64, 32, 64, 4, 3)
    ),
    # The same with a learned clip, whose gradient is taken from the block and the weights.
    ("clip", "many"): _half_and_float(Blocks(64, 64, 64, 8, 3, 255), Blocks(32, 64, 32, 8, 3, 255)),
}


def choose(product: str, dtype: torch.dtype, rows: int) -> Blocks:
    """Blocks of a product of operands of a dtype; the products are the table's."""
    few = TABLE.get((product, "few"))
    return few[dtype] if few is not None and rows <= plan.FEW else TABLE[product, "many"][dtype]


def of_forward(x: Tensor, w: Tensor, spec: MVMSpec) -> Blocks:
    """Blocks of the forward product of x (N, I) and w (O, I)."""
    rows = x.shape[0]
    if not _aligned(w.shape[0], spec) or w.stride(1) != 1:
        return choose("unaligned", w.dtype, rows)
    heavy = rows > plan.FEW and (spec.out_noise or spec.range_mode == "dynamic")
    return choose("heavy" if heavy else "forward", w.dtype, rows)


def of_conv(y: Tensor, w: Tensor) -> Blocks:
    """Blocks of the convolution that gives y (B, O, *out) by w (O, inputs of a patch)."""
    product = "conv, unaligned" if w.shape[1] % 16 or y.dim() > 4 else "conv"
    return choose(product, w.dtype, y.numel() // max(y.shape[1], 1))


def of_input_gradient(g: Tensor, spec: MVMSpec) -> Blocks:
    """Blocks of the product g W~ that gives the gradient of x; g (N, O)."""
    product = "input" if _aligned(g.shape[1], spec) else "input, unaligned"
    return choose(product, g.dtype, g.shape[0])


def of_weight_gradient(g: Tensor, learned_clip: bool, spec: MVMSpec) -> Blocks:
    """Blocks of the product g^T x that gives the gradient of W; g (N, O)."""
    product = "weight" if _aligned(g.shape[1], spec) else "weight, unaligned"
    return choose("clip" if learned_clip else product, g.dtype, g.shape[0])


def _aligned(outputs: int, spec: MVMSpec) -> bool:
    """Whether every tile, and every row of an operand, begins at a multiple of 16 elements."""
    return not any(size % 16 for size in (*spec.in_sizes, outputs))


GROUP = 8
"""Blocks of rows that take turns in a column, so that their operands stay in the L2 cache."""

ELEMENTS = 2048
"""Elements of one program of an element-wise kernel."""

ROWS, COLUMNS = 4, 1024
"""Block of a reduction along rows."""
