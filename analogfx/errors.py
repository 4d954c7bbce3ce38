"""The errors that analogfx raises on purpose, each saying what was found and what would do."""

import reprlib
from collections.abc import Iterable
from typing import NamedTuple

_LONGEST = 300
"""Characters of a message that one value may take."""
_MOST = 50
"""Lines of a message about a config."""


def shown(value: object) -> str:
    """``repr`` of a value, with the middle left out where it is long.

    Whoever reads a message needs to recognise the value, not to have all of it; a value that
    comes from a file may be of any size, and Python refuses to print an integer of 5,000 digits.

    Args:
        value: anything.

    Returns:
        At most 300 characters.

    Example:
        >>> shown("a" * 1000)[-8:]
        "aaaaaaa'"
    """
    reader = reprlib.Repr()
    reader.maxstring = reader.maxother = reader.maxlong = _LONGEST
    reader.maxdict = reader.maxlist = reader.maxtuple = reader.maxset = 20
    try:
        text = reader.repr(value)
    except ValueError:
        text = f"<{type(value).__name__}>"
    return abridged(text)


def abridged(text: str) -> str:
    """A text of at most 300 characters, with the middle left out where it is longer."""
    if len(text) <= _LONGEST:
        return text
    half = (_LONGEST - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


class AnalogfxError(Exception):
    """Base class of all errors below."""


class PassError(AnalogfxError):
    """A pass of the caller's own failed, or left a graph that is not well formed."""


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
    """An RPU config that cannot run; lists every conflict, one a line, of the first 50.

    Long values are abridged in the text; ``conflicts`` has them whole.

    Args:
        conflicts: All that is wrong with the config.
        module: Path of the module that the config was meant for, if it is known.
    """

    def __init__(self, conflicts: Iterable[Conflict], module: str = "") -> None:
        self.conflicts = list(conflicts)
        self.module = module
        super().__init__(self.conflicts, module)

    def __str__(self) -> str:
        prefix = f"{abridged(self.module)}: " if self.module else ""
        lines = [
            f"{prefix}{abridged(field)} = {shown(value)}: expected {abridged(valid)}"
            for field, value, valid in self.conflicts[:_MOST]
        ]
        if len(self.conflicts) > _MOST:
            lines.append(f"{prefix}{len(self.conflicts) - _MOST} more")
        return "\n".join(lines)


class CaptureError(AnalogfxError):
    """A module whose graph cannot be captured."""


class PlacementError(AnalogfxError):
    """With ``strict=True``: a product with a weight stayed digital without being asked to."""


class CheckpointError(AnalogfxError):
    """A checkpoint that is damaged, foreign, or made for another model."""


class CompatError(AnalogfxError):
    """A layer or a config that another toolkit has not, or a toolkit that is not installed."""


class OnnxError(AnalogfxError):
    """An ONNX export that cannot be made or that disagrees, or a file that cannot be read."""


class KernelError(AnalogfxError, RuntimeError):
    """Triton was asked for where its kernels cannot serve; says why."""


class MetricError(AnalogfxError, TypeError):
    """A metric of a model that gave something else than a number."""


class CalibrationError(AnalogfxError, ValueError):
    """A calibration that was asked for in a way that cannot be done, or got no data."""
