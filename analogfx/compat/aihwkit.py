"""A trained model as a model of AIHWKIT, for what is evaluated there.

AIHWKIT is an extra: ``pip install analogfx[aihwkit]``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from analogfx.api import to_digital
from analogfx.errors import CompatError
from analogfx.kernels.held import asked_for
from analogfx.kernels.spec import MVMSpec, reference_only
from analogfx.kernels.weights import scale
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import required_sites, unwrapped
from analogfx.modules.write_back import dense_weight
from analogfx.shards import whole
from analogfx.state import COUNT


def export(analog: nn.Module) -> Any:
    """An AIHWKIT model that computes in evaluation what an analog model computes.

    Every analog layer becomes AIHWKIT's, on its torch tiles (``TorchInferenceRPUConfig``), each
    with a config of its own. A tile holds the clipped and quantised weights over the maxima that
    scale the ADC's bound, and the maxima as ``mapping_scales``. Outputs agree to rounding: to 1e-6,
    apart from values that lie between two codes of a converter to the last bits.

    The export is for evaluation. What acts in training alone (weight and output noise, clips,
    weight quantisation that is still learned) is not exported, and neither are ``noise_model`` and
    ``drift_compensation``: set AIHWKIT's own in the tiles' configs.

    Args:
        analog: what ``analogize`` or ``load`` returned, float32. It stays as it is.

    Returns:
        The model, with AIHWKIT's methods (``program_analog_weights``, ``drift_analog_weights``), in
        the mode of ``analog``.

    Raises:
        CompatError: AIHWKIT is not installed, or has no such layer on its torch tile: all but
            linear layers and two-dimensional convolutions without groups.
        TypeError: the model has no analog layer.

    Example:
        >>> model = export(analog.eval())
        >>> model.program_analog_weights()
        >>> model.drift_analog_weights(86400.0)
    """
    analog = unwrapped(analog)
    try:
        theirs = importlib.import_module("aihwkit.nn")
        configs = importlib.import_module("aihwkit.simulator.configs")
    except ImportError as error:
        raise CompatError("export() makes a model of AIHWKIT: install aihwkit") from error
    layers = {path: layer for path, layer, _ in required_sites(analog)}
    for path, layer in layers.items():
        _check(path, layer)
    model: Any = to_digital(analog)
    for path, layer in layers.items():
        config = _config(configs, layer)
        kind = theirs.AnalogLinear if isinstance(layer, nn.Linear) else theirs.AnalogConv2d
        made = kind.from_digital(model.get_submodule(path), config).train(layer.training)
        _fill(made, layer)
        if not path:
            return made
        model.set_submodule(path, made)
    return theirs.AnalogWrapper(model)


def _check(path: str, layer: AnalogModule) -> None:
    """Refuse what AIHWKIT's torch tile has not.

    Raises:
        CompatError: naming the layer and what it is.
    """
    found, base = "", layer
    weight = layer._parameters.get("weight")
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or len(layer._analog.sites) != 1:
        found = layer.digital_class.__name__
    elif layer.inherited is not None or layer.digital_class.forward not in _FORWARDS:
        found = f"{layer.digital_class.__name__}, whose forward is its own,"
    elif weight is None or weight.dtype is not torch.float32:
        found = "weight that is computed" if weight is None else f"{weight.dtype} weight"
    elif isinstance(base, nn.Conv2d):
        wrong = {
            f"groups = {base.groups}": base.groups != 1,
            "padding by name": isinstance(base.padding, str),
            f"padding_mode = {base.padding_mode!r}": base.padding_mode != "zeros",
        }
        found = next((f"{name} in a convolution" for name, has in wrong.items() if has), "")
    programs = layer._analog.programs.values()
    specs = (one.spec for program in programs for one in program.lowered if one is not None)
    if reason := next(filter(None, map(reference_only, specs)), ""):
        raise CompatError(f"{path or type(layer).__name__}: AIHWKIT has no such tile: {reason}")
    if found:
        raise CompatError(
            f"{path or type(layer).__name__}: AIHWKIT has no {found} on its torch tile"
        )


_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


def _config(configs: Any, layer: AnalogModule) -> Any:
    """AIHWKIT's config for a layer: nothing acts that the layer's own config does not say."""
    own, config = layer._analog.resolved, configs.TorchInferenceRPUConfig()
    forward, mapping, ranges = config.forward, config.mapping, config.pre_post.input_range
    has_range = own.has_range
    forward.inp_bound = 1.0 if has_range else -1.0  # of inputs over their range
    forward.inp_res = own.inp_res or -1.0
    forward.out_bound = own.out_bound or -1.0
    forward.out_res = own.out_res or -1.0
    forward.out_noise = 0.0
    forward.bound_management = configs.BoundManagementType.NONE
    management = configs.NoiseManagementType
    dynamic = own.range_mode == "dynamic"
    forward.noise_management = management.ABS_MAX if dynamic else management.NONE
    mapping.max_input_size, mapping.max_output_size = own.max_input_size, own.max_output_size
    mapping.digital_bias = True
    mapping.weight_scaling_omega = 1.0
    mapping.weight_scaling_columnwise = own.bound_per_channel
    mapping.weight_scaling_lr_compensation = mapping.learn_out_scaling = False
    config.modifier.type = configs.WeightModifierType.NONE
    config.clip.type = configs.WeightClipType.NONE
    config.remap.type = configs.WeightRemapType.NONE
    ranges.enable = own.has_state
    ranges.learn_input_range = own.learn_range
    ranges.init_value = own.init_value
    ranges.init_from_data = own.init_from_data
    ranges.init_std_alpha = own.init_std_alpha
    ranges.decay, ranges.input_min_percentage = own.decay, own.input_min_percentage
    return config


@torch.no_grad()
def _fill(made: Any, layer: AnalogModule) -> None:
    """Give AIHWKIT's layer the weights, scales and ranges of ours, tile by tile."""
    site, own = layer._analog.sites[0], layer._analog.resolved
    spec = MVMSpec(
        list(site.in_sizes),
        list(site.out_sizes),
        weight_states=own.weight_states,
        weight_per_channel=own.weight_per_channel,
        out_bound=1.0,  # so that there are maxima in any case
    )
    clip = getattr(layer, site.state.clip, None)
    weight, peaks = asked_for(
        dense_weight(layer, site), None if clip is None else whole(clip.detach()), spec
    )
    assert peaks is not None
    array = getattr(made.analog_module, "array", [[made.analog_module]])
    columns = zip(weight.split(list(site.in_sizes), 1), peaks, array, strict=True)
    for number, (column, peak, its) in enumerate(columns):
        rows = scale(peak, own.bound_per_channel, spec).expand_as(peak)
        rows = torch.where(rows > 0, rows, 1)  # a row of zeros
        sizes = list(site.out_sizes)
        for part, by, tile in zip(column.split(sizes), rows.split(sizes), its, strict=True):
            tile.tile.set_weights(part / by.unsqueeze(1))
            tile.set_mapping_scales(by if own.bound_per_channel else by[:1])
            if own.has_state:
                _set_range(tile, layer, number)


def _set_range(tile: Any, layer: AnalogModule, number: int) -> None:
    state, own = layer._analog.sites[0].state, layer._analog.resolved
    value: Tensor = whole(getattr(layer, state.input_range)).detach()
    count: Tensor = getattr(layer, state.of(COUNT))
    tile.set_input_range(float(value[number]))
    tile.input_range_update_idx.fill_(min(int(count[number]), own.init_from_data))
