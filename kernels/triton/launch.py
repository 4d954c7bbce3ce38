"""One call of a kernel as data: it can be run, or compiled ahead of time without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analogfx.kernels.spec import MVMSpec


class Launch(NamedTuple):
    """A kernel with its grid and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | None]
    constants: dict[str, Any]
    options: dict[str, int] = {}  # noqa: RUF012, a NamedTuple's default
    """Warps, stages and the like, as triton takes them; its defaults where there are none."""

    def run(self) -> None:
        """Queue the kernel on the current stream of its tensors' device; nothing for no program."""
        if 0 in self.grid:
            return
        device = next(t.device for t in self.args.values() if isinstance(t, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):  # triton launches on the current device, not its args'
                self.kernel[self.grid](**self.args, **self.constants, **self.options)
        else:
            self.kernel[self.grid](**self.args, **self.constants, **self.options)


def is_interpreted(kernel: Callable[..., Any]) -> bool:
    """Whether a kernel runs on the CPU, in Triton's interpreter."""
    return type(kernel).__name__ == "InterpretedFunction"


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def geometry(spec: MVMSpec) -> dict[str, int]:
    """Size of a tile and how many, the first ones, have one input more."""
    smallest = min(spec.in_sizes)
    larger = sum(size > smallest for size in spec.in_sizes)
    return {"size": smallest, "larger": larger}


def is_even(spec: MVMSpec) -> bool:
    """Whether all tiles are of one size."""
    return len(set(spec.in_sizes)) == 1


def range_mode(ranges: Tensor | None, spec: MVMSpec) -> str:
    """How a kernel finds a tile's range: "none", "fixed" (k,) or "dynamic" (N, k)."""
    return "none" if ranges is None else "dynamic" if spec.range_mode == "dynamic" else "fixed"
