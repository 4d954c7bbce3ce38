"""A tile map as one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from analogfx.page.charts import Rectangle, boxes, legend
from analogfx.page.document import Document
from analogfx.tiles.rows import Tile

_DRAWN = 256
_NAMED = 40
_VISIBLE = 1.5
"""The least side of a rectangle: two columns of 512 can be seen."""


def write_page(
    numbers: Sequence[tuple[str, str]],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    tiles: Sequence[Tile],
    rows_of: Mapping[str, str],
    crossbar: tuple[int, int],
    path: str | os.PathLike[str],
) -> None:
    """Numbers, the table of the sites, and the crossbars with what fills them.

    Args:
        rows_of: the row of the table that a site went to; sites of one row have one colour.
    """
    page = Document("Tile map")
    page.numbers(numbers)
    for note in notes:
        page.text(note)
    page.heading("Crossbars")
    names, picture, left = _crossbars(tiles, rows_of, crossbar)
    page.picture(picture)
    page.picture(legend(names[:_NAMED]))
    if left:
        page.text(f"{left} more crossbars are not drawn.")
    if len(names) > _NAMED:
        page.text(f"{len(names) - _NAMED} more colours: point at a rectangle for its name.")
    page.heading("Sites")
    page.table(header, rows)
    page.write(path)


def _crossbars(
    tiles: Sequence[Tile], rows_of: Mapping[str, str], crossbar: tuple[int, int]
) -> tuple[list[str], str, int]:
    """Rows in order of their colours, the picture, and how many crossbars it leaves out."""
    numbers = sorted({tile.crossbar for tile in tiles})
    drawn = {number: place for place, number in enumerate(numbers[:_DRAWN])}
    rows, columns = crossbar
    across = max(1, min(len(drawn), math.ceil(math.sqrt(len(drawn) * 2))))
    size = min(120.0, 1000.0 / across - 8)
    wide, high = size * columns / max(crossbar), size * rows / max(crossbar)
    corners = {
        number: (place % across * (wide + 8) + 1, place // across * (high + 8) + 1)
        for number, place in drawn.items()
    }
    names = list(dict.fromkeys(rows_of[tile.site] for tile in tiles if tile.crossbar in drawn))
    colour = {name: number for number, name in enumerate(names)}
    rectangles: list[Rectangle] = []
    for tile in tiles:
        if tile.crossbar not in drawn:
            continue
        x, y = corners[tile.crossbar]
        text = f"{tile.site}: {tile.rows} rows, {tile.columns} columns, crossbar {tile.crossbar}"
        number = colour[rows_of[tile.site]]
        step = tile.columns / tile.groups / columns * wide, tile.rows / tile.groups / rows * high
        block = max(step[0], _VISIBLE), max(step[1], _VISIBLE)
        start = x + tile.column / columns * wide, y + tile.row / rows * high
        rectangles += [
            (start[0] + g * step[0], start[1] + g * step[1], *block, number, text)
            for g in range(tile.groups)
        ]
    frames = [(*corner, wide, high) for corner in corners.values()]
    height = math.ceil(len(drawn) / across) * (high + 8)
    picture = boxes(frames, rectangles, across * (wide + 8), height)
    return names, picture, len(numbers) - len(drawn)
