"""The least time that a GPU needs for one layer: bytes and operations of every launch, on paper.

A launch reads each operand from memory once and writes each result once, or computes its products
at the rate of the tensor cores, whichever takes longer. Nothing is reused between launches, and
element-wise arithmetic, random numbers and the launches themselves take no time.
"""

from collections.abc import Iterable
from typing import NamedTuple

from analogfx.kernels import plan


class Shape(NamedTuple):
    """Rows of the input, and the layer."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{rows}, {self.inputs} → {self.outputs}"


SHAPES = (Shape(8192, 1024, 1024), Shape(8192, 4096, 4096), Shape(8192, 4096, 14336))
"""What is measured on a GPU."""


class Launch(NamedTuple):
    """What one kernel moves and computes."""

    name: str
    bytes: int
    operations: int = 0
    """Multiplications and additions of its product."""
    operands: str = "bf16"


class Chip(NamedTuple):
    """What a GPU reaches on large random data, below what its data sheet says."""

    name: str
    bandwidth: float
    rates: dict[str, float]
    """Operations a second by operands."""

    def seconds(self, launch: Launch) -> float:
        """The least time of a launch."""
        return max(launch.bytes / self.bandwidth, launch.operations / self.rates[launch.operands])

    def is_memory_bound(self, launch: Launch) -> bool:
        """Whether a launch waits for memory rather than for the tensor cores."""
        return self.seconds(launch) == launch.bytes / self.bandwidth

    def total(self, launches: Iterable[Launch]) -> float:
        """The least time of launches that follow one another."""
        return sum(map(self.seconds, launches))


H200 = Chip("H200", 4.3e12, {"bf16": 790e12, "int8": 1580e12})

_HALF, _FLOAT = 2, 4
"""Bytes of a bfloat16 and of a float32."""


class Sizes(NamedTuple):
    """Bytes of a layer's tensors, and the operations of one product."""

    x: int
    w: int
    y: int
    bias: int
    operations: int


def sizes(shape: Shape) -> Sizes:
    """A layer in bfloat16."""
    n, i, o = shape
    return Sizes(_HALF * n * i, _HALF * i * o, _HALF * n * o, _HALF * o, 2 * n * i * o)


def digital_forward(shape: Shape) -> list[Launch]:
    """``nn.Linear``."""
    s = sizes(shape)
    return [Launch("forward", s.x + s.w + s.bias + s.y, s.operations)]


def digital_step(shape: Shape) -> list[Launch]:
    """``nn.Linear``: forward, backward and SGD."""
    s = sizes(shape)
    return [
        *digital_forward(shape),
        Launch("dX", s.y + s.w + s.x, s.operations),
        Launch("dW", s.y + s.x + s.w, s.operations),
        Launch("bias gradient", s.y + s.bias),
        _sgd(s),
    ]


def _sgd(s: Sizes) -> Launch:
    return Launch("SGD", 3 * (s.w + s.bias))


def analog_forward(shape: Shape, tiles: int) -> list[Launch]:
    """The recipe at inference: nothing changes the weights, and no clipped output is marked."""
    s = sizes(shape)
    scales = _scales(shape, tiles)
    return [
        Launch("row maxima", s.w + scales),
        Launch("DAC", 2 * s.x),
        Launch("forward", s.x + s.w + s.bias + s.y + scales, s.operations),
    ]


def eight_bit_forward(shape: Shape, tiles: int) -> list[Launch]:
    """Inference from weights that were prepared as 8-bit codes."""
    s = sizes(shape)
    moved = (s.x + s.w) // 2 + s.bias + s.y + 2 * _scales(shape, tiles)
    return [Launch("DAC", s.x + s.x // 2), Launch("forward", moved, s.operations, "int8")]


def analog_step(shape: Shape, tiles: int) -> list[Launch]:
    """The recipe in training: forward, backward, SGD and clipping, ranges set, no output clipped.

    The backward makes the noisy weights and the converted inputs again, and a bit for every output
    of every tile, of which it sets those that a bound clipped.
    """
    s = sizes(shape)
    scales, marks = _scales(shape, tiles), _marks(shape, tiles)
    weights = [Launch("row maxima", s.w + scales), Launch("weight noise", 2 * s.w + scales)]
    dac = Launch("DAC", 2 * s.x)
    return [
        *weights,
        dac,
        Launch("forward", s.x + s.w + s.bias + s.y + scales + marks, s.operations),
        *weights,
        Launch("clipped outputs, none", marks + tiles * shape.rows * -(-shape.outputs // 8)),
        Launch("dX", s.y + s.w + s.x, s.operations),
        Launch("clamp", 3 * s.x),
        dac,
        Launch("dW", s.y + s.x + s.w, s.operations),
        Launch("bias gradient", s.y + s.bias),
        _sgd(s),
        Launch("clip", 3 * s.w),  # its second read may come from the cache
    ]


def statistics(shape: Shape) -> list[Launch]:
    """What a step has to do besides while data still sets the ranges."""
    return [Launch("statistics", sizes(shape).x)]


def _marks(shape: Shape, tiles: int) -> int:
    """Bytes of a mark for every patch of outputs of every tile."""
    rows, outputs = plan.PATCH
    return tiles * -(-shape.rows // rows) * -(-shape.outputs // outputs)


def _scales(shape: Shape, tiles: int) -> int:
    """Bytes of a float32 for every output of every tile."""
    return _FLOAT * tiles * shape.outputs


def paper_figures(shape: Shape) -> dict[str, list[Launch]]:
    """Every modelled figure of a shape, by what it is of."""
    return {
        "forward, nn.Linear": digital_forward(shape),
        "forward, 1 tile": analog_forward(shape, 1),
        "forward, 8 tiles": analog_forward(shape, 8),
        "8-bit forward, 8 tiles": eight_bit_forward(shape, 8),
        "step, nn.Linear": digital_step(shape),
        "step, 1 tile": analog_step(shape, 1),
        "step, 8 tiles": analog_step(shape, 8),
        "statistics": statistics(shape),
    }


def totals(chip: Chip, shapes: Iterable[Shape]) -> list[list[str]]:
    """A header and a line for each figure: milliseconds, and the ratio to ``nn.Linear``."""
    shapes = list(shapes)
    columns = [paper_figures(shape) for shape in shapes]
    lines = [["paper model, ms", *map(str, shapes)]]
    for what in columns[0]:
        digital = "step, nn.Linear" if what.startswith("st") else "forward, nn.Linear"
        cells = []
        for figures in columns:
            seconds = chip.total(figures[what])
            cells.append(f"{1e3 * seconds:.3f} ×{seconds / chip.total(figures[digital]):.2f}")
        lines.append([what, *cells])
    return lines


def launches(chip: Chip, shape: Shape) -> list[list[str]]:
    """A header and a line for each launch of a shape's figures."""
    lines = [[str(shape), "launch", "MB", "GFLOP", "µs", "bound by"]]
    for what, listed in paper_figures(shape).items():
        for launch in listed:
            bound = "memory" if chip.is_memory_bound(launch) else "tensor cores"
            lines.append(
                [
                    what,
                    launch.name,
                    f"{launch.bytes / 1e6:.1f}",
                    f"{launch.operations / 1e9:.1f}",
                    f"{1e6 * chip.seconds(launch):.1f}",
                    bound,
                ]
            )
    return lines
