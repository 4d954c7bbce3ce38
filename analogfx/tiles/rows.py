"""What a tile map lists: parts on crossbars, and the sites that they are parts of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A part of a site's matrix on a crossbar."""

    site: str
    tile_row: int
    """Place among the site's parts, along its inputs."""
    tile_column: int
    """And along its outputs."""
    slice: int
    """Which of the devices of a weight, 0 the least significant."""
    crossbar: int
    row: int
    """First row on the crossbar."""
    column: int
    rows: int
    """Rows that it drives."""
    columns: int
    """Columns that it reads."""
    cells: int
    """Cells that hold weights; fewer than rows x columns where groups lie on the diagonal."""
    devices: int
    inputs: tuple[int, int]
    """Inputs of each group that it takes, from and up to."""
    outputs: tuple[int, int]
    """Outputs that it gives, of the outputs of all groups."""
    groups: int
    """Groups on its diagonal; 1 for a plain matrix."""
    input_tile: int
    """The tile of the site, along the inputs, that it is a part of: the number of its range."""


@dataclass(frozen=True)
class MappedSite:
    """An analog product and what it needs of a chip."""

    name: str
    outputs: int
    """Of all groups."""
    inputs: int
    """Of one group."""
    groups: int
    grid: tuple[int, int]
    """Parts along the inputs and along the outputs."""
    crossbars: int
    """Crossbars that hold something of it."""
    cells: int
    devices: int
    vectors: int | None
    """Vectors that it multiplies in one forward; None if no inputs were given."""
    finer: bool
    """Whether a tile that the model computes as one is cut further, to fit a crossbar."""

    @property
    def macs(self) -> int | None:
        """Multiplications in one forward."""
        return None if self.vectors is None else self.vectors * self.outputs * self.inputs
