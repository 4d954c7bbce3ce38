"""What the tiles of one site do, in plain scalars: the only thing kernels know of a config."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints


class MVMSpec(NamedTuple):
    """Scalars of a fused matrix-vector product on tiles.

    Resolutions follow the config's convention: above 1 they count states, up to 1 they are a
    fraction of the full range, 0 means off. Every other strength is off at 0, too.
    """

    groups: int
    """Independent matrices side by side (1 for a linear layer)."""
    in_sizes: list[int]
    """Inputs of each tile; they sum to the inputs of one group."""
    out_sizes: list[int]
    """Outputs of each row of tiles; they sum to the outputs of all groups."""
    range_mode: str
    """"none", "static", "fast" or "dynamic"."""
    decay: float
    input_min_percentage: float
    inp_res: float
    weight_states: float
    """Number of weight states, 0 for continuous weights."""
    weight_per_channel: bool
    noise_std: float
    """Weight noise over the tile's (or the row's) largest weight."""
    noise_per_channel: bool
    out_noise: float
    """Noise of each tile's outputs over its range and largest weight."""
    out_noise_per_channel: bool
    out_bound: float
    out_res: float
    bound_per_channel: bool
    keep: bool
    """Whether the forward keeps what the backward would otherwise compute again."""

    @property
    def needs_max(self) -> bool:
        """Whether the forward reads the rows' largest weights."""
        return bool(self.weight_states or self.noise_std or self.out_noise or self.out_bound)


_SCHEMA_TYPES = {int: "int", list[int]: "int[]", str: "str", float: "float", bool: "bool"}


def schema(spec: type[tuple]) -> str:
    """The arguments of a ``torch.library`` schema that carry the fields of a spec, in order."""
    fields = get_type_hints(spec).items()
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
