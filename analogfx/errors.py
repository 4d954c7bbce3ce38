"""The errors that analogfx raises on purpose, each saying what was found and what would do."""

from collections.abc import Iterable
from typing import NamedTuple


class AnalogfxError(Exception):
    """Base class of all errors below."""


class Conflict(NamedTuple):
    """One field of a config that cannot stay as it is.

    Attributes:
        field: Dotted name of the field, for example ``"forward.inp_res"``.
        value: The value that was found.
        valid: What would be valid, as a noun phrase.
    """

    field: str
    value: object
    valid: str


class ConfigError(AnalogfxError, ValueError):
    """An RPU config that cannot run; lists every conflict, one a line.

    Args:
        conflicts: All that is wrong with the config.
        module: Path of the module that the config was meant for, if it is known.
    """

    def __init__(self, conflicts: Iterable[Conflict], module: str = "") -> None:
        self.conflicts = list(conflicts)
        self.module = module
        super().__init__(self.conflicts, module)

    def __str__(self) -> str:
        prefix = f"{self.module}: " if self.module else ""
        return "\n".join(
            f"{prefix}{field} = {value!r}: expected {valid}"
            for field, value, valid in self.conflicts
        )


class CaptureError(AnalogfxError):
    """A module whose graph cannot be captured."""


class PlacementError(AnalogfxError):
    """With ``strict=True``: a product with a weight stayed digital without being asked to."""


class CheckpointError(AnalogfxError):
    """A checkpoint that is damaged, foreign, or made for another model."""


class OnnxError(AnalogfxError):
    """An ONNX export that cannot be made or that disagrees, or a file that cannot be read."""


class KernelError(AnalogfxError, RuntimeError):
    """Triton was asked for where its kernels cannot serve; says why."""


class CalibrationError(AnalogfxError, ValueError):
    """A calibration that was asked for in a way that cannot be done, or got no data."""
