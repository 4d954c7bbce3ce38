"""A module whose class is swapped for a subclass of its own that runs a rewritten graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from analogfx import shards
from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import CaptureError
from analogfx.kernels import changes
from analogfx.modules.metadata import CONFIG, warn_of_another_config
from analogfx.modules.parallel import DISTRIBUTED
from analogfx.modules.placement import Placement
from analogfx.modules.public import LayerAttributes
from analogfx.modules.remember import clip_names, renew_notes, reset_state
from analogfx.state import as_state

_ABSENT = object()


class AnalogModule(nn.Module):
    """What every analog layer is an instance of, beside its own class.

    ``analogize`` puts it in front of a module's class; it is never made by itself. An analog layer
    also has ``rpu_config`` (a copy), ``in_sizes``, ``get_weights_and_biases`` and
    ``set_weights_and_biases``, unless its own class has something of that name.

    Example:
        >>> isinstance(analogize(nn.Linear(8, 4), config), AnalogModule)
        True
    """

    # What LayerAttributes has for it:
    rpu_config: TorchInferenceRPUConfig
    in_sizes: list[int] | dict[str, list[int]]
    get_weights_and_biases: Callable[[], tuple[Tensor, Tensor | None]]
    set_weights_and_biases: Callable[..., None]

    _analog: Placement
    digital_class: type[nn.Module]
    inherited: type[nn.Module] | None = None
    """The torch layer whose forward alone is analog; see :mod:`analogfx.modules.inherited`."""

    def extra_repr(self) -> str:
        """The class's own text and the tile grid."""
        grids = [f"{len(s.in_sizes)}x{len(s.out_sizes)}" for s in self._analog.sites]
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}tiles={', '.join(grids)}"

    def __setattr__(self, name: str, value: Any) -> None:
        placement = self.__dict__.get("_analog")
        before: Any = self.__dict__.get(name, _ABSENT)
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            # Sharding wrappers fill a weight anew and put it in place, without torch counting it.
            changes.written((value,))
        if placement is not None and name == DISTRIBUTED:
            placement.distribute(self)
        # What a forward reads of its module is part of its graphs.
        # (DeepSpeed keeps its books on modules under names of ds_.)
        plain = not isinstance(value, (Tensor, nn.Module)) and not name.startswith(("_", "ds_"))
        # A forward that runs as it is reads attributes itself, and may set them.
        rebuilt = placement is not None and not placement.runs_own_forward
        if placement is not None and rebuilt and plain and name not in ("training", "forward"):
            try:
                placement.change(self, placement.config)
            except CaptureError:
                if before is _ABSENT:
                    super().__delattr__(name)
                else:
                    super().__setattr__(name, before)
                raise

    def train(self, mode: bool = True) -> AnalogModule:
        """Set the mode; what is kept of the weights is computed anew in the next inference."""
        changes.written(self.parameters())
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnalogModule:
        # Ranges, their statistics and learned clips stay in single precision in a half model.
        placement = self._analog
        state = [t for n in placement.state_names() if (t := getattr(self, n, None)) is not None]
        ours = {id(t) for t in state} | {id(t.grad) for t in state if t.grad is not None}
        were_meta = any(t.is_meta for t in state)

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in ours and out.dtype in (torch.float16, torch.bfloat16):
                return t.to(out.device, torch.float32)
            return out

        super()._apply(keep_precision, recurse)
        for name in (site.state.seen for site in placement.sites):
            notes = self.__dict__.get(name)
            if notes is not None and not notes.is_meta:  # to where the ranges are
                self.__dict__[name] = notes.to(fn(notes[:0].float()).device)
        if were_meta and not any(getattr(self, n).is_meta for n in self._kept()):
            self._reset()
            renew_notes(self, placement.sites, placement.resolved)
            # Weights that have no values yet get them from whoever fills them, before a forward.
            placement.unset |= clip_names(placement.sites, placement.resolved)
        return self

    def _kept(self) -> list[str]:
        return [n for n in self._analog.state_names() if getattr(self, n, None) is not None]

    def _reset(self, only: set[str] | None = None) -> None:
        """Give the state its initial values, that of some names or all."""
        placement = self._analog
        reset_state(self, placement.sites, placement.resolved, only)
        placement.unset -= placement.unset if only is None else only

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        if (entry := metadata.get(prefix[:-1])) is not None:
            entry[CONFIG] = self._analog.config.to_dict()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        warn_of_another_config(local_metadata, self._analog.config)
        # A digital checkpoint has no analog state: ranges stay what they are, and learned clips
        # start from the weights that are loaded.
        placement = self._analog
        fresh = set()
        clips = clip_names(placement.sites, placement.resolved)
        device = next((v.device for k, v in state_dict.items() if k.startswith(prefix)), "cpu")
        for name in self._kept():
            current = getattr(self, name)
            key = prefix + name
            # torch.distributed hands a module its own tensor where a checkpoint has none.
            if key in state_dict and name in placement.unset and _same(state_dict[key], current):
                fresh.add(name)
            elif key in state_dict:
                state_dict[key] = as_state(state_dict[key], current)
            if key in state_dict:
                continue
            if current.is_meta or name in clips:
                fresh.add(name)
            state_dict[key] = (
                torch.empty_like(current, device=device) if current.is_meta else current
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self.__dict__["_analog_fresh"] = fresh

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return (_blank, (self.digital_class, self.inherited), *made[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._analog.programs:
            self._analog.prepare(self)


def finish_load(module: nn.Module, _: Any) -> None:
    """Give what a state dict lacked its initial values, now that the children are loaded, too."""
    fresh = module.__dict__.pop("_analog_fresh", set())
    if isinstance(module, AnalogModule):
        module._reset(fresh)
        renew_notes(module, module._analog.sites, module._analog.resolved)
        module._analog.unset.clear()


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same memory; what this process holds of them, if in shards."""
    storages = [shards.local(t).untyped_storage() for t in (first, second)]
    return storages[0]._cdata == storages[1]._cdata


def _blank(base: type[nn.Module], inherited: type[nn.Module] | None = None) -> nn.Module:
    """An analog module without contents, for unpickling."""
    cls = analog_class(base, inherited)
    return cls.__new__(cls)


def analog_class(base: Any, inherited: Any = None) -> type[AnalogModule]:
    """The subclass of a module's class that runs the module's analog programs.

    Args:
        inherited: a class that the module's inherits from, if that one's forward is what the
            programs are for: the module's own forward runs as it is, and finds it by ``super()``.
    """
    for known in type.__subclasses__(base):
        of_base = known.__dict__.get("digital_class") is base
        if of_base and known.__dict__["inherited"] is inherited:
            return known
    name = f"Analog{base.__name__}"
    if inherited is not None:
        known_as = {"digital_class": base, "inherited": inherited}
        about = {"__module__": base.__module__, "__doc__": base.__doc__}
        return type(name, (base, analog_class(inherited)), known_as | about)

    @functools.wraps(base.forward)
    def forward(self: AnalogModule, *args: Any, **kwargs: Any) -> Any:
        placement = self.__dict__.get("_analog")
        if placement is None:  # a hook kept this forward of a module that is digital again
            return base.forward(self, *args, **kwargs)
        return placement.forward(self, args, kwargs)

    members = {
        "forward": forward,
        "digital_forward": base.forward,
        "digital_class": base,
        "inherited": None,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "reset_parameters"):

        @functools.wraps(base.reset_parameters)
        def reset_parameters(self: AnalogModule, *args: Any, **kwargs: Any) -> None:
            base.reset_parameters(self, *args, **kwargs)
            self._reset()

        members["reset_parameters"] = reset_parameters
    return type(name, (AnalogModule, base, LayerAttributes), members)
