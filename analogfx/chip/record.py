"""Parts of a chip as plain data: a name and parameters, never an import path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from analogfx.errors import ConfigError, Conflict

RecordT = TypeVar("RecordT", bound="Record")

_classes: dict[str, type[Record]] = {}
"""Every class of parts that this process has defined, by name."""


class Record:
    """A part that equals another of its class with the same parameters, and can be written down.

    A class of one's own is a dataclass whose fields are its parameters. A file that names it can
    be read once the class is defined: reading imports nothing.
    """

    kind: ClassVar[str] = "part of a chip"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        known = _classes.get(cls.__name__)
        if known is not None and known.__module__.startswith("analogfx.chip."):
            raise TypeError(f"{cls.__name__} is the name of {known.__module__}'s: choose another")
        _classes[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """The name of the class under ``"name"``, and every parameter.

        Raises:
            ConfigError: the class is no dataclass, so that its parameters are not known.
        """
        kind: Any = type(self)
        if not _has_fields(kind):
            valid = (
                f"a dataclass: to write {type(self).__name__} down, its parameters must be known"
            )
            raise ConfigError([Conflict(self.kind, self, valid)])
        return {"name": type(self).__name__} | {
            item.name: _plain(getattr(self, item.name)) for item in fields(kind)
        }

    @classmethod
    def adopted(cls, attributes: dict[str, Any]) -> dict[str, Any]:
        """Parameters by the attributes of another package's object of this name."""
        return attributes

    def refuse(self, name: str, valid: str) -> None:
        """Refuse the value of a parameter.

        Raises:
            ConfigError: always.
        """
        where = f"{type(self).__name__}.{name}"
        raise ConfigError([Conflict(where, getattr(self, name), valid)])

    def check_numbers(self, **lowest: float) -> None:
        """Refuse parameters that are no finite numbers, or below what they must at least be."""
        for name, least in lowest.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < least:
                self.refuse(name, f"a number from {least:g} on")


def read(kind: type[RecordT], value: object, where: str) -> RecordT:
    """A part of a kind: itself, or made from what ``to_dict`` wrote, or from AIHWKIT's own object.

    An object of another package is recognised by the name of its class, and read by its
    attributes, of which those that are no parameters of ours are left out.

    Args:
        where: the field that it is for, for the message.

    Raises:
        ConfigError: an unknown name, unknown parameters, or another type.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        given = {str(k): v for k, v in value.items() if k != "name"}
        found: Any = _classes.get(str(value.get("name")))
        strict = True
    else:
        given = dict(vars(value)) if hasattr(value, "__dict__") else {}
        found, strict = _classes.get(type(value).__name__), False
    names: list[str] = []
    if found is not None and _has_fields(found):
        names = [item.name for item in fields(found)]
    if found is None or not issubclass(found, kind):
        known = sorted(n for n, c in _classes.items() if issubclass(c, kind) and _has_fields(c))
        raise ConfigError([Conflict(where, value, f"a {kind.kind}: {', '.join(known)}")])
    if not strict:
        given = found.adopted(given)
    unknown = sorted(set(given) - set(names))
    if strict and unknown:
        raise ConfigError(
            [Conflict(f"{where}.{n}", given[n], f"one of {', '.join(names)}") for n in unknown]
        )
    made = found(**{name: v for name, v in given.items() if name in names})
    assert isinstance(made, kind)
    return made


def _has_fields(kind: Any) -> bool:
    return is_dataclass(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def number_keys(table: Mapping[Any, Any]) -> dict[float, list[float]]:
    """A table by numbers, whose keys JSON has made texts."""
    return {float(key): [float(v) for v in values] for key, values in table.items()}
