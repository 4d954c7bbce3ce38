"""What differs between versions of other packages: each with the version and the reason.

The one place that knows of versions. Code elsewhere asks whether a difference is :func:`there`.
Importing this module says which versions are not supported.
"""

from __future__ import annotations

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
"""The oldest versions that are tested, with each other."""


class Difference(NamedTuple):
    """Something that versions of a package before one lack."""

    package: str
    before: tuple[int, int]
    reason: str


UNBOXED = Difference(
    "torch", (2, 12), "what Inductor makes of an op outside of it has no wrap_for_lowering"
)
CHECKPOINTS = Difference(
    "torch", (2, 12), "AOT autograd fails where a checkpointed block holds ops that draw or count"
)
ONE_WRITER = Difference(
    "onnx-ir", (1, 1), "save writes weights in one thread and takes no options for more"
)
NUMPY_2_3 = Difference(
    "triton",
    (3, 7),
    "the interpreter makes integers of arrays of one element, as NumPy 2.4 forbids",
)


@functools.cache
def installed(package: str) -> tuple[int, int] | None:
    """The first two numbers of a package's version, None where it is not installed."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version(package))
    except PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def there(difference: Difference) -> bool:
    """Whether the installed version of a package is one that lacks something."""
    found = installed(difference.package)
    return found is not None and found < difference.before


def too_old(package: str) -> str:
    """Why a package's version does not serve; empty where it serves or is not installed."""
    found, oldest = installed(package), OLDEST[package]
    if found is None or found >= oldest:
        return ""
    return f"{package} {_text(found)} is older than {_text(oldest)}, the oldest that is supported"


def _text(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def require() -> None:
    """Refuse a torch that is too old, and warn of a Triton that is.

    Raises:
        ImportError: torch is too old. Without Triton's kernels torch computes everything.
    """
    if reason := too_old("torch"):
        raise ImportError(f"analogfx: {reason}; upgrade it")
    if reason := too_old("triton"):
        warnings.warn(f"analogfx: {reason}: torch computes all products", stacklevel=2)


require()
