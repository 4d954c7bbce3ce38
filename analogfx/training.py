"""What happens to analog weights between steps: clipping, and quantisation for good."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from analogfx import shards
from analogfx.config import Resolved, TorchInferenceRPUConfig, WeightQuantizationType
from analogfx.errors import ConfigError, Conflict, PlacementError
from analogfx.kernels import changes, dispatch
from analogfx.kernels.clip import clip_matrix, clip_part, moments
from analogfx.kernels.spec import ROLES, MVMSpec
from analogfx.kernels.weights import maxima, modified_weight
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite
from analogfx.modules.sites import analog_modules, required_sites, sites
from analogfx.modules.write_back import (
    dense_weight,
    gathered,
    is_view,
    parameter_of,
    store_weight,
)


def clip_after_step(optimizer: Optimizer, analog: nn.Module) -> RemovableHandle:
    """Clip the analog weights after every step of an optimizer, as their configs say.

    Works with any torch optimizer; nothing is wrapped. Schedulers, scalers and trainers that call
    ``optimizer.step()`` need not know of it.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer, or ``analog`` has no analog layer.
        ValueError: the optimizer holds none of the analog weights.
        ConfigError: a layer's ``clip.type`` is Gaussian, and its ``clip.sigma`` is no bound.
    """
    handle = clip_what_has_a_bound(optimizer, analog)
    try:
        _check_bounds(analog)
    except ConfigError:
        handle.remove()
        raise
    return handle


def clip_what_has_a_bound(optimizer: Optimizer, analog: nn.Module) -> RemovableHandle:
    """As :func:`clip_after_step`, for a caller that was not asked to clip.

    A Gaussian ``clip.type`` without a ``clip.sigma`` chooses what the ADC's bound refers to, and
    clips nothing.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"clip_after_step() takes an optimizer, found {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = required_sites(analog)
    trained = [p for _, m, _ in found for p in m.parameters() if p.requires_grad]
    if trained and not any(id(p) in held for p in trained):
        message = "the optimizer holds no parameter of the analog layers of this model"
        if "deepspeed" in sys.modules:
            message += (
                ". ZeRO trains flat copies of parameters: keep input ranges out of it, and give "
                "them an optimizer of their own, which prepare_training() takes"
            )
        raise ValueError(message)
    return optimizer.register_step_post_hook(lambda *_: _clip_if_trained(analog))


def _clip_if_trained(analog: nn.Module) -> None:
    """Clip the weights, unless all are frozen, as beside adapters: these stay what they are."""
    found = [*_clipped_sites(analog)]
    if any(each.parameter.requires_grad for each in found):
        _clip_weights(found)


class _Clipped(NamedTuple):
    """A site whose weight is clipped between steps."""

    path: str
    module: AnalogModule
    site: AnalogSite
    parameter: nn.Parameter


def _clipped_sites(analog: nn.Module) -> Iterator[_Clipped]:
    for path, module, site in sites(analog):
        if module._analog.resolved.clip_sigma:
            yield _Clipped(path, module, site, parameter_of(module, site))


def clip_weights(analog: nn.Module) -> None:
    """Clamp every analog weight whose config clips by a Gaussian bound, in place.

    The bound is ``sigma * std`` of the whole weight, or of each output's whole row (all tiles
    together, mean removed, unbiased): ``clip_weights`` of AIHWKIT-Lightning's layers, for every
    kind of layer. Learned clips act in the forward and are left alone.

    Raises:
        ConfigError: a layer's ``clip.type`` is Gaussian, and its ``clip.sigma`` is no bound. No
            weight is changed.
        PlacementError: a weight is on the meta device, as accelerate's offload leaves it there.
    """
    _check_bounds(analog)
    found = [*_clipped_sites(analog)]
    for each in found:
        if each.parameter.is_meta:
            raise PlacementError(
                f"{each.path}: its weight is on the meta device, where there is nothing to clip: "
                "clip before accelerate offloads the model, or after its hooks are removed"
            )
    _clip_weights(found)


def _check_bounds(analog: nn.Module) -> None:
    for path, module in analog_modules(analog):
        clip = module._analog.config.clip
        if clip.is_gaussian and clip.sigma <= 0:
            valid = f"a number above 0, to clip by clip.type = {clip.type.name}"
            raise ConfigError([Conflict("clip.sigma", clip.sigma, valid)], path)


