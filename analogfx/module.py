"""A rewritten graph and its state as a module again.

The module's class is swapped for a subclass of its own class that runs the rewritten graph. What
a site needs besides its weight is registered on the module under Lightning's names:
``input_range`` (k,), ``input_range_update_idx`` (k,) int64, ``x_min`` and ``x_max`` (k,), and
``learnable_weight_clip`` (k, O), for k tiles along the inputs and O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from analogfx.config import Resolved
from analogfx.errors import CaptureError
from analogfx.kernels import changes
from analogfx.kernels import reference as ref
from analogfx.program import AnalogSite, Placement

_ABSENT = object()


class AnalogModule(nn.Module):
    """Mixin in front of a module's own class; never made by itself."""

    _analog: Placement
    digital_class: type[nn.Module]

    def extra_repr(self) -> str:
        """The class's own text and the tile grid."""
        grids = [f"{len(s.in_sizes)}x{len(s.out_sizes)}" for s in self._analog.sites]
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}tiles={', '.join(grids)}"

    def __setattr__(self, name: str, value: Any) -> None:
        placement = self.__dict__.get("_analog")
        before: Any = self.__dict__.get(name, _ABSENT)
        super().__setattr__(name, value)
        # What a forward reads of its module is part of its graphs.
        plain = not isinstance(value, (Tensor, nn.Module)) and not name.startswith("_")
        if placement is not None and plain and name not in ("training", "forward"):
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
        names = self._analog.state_names()
        state = [t for n in names if (t := getattr(self, n, None)) is not None]
        ours = {id(t) for t in state} | {id(t.grad) for t in state if t.grad is not None}
        were_meta = any(t.is_meta for t in state)

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in ours and out.dtype in (torch.float16, torch.bfloat16):
                return t.to(out.device, torch.float32)
            return out

        super()._apply(keep_precision, recurse)
        if were_meta:
            for site in self._analog.sites:
                if not getattr(self, site.state.all()[0], torch.empty(0)).is_meta:
                    reset_state(self, site)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A digital checkpoint has no analog state: ranges stay what they are, and learned clips
        # start from the weights that are loaded.
        fresh = set()
        device = next((v.device for k, v in state_dict.items() if k.startswith(prefix)), "cpu")
        for site in self._analog.sites:
            for name in site.state.all():
                current = getattr(self, name, None)
                if current is None:
                    continue
                key = prefix + name
                if key in state_dict:
                    state_dict[key] = as_state(state_dict[key], current)
                    continue
                if current.is_meta or name == site.state.clip:
                    fresh.add(name)
                state_dict[key] = (
                    torch.empty_like(current, device=device) if current.is_meta else current
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.__dict__["_analog_fresh"] = fresh

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return (_blank, (self.digital_class,), *made[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._analog.programs:
            self._analog.prepare(self)


def _finish_load(module: nn.Module, _: Any) -> None:
    """Give what a state dict lacked its initial values, now that the children are loaded, too."""
    fresh = module.__dict__.pop("_analog_fresh", set())
    for site in module._analog.sites:  # type: ignore[union-attr]
        reset_state(module, site, fresh)


def as_state(value: Tensor, current: Tensor) -> Tensor:
    """A loaded value in the state's own dtype; the reference counts in floats, up to -inf."""
    if not current.is_floating_point() and value.is_floating_point():
        closed = float(1 << 31)  # a calibrated range is not learned from data again
        value = torch.nan_to_num(value.float(), nan=closed, posinf=closed, neginf=closed)
    return value.to(current.dtype)


def _blank(base: type[nn.Module]) -> nn.Module:
    """An analog module without contents, for unpickling."""
    cls = analog_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def analog_class(base: Any) -> type[AnalogModule]:
    """The subclass of a module's class that runs the module's analog programs."""

    @functools.wraps(base.forward)
    def forward(self: AnalogModule, *args: Any, **kwargs: Any) -> Any:
        return self._analog.forward(self, args, kwargs)

    name = f"Analog{base.__name__}"
    members = {
        "forward": forward,
        "digital_forward": base.forward,
        "digital_class": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(name, (AnalogModule, base), members)


# ------------------------------------------------------------------------------------- state


def reset_state(module: nn.Module, site: AnalogSite, only: set[str] | None = None) -> None:
    """Give a site's state its initial values; learned clips start at the rows' largest weights.

    Args:
        only: names to reset, None for all.
    """
    analog = module._analog
    assert isinstance(analog, Placement)
    values: dict[str, Any] = {
        site.state.input_range: analog.resolved.init_value,
        site.state.count: 0,
        site.state.x_min: -ref.UNTOUCHED,
        site.state.x_max: ref.UNTOUCHED,
    }
    with torch.no_grad():
        for name, value in values.items():
            state = getattr(module, name, None)
            if state is not None and (only is None or name in only):
                state.fill_(value)
        clip = getattr(module, site.state.clip, None)
        if clip is not None and (only is None or site.state.clip in only):
            clip.copy_(row_maxima(site, site.weight(module)))


def row_maxima(site: AnalogSite, weight: Tensor) -> Tensor:
    """Largest magnitude of every row of every input tile, (k, O)."""
    matrix = weight.flatten(1)
    return torch.stack([ref.row_max(tile) for tile in matrix.split(list(site.in_sizes), dim=1)])


def _register_state(module: nn.Module, site: AnalogSite, config: Resolved) -> None:
    with torch.no_grad():
        weight = site.weight(module)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tiles = len(site.in_sizes)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    names = site.state
    if config.has_state:
        trained = nn.Parameter(empty(tiles), requires_grad=config.learn_range)
        module.register_parameter(names.input_range, trained)
        module.register_buffer(names.count, empty(tiles, dtype=torch.int64))
        module.register_buffer(names.x_min, empty(tiles))
        module.register_buffer(names.x_max, empty(tiles))
    if config.learnable_clip:
        module.register_parameter(names.clip, nn.Parameter(empty(tiles, sum(site.out_sizes))))
    reset_state(module, site)


def unwrapped(model: Any) -> Any:
    """The model inside what ``torch.compile`` and data-parallel wrappers made of it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


# ----------------------------------------------------------------------------------- weights


def is_view(weight: Tensor, module: nn.Module, site: AnalogSite) -> bool:
    """Whether writing to a weight writes to the parameter that it is computed from."""
    parameter = parameter_of(module, site)
    return weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def parameter_of(module: nn.Module, site: AnalogSite) -> nn.Parameter:
    """The parameter whose elements a site's weight rearranges.

    Raises:
        CaptureError: the weight is computed from its parameter, so it cannot be written back.
    """
    if not site.rearranged:
        raise CaptureError(
            f"{type(module).__name__}: the weight is computed from "
            f"{site.name}, so nothing can be written back to it"
        )
    return module.get_parameter(site.name)


def store_weight(module: nn.Module, site: AnalogSite, matrix: Tensor) -> None:
    """Write a weight, (O, I), back to the parameter that it is a rearrangement of.

    Raises:
        CaptureError: it is no rearrangement of one.
    """
    weight = site.weight(module)
    if is_view(weight, module, site):
        weight.copy_(matrix.view(weight.shape))
        return
    # On the way from the parameter to the weight its elements are copied: follow their indices.
    parameter = parameter_of(module, site)
    index = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    origin = site.weight(_stand_in(site.name, index))
    values = matrix.flatten().to(weight.dtype)
    parameter.copy_(parameter.flatten().index_copy(0, origin.flatten(), values).view_as(parameter))


def _stand_in(path: str, value: Any) -> Any:
    """An object that has one attribute, at a path."""
    for name in reversed(path.split(".")):
        value = SimpleNamespace(**{name: value})
    return value


# ------------------------------------------------------------------------------ there and back

# Torch's fused encoder reads the weights of its children and never calls them; these attributes
# are its own conditions for doing so.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def swap(module: nn.Module, placement: Placement) -> None:
    """Make a module analog in place. Its placement must have programs with sites.

    Raises:
        CaptureError: the module already has an attribute that a site needs.
    """
    module._analog = placement  # type: ignore[assignment]
    module.__class__ = analog_class(type(module))  # type: ignore[arg-type]
    module.register_load_state_dict_post_hook(_finish_load)
    config = placement.resolved
    for site in placement.sites:
        _register_state(module, site, config)


def unswap(module: AnalogModule) -> None:
    """Make an analog module digital again in place."""
    for name in module._analog.state_names():
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _finish_load]:
        del hooks[key]
    module.__class__ = module.digital_class  # type: ignore[assignment]
    del module._analog


def close_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder from going around analog layers."""
    for module in model.modules():
        for kind, (name, closed) in _FAST_PATHS.items():
            analog = any(isinstance(m, AnalogModule) for m in module.modules())
            if isinstance(module, kind) and analog and "_analog_closed" not in module.__dict__:
                module._analog_closed = {name: getattr(module, name, None)}  # type: ignore
                setattr(module, name, closed)


def open_fast_paths(model: nn.Module) -> None:
    """Undo :func:`close_fast_paths`."""
    for module in model.modules():
        for name, value in module.__dict__.pop("_analog_closed", {}).items():
            setattr(module, name, value)


def analog_sites(model: nn.Module) -> list[tuple[str, AnalogModule, AnalogSite]]:
    """Every analog site of a model, of which there must be some.

    Raises:
        TypeError: the model has none, or is no module.
    """
    found = list(sites(model)) if isinstance(model, nn.Module) else []
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no analog layer: pass what analogize() or load() returned"
        )
    return found


def sites(model: nn.Module) -> Iterator[tuple[str, AnalogModule, AnalogSite]]:
    """Every analog site of a model, as (module path, module, site)."""
    for path, module in model.named_modules():
        if isinstance(module, AnalogModule):
            for site in module._analog.sites:
                yield path, module, site
