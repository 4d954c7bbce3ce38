"""Input ranges of a compiled digital model, kept for the module that multiplies.

A compiler that must not touch the model keeps its state beside it: one set of ranges for every way
a module reads a weight. All graphs of a model share it, whatever is compiled again and whatever
tensors take the weights' places. Names are those that ``analogize`` would register, so state goes
both ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.config import Resolved
from analogfx.errors import PlacementError
from analogfx.kernels import reference as ref
from analogfx.module import as_state
from analogfx.passes.contract import StateNames


@dataclass(frozen=True)
class Slot:
    """One use of a weight, in terms that hold for every module whose code is the same."""

    derivation: str
    """How the weight is computed from its parameter."""
    tiles: int
    config: Resolved
    holder: int = 0
    """Which of the names that the parameter has in the model leads to the module."""
    above: int = 1
    """How many parts of that name come after the module's path."""


@dataclass(frozen=True)
class Home:
    """The module that multiplies by a parameter, and the parameter's name from there."""

    module: nn.Module
    parameter: str


@dataclass
class RangeState:
    """Ranges of one slot and the statistics that set them; each (k,) for k tiles."""

    input_range: Tensor
    count: Tensor
    x_min: Tensor
    x_max: Tensor

    @classmethod
    def initial(cls, slot: Slot, weight: Tensor) -> RangeState:
        """State that has seen no data."""

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((slot.tiles,), value, dtype=dtype, device=weight.device)

        dtype = _precision(weight)
        return cls(
            full(slot.config.init_value, dtype),
            full(0, torch.int64),
            full(-ref.UNTOUCHED, dtype),
            full(ref.UNTOUCHED, dtype),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which a site registers them."""
        return self.input_range, self.count, self.x_min, self.x_max

    @staticmethod
    def names() -> tuple[str, ...]:
        """What the names of all states end in."""
        return StateNames().all()[:4]

    def named(self, names: StateNames) -> dict[str, Tensor]:
        """The tensors by their names on a module."""
        return dict(zip(names.all(), self.tensors(), strict=False))

    def follow(self, weight: Tensor) -> None:
        """Go where the model has gone: its device, and double precision or single."""
        dtype = _precision(weight)
        if self.input_range.device != weight.device or self.input_range.dtype != dtype:
            with torch.inference_mode(False):
                self.input_range = self.input_range.to(weight.device, dtype)
                self.count = self.count.to(weight.device)
                self.x_min = self.x_min.to(weight.device, dtype)
                self.x_max = self.x_max.to(weight.device, dtype)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


_Uses = dict[tuple[str, Slot], RangeState]

_by_module: WeakKeyDictionary[nn.Module, _Uses] = WeakKeyDictionary()
_by_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> {Slot: RangeState}
_loaded: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""State that was loaded for a module, by its names there, perhaps before the model ran."""


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
            return RangeState.initial(slot, weight)
        uses = _by_module.setdefault(home.module, {})
        use = home.parameter, slot
        if use not in uses:
            uses[use] = RangeState.initial(slot, weight)
            _fill(home.module, only=uses[use])
        return uses[use]


def _named_uses(module: nn.Module) -> Iterator[tuple[list[StateNames], RangeState]]:
    """The states of a module, each with the names that it may have there, the likeliest first."""
    uses = _by_module.get(module, {})
    seen: Counter[str] = Counter()
    for (parameter, _), state in uses.items():
        stem = parameter.replace(".", "_")
        seen[stem] += 1
        number = f"_{seen[stem]}" if seen[stem] > 1 else ""
        of_several, of_one = StateNames(f"{stem}{number}_"), StateNames()
        # Of a module whose other products have not run, too, the names may be those of several.
        yield ([of_one, of_several] if len(uses) == 1 else [of_several]), state


def _fill(module: nn.Module, only: RangeState | None = None) -> None:
    """Copy what was loaded for a module into its states.

    Raises:
        PlacementError: it is for another number of tiles.
    """
    loaded = _loaded.get(module, {})
    with torch.no_grad():
        for names, state in _named_uses(module):
            for name, value in (item for n in names for item in state.named(n).items()):
                if name in loaded and only in (None, state):
                    _copy(value, loaded[name], name)


def _copy(value: Tensor, loaded: Tensor, name: str) -> None:
    if value.shape != loaded.shape:
        raise PlacementError(
            f"{name}: the state loaded is for {loaded.numel()} tiles, the config cuts the weight "
            f"into {value.numel()}"
        )
    value.copy_(as_state(loaded, value))


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

    def locate(self, weight: Tensor, module: nn.Module) -> tuple[int, int]:
        """``holder`` and ``above`` of the slot of a module that multiplies by a parameter."""
        for number, name in enumerate(self.of.get(id(weight), ())):
            parts = name.split(".")
            for above in range(1, len(parts) + 1):
                if self._module(parts[:-above]) is module:
                    return number, above
        return 0, 1

    def home(self, weight: Tensor, slot: Slot) -> Home | None:
        """The module that a slot of a weight belongs to; None where the weight is no model's."""
        names = self.of.get(id(weight), [])
        if slot.holder >= len(names):
            return None
        parts = names[slot.holder].split(".")
        return Home(self._module(parts[: -slot.above]), ".".join(parts[-slot.above :]))

    def _module(self, path: list[str]) -> nn.Module:
        assert self.model is not None
        return self.model.get_submodule(".".join(path))


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

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self.model.named_modules(remove_duplicate=False):
            yield f"{path}." if path else "", module

    def state_dict(self) -> dict[str, Tensor]:
        """Ranges, counts and extremes by name; the tensors that the graphs use."""
        return {
            prefix + name: value
            for prefix, module in self._modules()
            for names, state in _named_uses(module)
            for name, value in state.named(names[0]).items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take ranges from a state dict, of this kind or of an analogized model.

        What is no range is passed over, so that a whole checkpoint may be given. Ranges of sites
        that have not run yet are kept for when they do.

        Raises:
            PlacementError: a range belongs to no module of the model, or to other tiles.
        """
        endings = RangeState.names()
        wanted = {n: v for n, v in state_dict.items() if n.endswith(endings)}
        taken: set[str] = set()
        for prefix, module in self._modules():
            own = {
                name.removeprefix(prefix): value.detach().clone()
                for name, value in wanted.items()
                if name.startswith(prefix) and "." not in name.removeprefix(prefix)
            }
            if own:
                taken.update(prefix + name for name in own)
                _loaded[module] = own
                _fill(module)
        if missing := sorted(wanted.keys() - taken):
            raise PlacementError(f"no module of the model has these ranges: {', '.join(missing)}")


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
