"""Fields of a record that is not to be trusted: each is of its type, or a ValueError says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec

_RANGE_MODES = ("none", "static", "fast", "dynamic")


def text(value: Any, name: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.50}, not a text")
    return value


def one_of(value: Any, known: Collection[str], name: str) -> str:
    """One of some strings."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r:.50}, not one of {', '.join(known)}")
    return value


def listed(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.50}, not a list")
    return value


def texts(value: Any, name: str) -> tuple[str, ...]:
    """Strings, one at least."""
    found = tuple(text(v, name) for v in listed(value, name))
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def whole(value: Any, name: str, least: int = 0) -> int:
    """An integer that is not too small."""
    if type(value) is not int or not least <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r:.50}, not a whole number from {least} on")
    return value


def wholes(value: Any, name: str, least: int = 0) -> tuple[int, ...]:
    """Integers that are not too small, one at least."""
    found = tuple(whole(v, name, least) for v in listed(value, name))
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.50}, not true or false")
    return value


def strength(value: Any, name: str) -> float:
    """A finite float, not negative."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r:.50}, not a number from 0 on")
    return float(value)


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    return wholes(value, name, least=1)


def _range_mode(value: Any, name: str) -> str:
    return one_of(value, _RANGE_MODES, name)


_SPEC: dict[str, Callable[[Any, str], Any]] = {
    "in_sizes": _sizes,
    "out_sizes": _sizes,
    "groups": lambda value, name: whole(value, name, least=1),
    "range_mode": _range_mode,
    "inp_res": strength,
    "weight_states": strength,
    "weight_per_channel": flag,
    "noise_std": strength,
    "noise_per_channel": flag,
    "out_noise": strength,
    "out_noise_per_channel": flag,
    "out_bound": strength,
    "out_res": strength,
    "bound_per_channel": flag,
}
"""The recorded scalars, and how each is read."""


def spec(record: Any) -> MVMSpec:
    """The scalars of a site, with exactly the recorded fields."""
    if set(record) != set(_SPEC):
        raise ValueError(f"spec has {sorted(record)!r:.200}, not {sorted(_SPEC)}")
    return MVMSpec(**{name: read(record[name], name) for name, read in _SPEC.items()})


def window(record: Any) -> Window | None:
    """The geometry of a convolution, or None."""
    if record is None:
        return None
    if set(record) != set(Window._fields):
        raise ValueError(f"window has {sorted(record)!r:.200}, not {list(Window._fields)}")
    least = {"padding": 0}
    read = {name: wholes(record[name], name, least.get(name, 1)) for name in Window._fields}
    if len({len(values) for values in read.values()}) > 1:
        raise ValueError("window has axes of different counts")
    return Window(**read)  # type: ignore[arg-type]
