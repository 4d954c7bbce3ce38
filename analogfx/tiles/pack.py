"""Which crossbar holds a part, and where on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """A crossbar, and the row and column of it where a part begins."""

    crossbar: int
    row: int
    column: int


def one_each(count: int) -> list[Place]:
    """A crossbar for every part."""
    return [Place(number, 0, 0) for number in range(count)]


class _Open:
    """A crossbar with room left: shelves of parts side by side."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows = 0
        """Rows that shelves take."""
        self.shelves: list[list[int]] = []
        """First row, height, and columns taken of each shelf."""

    def is_full(self, last_row: int, last_column: int) -> bool:
        """Whether no part can begin at or before these, on a new shelf or on one of its own."""
        return self.rows > last_row and all(taken > last_column for _, _, taken in self.shelves)


def shelves(sizes: Sequence[tuple[int, int]], crossbar: tuple[int, int]) -> list[Place]:
    """Several parts on one crossbar where they fit, none over another.

    Shelves, first fit by decreasing height: a part goes to the first shelf that has room, else to
    a new shelf of the first crossbar that has room. Not the least number of crossbars that can be,
    which is a hard problem.

    Args:
        sizes: rows and columns of every part, none larger than a crossbar.
        crossbar: rows and columns.

    Source: the level heuristic FFDH of Coffman et al., SIAM J. Comput. 9 (1980).
    """
    rows, columns = crossbar
    lowest = min((height for height, _ in sizes), default=0)
    narrowest = min((width for _, width in sizes), default=0)
    places: list[Place] = [Place(0, 0, 0)] * len(sizes)
    opened: list[_Open] = []
    count = 0
    for part in sorted(range(len(sizes)), key=lambda n: (-sizes[n][0], -sizes[n][1], n)):
        height, width = sizes[part]
        if (height, width) == crossbar:  # nothing will share it
            places[part], count = Place(count, 0, 0), count + 1
            continue
        place = next((p for bar in opened if (p := _put(bar, height, width, rows, columns))), None)
        if place is None:
            opened.append(_Open(count))
            count += 1
            place = _put(opened[-1], height, width, rows, columns)
            assert place is not None
        places[part] = place
        bar = next(bar for bar in reversed(opened) if bar.number == place.crossbar)
        if bar.is_full(rows - lowest, columns - narrowest):
            opened.remove(bar)
    order = {place.crossbar: None for place in places}  # numbered by the parts' own order
    number = {old: new for new, old in enumerate(order)}
    return [place._replace(crossbar=number[place.crossbar]) for place in places]


def _put(bar: _Open, height: int, width: int, rows: int, columns: int) -> Place | None:
    for shelf in bar.shelves:
        row, tall, taken = shelf
        if height <= tall and taken + width <= columns:
            shelf[2] += width
            return Place(bar.number, row, taken)
    if bar.rows + height > rows:
        return None
    bar.shelves.append([bar.rows, height, width])
    bar.rows += height
    return Place(bar.number, bar.shelves[-1][0], 0)
