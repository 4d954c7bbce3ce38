"""What the tiles of one site do, in plain scalars: the only thing kernels know of a config."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar


class MVMSpec(NamedTuple):
    """Scalars of a fused matrix-vector product on tiles.

    Resolutions follow the config's convention: above 1 they count states, up to 1 they are a
    fraction of the full range, 0 means off. Every other strength is off at 0, too.
    """

    in_sizes: list[int]
    """Inputs of each tile; they sum to the inputs of one group."""
    out_sizes: list[int]
    """Outputs of each row of tiles; they sum to the outputs of all groups."""
    groups: int = 1
    """Independent matrices side by side (1 for a linear layer)."""
    range_mode: str = "none"
    """"none", "static", "fast" or "dynamic"."""
    decay: float = 0.0
    input_min_percentage: float = 0.0
    inp_res: float = 0.0
    weight_states: float = 0.0
    """Number of weight states, 0 for continuous weights."""
    weight_per_channel: bool = False
    noise_std: float = 0.0
    """Weight noise over the tile's (or the row's) largest weight."""
    noise_per_channel: bool = False
    out_noise: float = 0.0
    """Noise of each tile's outputs over its range and largest weight."""
    out_noise_per_channel: bool = False
    out_bound: float = 0.0
    out_res: float = 0.0
    bound_per_channel: bool = False
    keep: bool = False
    """Whether the forward keeps what the backward would otherwise compute again."""
    nonnegative: bool = False
    """Whether no input is below 0, so that a clamp has one side."""
    activation: str = ""
    """What follows the bias: "" for nothing, "relu", "gelu", "gelu_tanh" or "silu"."""
    part: Sequence[int] = ()
    """Where this matrix stands in a larger one, see ``kernels.part.Part``; empty for a whole."""
    peers: str = ""
    """The process group whose members hold rows of the same tiles; empty if none do."""
    sums: str = ""
    """The process group whose members multiply the same inputs; empty if none do."""

    @property
    def needs_max(self) -> bool:
        """Whether the forward reads the rows' largest weights."""
        return bool(self.weight_states or self.noise_std or self.out_noise or self.out_bound)

    @property
    def ends_with_product(self) -> bool:
        """Whether the product is all that a site's one tile does to its outputs.

        torch adds the bias inside of such a product, as it does for the digital layer: which
        rounds as the digital layer does on every CPU, and saves a pass over the outputs.
        """
        return len(self.in_sizes) == 1 and not (self.out_noise or self.out_bound)


class Role(NamedTuple):
    """Scalars that the explicit op of one role takes behind its tensors, in this order."""

    forward: tuple[str, ...]
    backward: tuple[str, ...] = ()
    """Those of its derivative alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.forward + self.backward

    @property
    def schema(self) -> str:
        """All of them as arguments of an op."""
        kinds = {float: "float", bool: "bool", int: "int", str: "str"}
        defaults = MVMSpec._field_defaults
        return ", ".join(f"{kinds[type(defaults[name])]} {name}" for name in self.names)


ROLES = {
    "dac": Role(("inp_res", "range_mode"), ("decay", "input_min_percentage")),
    "clip": Role(("weight_states",)),
    "quantize": Role(("weight_states",)),
    "weight_noise": Role(("noise_std",)),
    "output_noise": Role(("out_noise",)),
    "adc": Role(("out_bound", "out_res")),
}
"""By role. Explicit ops, the nodes that a pass makes of a config, what is fused of these nodes, and
the calls of the formulas in :mod:`analogfx.kernels.reference` all read this table."""


def scalars(role: str, of: object) -> tuple[Any, ...]:
    """The values of a role's forward, as its formula takes them.

    Args:
        of: a spec, or a config as plain scalars.
    """
    return _getter(ROLES[role].forward)(of)


def all_scalars(role: str, of: object) -> tuple[Any, ...]:
    """The values that the explicit op of a role takes: those of its derivative, too."""
    return _getter(ROLES[role].names)(of)


@functools.cache
def _getter(names: tuple[str, ...]) -> Callable[[object], tuple[Any, ...]]:
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda of: (get(of),)


REFERENCE_ONLY: frozenset[str] = frozenset()
"""Scalars that the explicit ops and :mod:`analogfx.kernels.linear` compute, and nothing else yet.

A new scalar starts here. Where it is on, the Triton kernels and prepared weights leave the site to
the reference, no sum is taken for one of integer codes, and recurrent layers and files refuse it.
"""


def reference_only(spec: MVMSpec) -> str:
    """Why only the reference computes a site; empty where others do, too."""
    if not REFERENCE_ONLY:
        return ""
    off = MVMSpec._field_defaults
    names = ", ".join(n for n in sorted(REFERENCE_ONLY) if getattr(spec, n) != off[n])
    return f"only the reference computes {names}" if names else ""


_Spec = TypeVar("_Spec", bound=tuple)


def encode(spec: _Spec) -> str:
    """A spec as the text that an op carries: JSON, without what is at its default.

    One argument instead of twenty: torch's bookkeeping for an op with a derivative takes time
    quadratic in the number of its arguments, over 0.1 ms a call for twenty.
    """
    defaults = spec._field_defaults  # type: ignore[attr-defined]
    values = spec._asdict().items()  # type: ignore[attr-defined]
    return json.dumps({name: v for name, v in values if v != defaults.get(name)})


@functools.lru_cache(maxsize=4096)
def decode(kind: type[_Spec], text: str) -> _Spec:
    """The spec of a kind that a text stands for. Not to be written to: equal texts share it."""
    return kind(**json.loads(text))
