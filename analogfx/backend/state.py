"""Input ranges of a compiled digital model, kept for the module that multiplies.

A compiler that must not touch the model keeps its state beside it: one set of ranges for every way
a module reads a weight. All graphs of a model share it, whatever is compiled again and whatever
tensors take the weights' places. Names are those that ``analogize`` would register, so state goes
both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.config import Resolved
from analogfx.errors import PlacementError
from analogfx.state import RANGES, StateNames, as_state, precision, state_names


@dataclass(frozen=True)
class Place:
    """Where the module is that multiplies by a parameter, seen from the parameter.

    It is the same for every module whose code is the same, as a path is not.
    """

    holder: int = 0
    """Which of the names that the parameter has in the model leads to the module."""
    above: int = 1
    """How many parts of that name come after the module's path."""

    def parts(self, name: str) -> tuple[str, str]:
        """The module's path, and the parameter's name from there."""
        parts = name.split(".")
        return ".".join(parts[: -self.above]), ".".join(parts[-self.above :])


@dataclass(frozen=True)
class Slot:
    """One use of a weight, in terms that hold for every module whose code is the same."""

    derivation: str
    """How the weight is computed from its parameter."""
    ranges: tuple[int, ...]
    """Shape of the ranges."""
    config: Resolved
    place: Place = Place()


@dataclass(frozen=True)
class Home:
    """The module that multiplies by a parameter, and the parameter's name from there."""

    module: nn.Module
    parameter: str