@torch.no_grad()
def _clip_weights(found: Sequence[_Clipped]) -> None:
    done: dict[Any, list[Resolved]] = {}
    parts: list[tuple[nn.Parameter, Resolved]] = []
    for _, module, site, parameter in found:
        config = module._analog.resolved
        weight = site.weight(module)
        sharded = shards.is_sharded(weight)
        where: Any = id(parameter) if sharded else weight.data_ptr()
        place = (where, weight.shape, weight.stride(), site.weight if sharded else None)
        clipped = done.setdefault(place, [])
        if config in clipped and not weight.is_meta:  # tied: the bound is that of unclipped weights
            continue
        clipped.append(config)
        if weight is parameter and weight.dim() == 2 and shards.is_dense(parameter):
            _clip_matrix(weight, config)
        elif not sharded or weight is not parameter or site.experts:
            with gathered(module, site) as holder:
                _clip(holder, site, site.weight(holder), config)
        elif _clip_groups(parameter, config):
            parts.append((parameter, config))
        else:  # all of what a bound is the spread of is here
            _clip_matrix(shards.local(parameter).flatten(1), config)
    _clip_parts(parts)


def _clip_matrix(matrix: Tensor, config: Resolved) -> None:
    """Clip a matrix (O, I), which is here as a whole."""
    (dispatch.clip_rows if config.clip_per_channel else clip_matrix)(matrix, config.clip_sigma)


def _clip(module: nn.Module, site: AnalogSite, weight: Tensor, config: Resolved) -> None:
    """Clip one site's weight, which is here as a whole."""
    matrix = weight.flatten(1)
    for own in site.matrices(matrix):  # each by its own spread
        _clip_matrix(own, config)
    if not is_view(matrix, module, site):
        store_weight(module, site, matrix)


def _clip_groups(parameter: nn.Parameter, config: Resolved) -> tuple[Any, ...]:
    """The processes that hold parts of what a bound is the spread of: a matrix, or its rows."""
    return tuple(shards.shard_groups(parameter, rows=not config.clip_per_channel))


def _clip_parts(parts: list[tuple[nn.Parameter, Resolved]]) -> None:
    """Clip parameters of whose bounds other processes have a part of the data.

    Their moments travel together, once for all that are cut over the same processes.
    """
    alike: dict[Any, list[tuple[nn.Parameter, Resolved]]] = {}
    for parameter, config in parts:
        alike.setdefault(_clip_groups(parameter, config), []).append((parameter, config))
    for groups, members in alike.items():
        matrices = [shards.local(parameter).flatten(1) for parameter, _ in members]
        pairs = zip(matrices, members, strict=True)
        own = [moments(matrix, config.clip_per_channel) for matrix, (_, config) in pairs]
        together = shards.all_reduce(torch.cat(own), list(groups)).split([*map(len, own)])
        for matrix, (_, config), its in zip(matrices, members, together, strict=True):
            clip_part(matrix, config.clip_sigma, its)


def weights_written(model: nn.Module) -> None:
    """Say that weights of a model were written through ``.data``.

    What inference keeps of weights (8-bit codes, values that a compiled graph froze) is computed
    anew when a weight changes. torch counts optimizers' steps, ``load_state_dict`` and writes in
    place; it does not count ``weight.data.copy_(...)``. ``train()`` and ``eval()`` of an analog
    model say it, too.
    """
    changes.written(model.parameters())


@torch.no_grad()
def quantize_weights(analog: nn.Module) -> None:
    """Replace every analog weight by what its config's clip and quantisation make of it.

    Afterwards the model's own copy of the config quantises no more; everything else in it stays,
    so that with per-channel quantisation into an even number of steps an eval forward gives what
    it gave before. (Elsewhere the rows' largest weights, which scale the ADC's bound, change with
    the weights.) Configs that were handed in are not changed.

    Raises:
        CaptureError: a weight is computed from its parameter, so it cannot be written back;
            nothing is changed.
    """
    chosen = [
        (module, site)
        for _, module, site in sites(analog)
        if module._analog.resolved.weight_states or module._analog.resolved.learnable_clip
    ]
    for module, site in chosen:  # all that may be refused, before anything is changed
        parameter_of(module, site)
    for module, site in chosen:
        quantized = _quantized(module, site)
        with gathered(module, site) as holder:
            store_weight(holder, site, quantized)
    for module in dict.fromkeys(module for module, _ in chosen):
        changed = TorchInferenceRPUConfig.from_dict(module._analog.config.to_dict())
        changed.modifier.quantization_type = WeightQuantizationType.NONE
        module._analog.change(module, changed)


def _quantized(module: AnalogModule, site: AnalogSite) -> Tensor:
    """One site's weight, clipped and quantised tile by tile, (O, I)."""
    config = module._analog.resolved
    names = {"weight_per_channel", *ROLES["clip"].names, *ROLES["quantize"].names}
    scalars: dict[str, Any] = {name: getattr(config, name) for name in names}
    spec = MVMSpec(list(site.in_sizes), list(site.out_sizes), **scalars)
    matrix = dense_weight(module, site).flatten(1)
    clip = shards.whole(getattr(module, site.state.clip)) if config.learnable_clip else None
    return modified_weight(matrix, clip, None, maxima(matrix, clip, spec), spec)
