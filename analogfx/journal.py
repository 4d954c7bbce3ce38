"""Measurements in a file, so that a long run goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from analogfx import files
from analogfx.device import key
from analogfx.errors import CheckpointError
from analogfx.modules.sites import required_sites

SCHEMA = 1


class Journal:
    """Measurements by key, written line by line as they are made.

    The first line says what is measured; a file that says something else is refused. A line that
    an interruption cut short is measured again.
    """

    def __init__(self, path: str | os.PathLike[str] | None, subject: dict[str, Any]) -> None:
        """Read what a file has, or begin one.

        Args:
            path: None keeps nothing.
            subject: plain data; whatever changes the measurements.

        Raises:
            CheckpointError: the file is of another subject, or is none of ours.
            OSError: it cannot be written.
        """
        self.path = None if path is None else Path(path)
        self.values: dict[str, float] = {}
        if self.path is None:
            return
        head = json.dumps({"schema": SCHEMA, **subject}, sort_keys=True)
        if self.path.exists():
            self._read(head)
        lines = [head, *(self._line(name, value) for name, value in self.values.items())]
        files.write_text(self.path, "".join(line + "\n" for line in lines))

    def _read(self, head: str) -> None:
        assert self.path is not None
        first, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if first != head:
            raise CheckpointError(
                f"{self.path}: made for another model, config, perturbation, noise, seed or number "
                "of chips: name another file"
            )
        for line in lines[:-1]:  # the last one is empty, or was cut short
            try:
                record = json.loads(line)
                self.values[record["key"]] = float(record["value"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.path} is damaged: {line[:80]!r}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def __setitem__(self, name: str, value: float) -> None:
        self.values[name] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(self._line(name, value) + "\n")

    def _line(self, name: str, value: float) -> str:
        return json.dumps({"key": name, "value": value})


def fingerprint(analog: nn.Module) -> str:
    """What tells an analog model from others.

    Names, shapes and some elements of all its tensors, and the configs of its analog modules.
    """
    parts: list[Any] = []
    for name, tensor in analog.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].double().cpu()
        parts.append((name, tuple(tensor.shape), *some.tolist()))
    parts += [(path, module._analog.config) for path, module, _ in required_sites(analog)]
    return f"{key(parts):016x}"