class RangeState:
    """Ranges of one slot and the statistics that set them, each of the slot's shape."""

    def __init__(self, slot: Slot, weight: Tensor) -> None:
        """State that has seen no data."""
        self._tensors = tuple(
            torch.full(
                variable.shape(slot.ranges, 0),
                variable.initial(slot.config) if variable.initial else 0,
                dtype=variable.dtype(weight.dtype),
                device=weight.device,
            )
            for variable in RANGES
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which a site registers them."""
        return self._tensors

    @staticmethod
    def names() -> tuple[str, ...]:
        """What the names of all states end in."""
        return StateNames().ranges()

    def named(self, names: StateNames) -> dict[str, Tensor]:
        """The tensors by their names on a module."""
        return dict(zip(names.ranges(), self._tensors, strict=True))

    def follow(self, weight: Tensor) -> None:
        """Go where the model has gone: its device, and double precision or single."""
        first = self._tensors[0]
        if first.device != weight.device or first.dtype != precision(weight.dtype):
            with torch.inference_mode(False):
                self._tensors = tuple(
                    t.to(weight.device, variable.dtype(weight.dtype))
                    for variable, t in zip(RANGES, self._tensors, strict=True)
                )


@dataclass
class _Ranges:
    """What is kept for one module."""

    uses: dict[tuple[str, Slot], RangeState] = field(default_factory=dict)
    """By the parameter's name, and how it is used."""
    loaded: dict[str, Tensor] = field(default_factory=dict)
    """State that was loaded for the module, by its names there, perhaps before it ran."""
    path: str = ""
    """The module's path when that was, for messages."""

    def named(self) -> Iterator[tuple[list[StateNames], RangeState]]:
        """Every state with the names that it may have, the likeliest first."""
        names = state_names([parameter for parameter, _ in self.uses])
        for name, ((parameter, _), state) in zip(names, self.uses.items(), strict=True):
            # If the module's other products have not run, the names may be those of several, too.
            of_several = StateNames(f"{parameter.replace('.', '_')}_")
            yield ([name, of_several] if len(names) == 1 else [name]), state

    def load(self, loaded: dict[str, Tensor], path: str) -> None:
        """Take state for the module; nothing of it if it does not fit.

        Raises:
            PlacementError: see :meth:`matched`; or it is for one product, and there are several.
        """
        named_alike = [n for n in RangeState.names() if n in loaded]
        if named_alike and len(self.uses) > 1:
            valid = " or ".join(repr(names[0].input_range) for names, _ in self.named())
            raise PlacementError(
                f"{path or 'the model'}: the state has {named_alike[0]!r}, of a single product, "
                f"and the module multiplies by {len(self.uses)} weights: rename it to {valid}"
            )
        matched = [*self.matched(loaded, path, self.uses.values())]
        self.loaded, self.path = loaded, path
        _copy(matched)

    def use(self, parameter: str, slot: Slot, weight: Tensor) -> RangeState:
        """The state of one use, from what was loaded if there is such.

        Raises:
            PlacementError: see :meth:`matched`.
        """
        key = parameter, slot
        if key not in self.uses:
            self.uses[key] = made = RangeState(slot, weight)
            try:
                _copy(self.matched(self.loaded, self.path, [made]))
            except PlacementError:
                del self.uses[key]
                raise
        return self.uses[key]

    def matched(
        self, loaded: Mapping[str, Tensor], path: str, states: Iterable[RangeState]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is kept of some states, each with what was loaded for it.

        Raises:
            PlacementError: it is for another number of tiles.
        """
        wanted = [*map(id, states)]
        for names, state in self.named():
            found = (item for n in names for item in state.named(n).items())
            for name, value in found if id(state) in wanted else ():
                if name not in loaded:
                    continue
                if value.shape != loaded[name].shape:
                    raise PlacementError(
                        f"{path + '.' if path else ''}{name}: the state loaded is for "
                        f"{loaded[name].numel()} tiles, the config cuts the weight into "
                        f"{value.numel()}"
                    )
                yield value, loaded[name]


def _copy(matched: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for value, loaded in matched:
            value.copy_(as_state(loaded, value))


_by_module: WeakKeyDictionary[nn.Module, _Ranges] = WeakKeyDictionary()
_by_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> {Slot: RangeState}


def state_of(weight: Tensor, slot: Slot, home: Callable[[], Home | None]) -> RangeState:
    """The state of one use of a weight, made on its first use.

    Args:
        home: finds the module that multiplies; called for a weight that was not seen before.
    """
    slots: dict[Slot, RangeState] | None = _by_weight.get(weight)
    if slots is None:
        _by_weight[weight] = slots = {}
    if slot not in slots:
        slots[slot] = _state_at(home(), weight, slot)
    state = slots[slot]
    state.follow(weight)
    return state


def _state_at(home: Home | None, weight: Tensor, slot: Slot) -> RangeState:
    """The state that a module has for one of its weights, whichever tensor that was so far."""
    with torch.inference_mode(False):
        if home is None:
            return RangeState(slot, weight)
        ranges = _by_module.setdefault(home.module, _Ranges())
        return ranges.use(home.parameter, slot, weight)


# ------------------------------------------------------------------------------ names in a model


class Names:
    """Where in a model a parameter is."""

    def __init__(self, model: nn.Module | None) -> None:
        """The names as they are now."""
        self.model = model
        self.of: dict[int, list[str]] = {}
        """All names of a parameter, by its id."""
        named = [] if model is None else model.named_parameters(remove_duplicate=False)
        for name, parameter in named:
            self.of.setdefault(id(parameter), []).append(name)

    def locate(self, weight: Tensor, module: nn.Module) -> Place:
        """The place of a module that multiplies by a parameter."""
        for holder, name in enumerate(self.of.get(id(weight), ())):
            for above in range(1, name.count(".") + 2):
                place = Place(holder, above)
                if self._module(place.parts(name)[0]) is module:
                    return place
        return Place()

    def at(self, weight: Tensor, place: Place) -> tuple[str, str] | None:
        """The path of the module at a place, and the parameter's name from there.

        None where the weight is no model's.
        """
        names = self.of.get(id(weight), [])
        return place.parts(names[place.holder]) if place.holder < len(names) else None

    def home(self, weight: Tensor, place: Place) -> Home | None:
        """The module at a place; None where the weight is no model's."""
        found = self.at(weight, place)
        return None if found is None else Home(self._module(found[0]), found[1])

    def _module(self, path: str) -> nn.Module:
        assert self.model is not None
        return self.model.get_submodule(path)


# ------------------------------------------------------------------------------- for the user


class BackendState:
    """The ranges of a model that ``torch.compile(model, backend="analogfx")`` runs.

    ``state_dict()`` has the names that ``analogize(model, rpu_config).state_dict()`` gives the
    same tensors, so that either loads the other's.
    """

    def __init__(self, model: nn.Module) -> None:
        """The state of a model; empty until it has run.

        Args:
            model: what ``torch.compile`` returned, or the model that it was given.

        Raises:
            TypeError: it is no module.
        """
        model = getattr(model, "_orig_mod", model)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"backend_state() takes a compiled module, found {type(model).__name__}"
            )
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Ranges, counts and extremes by name; the tensors that the graphs use."""
        return {
            f"{path}.{name}" if path else name: value
            for path, module in self.model.named_modules(remove_duplicate=False)
            if module in _by_module
            for names, state in _by_module[module].named()
            for name, value in state.named(names[0]).items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take ranges from a state dict, of this kind or of an analogized model.

        What is no range is passed over, so that a whole checkpoint may be given. Ranges of sites
        that have not run yet are kept for when they do.

        Raises:
            PlacementError: a range belongs to no module of the model, to other tiles, or to one
                product of a module that has several.
        """
        by_path: dict[str, dict[str, Tensor]] = {}
        for full, value in state_dict.items():
            if full.endswith(RangeState.names()):
                path, _, name = full.rpartition(".")
                by_path.setdefault(path, {})[name] = value.detach().clone()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if missing := [f"{p}.{n}" for p in by_path.keys() - modules.keys() for n in by_path[p]]:
            names = ", ".join(sorted(missing))
            raise PlacementError(f"no module of the model has these ranges: {names}")
        for path, loaded in by_path.items():
            _by_module.setdefault(modules[path], _Ranges()).load(loaded, path)


def backend_state(model: nn.Module) -> BackendState:
    """The input ranges that ``torch.compile(model, backend="analogfx")`` keeps for a model.

    Example:
        ``torch.save(backend_state(compiled).state_dict(), "ranges.pt")``, and later
        ``backend_state(compiled).load_state_dict(torch.load("ranges.pt"))``.

    Args:
        model: what ``torch.compile`` returned, or the model that it was given.

    Raises:
        TypeError: it is no module.
    """
    return BackendState(model)
