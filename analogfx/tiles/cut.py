"""From a site's matrix to rectangles that fit a crossbar."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from analogfx.passes.contract import split_sizes

Span = tuple[int, int]


class Part(NamedTuple):
    """What one crossbar holds of a site's matrix, or of several groups side by side."""

    tile_row: int
    tile_column: int
    """Place in the grid of the site's parts: along its inputs and along its outputs."""
    inputs: Span
    """Inputs of each group that it takes, of all inputs of a group."""
    outputs: Span
    """Outputs that it gives, of the outputs of all groups."""
    groups: int
    """Groups on its diagonal, each with inputs of its own; 1 for a plain matrix."""
    input_tile: int
    """The tile of the site, along the inputs, that it is a part of: the number of its range."""

    @property
    def rows(self) -> int:
        """Rows of the crossbar that it drives."""
        return self.groups * (self.inputs[1] - self.inputs[0])

    @property
    def columns(self) -> int:
        """Columns of the crossbar that it reads."""
        return self.outputs[1] - self.outputs[0]

    @property
    def cells(self) -> int:
        """Cells that hold weights: all of its rectangle, or the blocks of its diagonal."""
        return self.columns * (self.inputs[1] - self.inputs[0])


def cut(
    in_sizes: Sequence[int],
    out_sizes: Sequence[int],
    groups: int,
    crossbar: tuple[int, int],
    fill: str,
    diagonal: bool,
) -> list[Part]:
    """The parts of one site.

    A part never crosses a border of the site's own tiles: these are what the model computes, with
    a range and an ADC each. A tile that is larger than a crossbar is cut further.

    Args:
        in_sizes: inputs of the site's tiles, of one group.
        out_sizes: outputs of the site's tiles, of all groups.
        crossbar: rows and columns.
        fill: ``"even"`` for parts as equal as can be, ``"first"`` for full crossbars and a rest.
        diagonal: put as many whole groups as fit on one crossbar.
    """
    rows, columns = crossbar
    outputs = sum(out_sizes)
    per_group = outputs // groups
    borders = {end for _, end in _spans(out_sizes)}
    borders |= {(group + 1) * per_group for group in range(groups)}
    edges = [0, *sorted(borders)]
    across = [
        span
        for start, end in itertools.pairwise(edges)
        for span in _spans(_lengths(end - start, columns, fill), start)
    ]
    along = [
        (tile, span)
        for tile, (start, end) in enumerate(_spans(in_sizes))
        for span in _spans(_lengths(end - start, rows, fill), start)
    ]
    tallest = max(end - start for _, (start, end) in along)
    together = _on_diagonals(across, per_group, tallest, crossbar) if diagonal else None
    wide = together or [(span, 1) for span in across]
    return [
        Part(row, column, inputs, span, count, tile)
        for column, (span, count) in enumerate(wide)
        for row, (tile, inputs) in enumerate(along)
    ]


def _on_diagonals(
    across: Sequence[Span], per_group: int, tallest: int, crossbar: tuple[int, int]
) -> list[tuple[Span, int]]:
    """Spans of whole groups joined as long as they fit, each with its number of groups."""
    joined: list[tuple[Span, int]] = []
    for start, end in across:
        whole = end - start == per_group
        if joined and whole:
            (first, last), count = joined[-1]
            fits = (count + 1) * tallest <= crossbar[0] and end - first <= crossbar[1]
            if fits and last - first == count * per_group:
                joined[-1] = (first, end), count + 1
                continue
        joined.append(((start, end), 1))
    return joined


def _lengths(size: int, limit: int, fill: str) -> list[int]:
    if fill == "even":
        return split_sizes(size, limit)
    return [min(limit, size - start) for start in range(0, size, limit)]


def _spans(sizes: Sequence[int], start: int = 0) -> list[Span]:
    ends = list(itertools.accumulate(sizes, initial=start))
    return list(itertools.pairwise(ends))
