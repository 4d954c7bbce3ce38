"""A picture of crossbars and of what fills them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from analogfx.tiles.rows import Tile


def draw(
    tiles: Sequence[Tile],
    rows_of: Mapping[str, str],
    crossbar: tuple[int, int],
    utilisation: float,
    path: str | os.PathLike[str],
    limit: int,
) -> None:
    """Every crossbar as a square, every part as a rectangle in the colour of its row of the table.

    Args:
        rows_of: the row of the table that a site went to.
        path: a picture; its ending says of which kind.
        limit: crossbars to draw.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    rows, columns = crossbar
    numbers = sorted({tile.crossbar for tile in tiles})
    shown = numbers[:limit]
    across = max(1, math.ceil(math.sqrt(len(shown) * 1.6)))
    down = max(1, math.ceil(len(shown) / across))
    names = list(dict.fromkeys(rows_of[t.site] for t in tiles if t.crossbar in set(shown)))
    hues = {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}
    figure = Figure(figsize=(max(5.0, across * 0.9), down * 0.9 + 1.4), layout="constrained")
    axes = figure.subplots()
    step_x, step_y = columns * 1.12, rows * 1.2
    corners = {
        number: (place % across * step_x, place // across * step_y)
        for place, number in enumerate(shown)
    }
    for x, y in corners.values():
        axes.add_patch(Rectangle((x, y), columns, rows, fill=False, lw=0.6, ec="gray"))
    for tile in tiles:
        if tile.crossbar not in corners:
            continue
        x, y = corners[tile.crossbar]
        high, wide = tile.rows / tile.groups, tile.columns / tile.groups
        for group in range(tile.groups):  # the blocks of a diagonal
            corner = x + tile.column + group * wide, y + tile.row + group * high
            axes.add_patch(Rectangle(corner, wide, high, fc=hues[rows_of[tile.site]], ec="none"))
    axes.set_xlim(-0.05 * columns, across * step_x)
    axes.set_ylim(down * step_y, -0.05 * rows)
    axes.set_aspect(rows / columns if rows < columns else 1.0)
    axes.set_axis_off()
    left = len(numbers) - len(shown)
    figure.suptitle(
        f"{len(numbers)} crossbars of {rows}x{columns}, {utilisation:.1%} used"
        + (f"; {left} more not drawn" if left else ""),
        fontsize=10,
    )
    handles = [Patch(color=hues[name], label=name) for name in names[:20]]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=7
    )
    figure.savefig(path, dpi=150)
