"""What is done to some modules of an analog model, to see how much it hurts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from analogfx.chip.compensation import BaseDriftCompensation
from analogfx.chip.model import NoiseModel
from analogfx.config import TorchInferenceRPUConfig, resolve
from analogfx.device import program
from analogfx.errors import ConfigError, Conflict
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.placement import Placement


class Perturbation:
    """Base: what becomes of some modules inside a context. The model is untouched outside of it."""

    random = False
    """Whether another seed gives another result."""

    def applied(
        self, analog: nn.Module, modules: Collection[AnalogModule], seed: int
    ) -> AbstractContextManager[None]:
        """The context. Modules that are not named multiply exactly, as they do without it."""
        raise NotImplementedError

    def describe(self) -> str:
        """The perturbation and its parameters, in words that another one does not have."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProgrammingNoise(Perturbation):
    """The modules' weights are read from a chip, of which the seed is the number.

    A module has the same noise alone as on a chip that holds the whole model.
    """

    noise_model: NoiseModel | None = None
    """For all modules; None for each config's own."""
    compensation: BaseDriftCompensation | None = None
    """For the drift; None as the configs say."""
    seconds: float = 1.0
    """After programming."""

    random = True

    @contextmanager
    def applied(
        self, analog: nn.Module, modules: Collection[AnalogModule], seed: int
    ) -> Iterator[None]:
        """Inside, the modules multiply by what the chip holds."""
        chip = program(analog, self.noise_model, self.compensation, seed)
        with chip.part(modules).at(self.seconds, read=0):
            yield

    def describe(self) -> str:
        """By the records of its parts."""
        parts = [part and part.to_dict() for part in (self.noise_model, self.compensation)]
        return f"programming noise {json.dumps(parts)}, {self.seconds!r} s"

    def __str__(self) -> str:
        model = (
            "the configs' noise" if self.noise_model is None else type(self.noise_model).__name__
        )
        return f"{model}, {self.seconds:g} s after programming"


@dataclass(frozen=True)
class ChangedConfig(Perturbation):
    """Some fields of the modules' configs are others: fewer converter steps, fewer weight states.

    Example:
        >>> ChangedConfig({"forward.inp_res": analogfx.bits(4), "forward.out_res": 14})
    """

    fields: Mapping[str, Any]
    """By dotted name."""

    @contextmanager
    def applied(
        self, analog: nn.Module, modules: Collection[AnalogModule], seed: int
    ) -> Iterator[None]:
        """Inside, the modules compute with the changed configs; their ranges are what they are.

        Raises:
            ConfigError: a field that does not exist, or that ranges and clips depend on.
        """
        placements = {module: self._placed(module) for module in modules}
        with _placed(placements):
            yield

    def describe(self) -> str:
        """Every field and its value."""
        return f"changed {json.dumps(dict(self.fields), sort_keys=True, default=str)}"

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.fields.items())

    def _placed(self, module: AnalogModule) -> Placement:
        before = module._analog
        config = TorchInferenceRPUConfig.from_dict(before.config.to_dict())
        for name, value in self.fields.items():
            section: Any = config
            *path, last = name.split(".")
            for part in path:
                section = getattr(section, part, None)
            if section is None:
                raise ConfigError([Conflict(name, value, "a field of a config")], before.name)
            setattr(section, last, value)
        new, old = resolve(config), before.resolved
        kept = ("max_input_size", "max_output_size", "range_mode", "learnable_clip")
        if any(getattr(new, name) != getattr(old, name) for name in kept):
            valid = "fields that change neither tiles nor what a module remembers"
            raise ConfigError([Conflict("perturb", dict(self.fields), valid)], before.name)
        after = Placement(before.name, config)
        after.prepare(module)
        return after


@dataclass(frozen=True)
class Digital(Perturbation):
    """The modules compute as they did before ``analogize``."""

    @contextmanager
    def applied(
        self, analog: nn.Module, modules: Collection[AnalogModule], seed: int
    ) -> Iterator[None]:
        """Inside, the modules run their own forward."""
        with _placed({module: _DigitalPlacement(module._analog) for module in modules}):
            yield

    def describe(self) -> str:
        """One word."""
        return "digital"

    def __str__(self) -> str:
        return "digital"


class _DigitalPlacement(Placement):
    """A placement whose calls run the digital forward."""

    def __init__(self, placement: Placement) -> None:
        self.__dict__.update(placement.__dict__)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        digital: Any = module.digital_forward
        return digital(*args, **kwargs)


@contextmanager
def _placed(placements: Mapping[AnalogModule, Placement]) -> Iterator[None]:
    """Inside this context modules have other placements."""
    before = {module: module._analog for module in placements}
    try:
        for module, placement in placements.items():
            module._analog = placement
        yield
    finally:
        for module, placement in before.items():
            module._analog = placement


def as_perturbation(value: Any) -> Perturbation:
    """A perturbation as such, as a noise model, None, ``"digital"``, or fields of a config.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(value, Perturbation):
        return value
    if value is None or isinstance(value, NoiseModel):
        return ProgrammingNoise(value)
    if value == "digital":
        return Digital()
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
        return ChangedConfig(dict(value))
    valid = "a noise model, None for the configs' own, 'digital', or fields of a config by name"
    raise ConfigError([Conflict("perturb", value, valid)])
