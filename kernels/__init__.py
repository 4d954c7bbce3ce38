"""The arithmetic of one analog product, on tensors and scalars: torch reference and Triton.

``analogfx.kernels.use("auto" | "triton" | "reference")`` chooses; see :mod:`.dispatch`.
"""

# Import nothing here. With the repository root on sys.path, transformers takes this folder for the
# package of the same name that it supports, and an import in here breaks its own.

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "use":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from analogfx.kernels.dispatch import use

    return use
