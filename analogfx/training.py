"""What happens to analog weights between steps: clipping, and quantisation for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from analogfx.config import Resolved, WeightQuantizationType, resolve
from analogfx.kernels import linear
from analogfx.kernels import reference as ref
from analogfx.kernels.blocks import row_blocks
from analogfx.module import AnalogModule, AnalogSite, is_view, sites, store_weight


def clip_after_step(optimizer: Optimizer, analog: nn.Module) -> RemovableHandle:
    """Clip the analog weights after every step of an optimizer, as their configs say.

    Works with any torch optimizer; nothing is wrapped. Schedulers, scalers and trainers that call
    ``optimizer.step()`` need not know of it.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    return optimizer.register_step_post_hook(lambda *_: clip_weights(analog))


@torch.no_grad()
def clip_weights(analog: nn.Module) -> None:
    """Clamp every analog weight whose config clips by a Gaussian bound, in place.

    The bound is ``sigma * std`` of the whole weight, or of each output's whole row (all tiles
    together, mean removed, unbiased): ``clip_weights`` of AIHWKIT-Lightning's layers, for every
    kind of layer. Learned clips act in the forward and are left alone.
    """
    for _, module, site in sites(analog):
        config = resolve(module._analog.config)
        if config.clip_sigma:
            matrix = site.weight(module).flatten(1)
            _clip(matrix, config)
            if not is_view(matrix, module, site):
                store_weight(module, site, matrix)


def _clip(matrix: Tensor, config: Resolved) -> None:
    """Clamp a weight, (O, I), to its Gaussian bound in place."""
    std = None if config.clip_per_channel else ref.wide(matrix).std()
    for b in row_blocks(matrix):
        rows = ref.wide(matrix[b])
        bound = config.clip_sigma * (ref.row_std(rows) if std is None else std)
        matrix[b] = ref.clamp_to(rows, bound)


@torch.no_grad()
def quantize_weights(analog: nn.Module) -> None:
    """Replace every analog weight by what its config's clip and quantisation make of it.

    Afterwards the model's own copy of the config quantises no more; everything else in it stays,
    so an eval forward gives what it gave before. Configs that were handed in are not changed.
    """
    for module in analog.modules():
        if not isinstance(module, AnalogModule):
            continue
        placement = module._analog
        config = resolve(placement.config)
        if not config.weight_states and not config.learnable_clip:
            continue
        for site in placement.sites:
            store_weight(module, site, _quantized(module, site))
        placement.config.modifier.quantization_type = WeightQuantizationType.NONE
        placement.programs = {}
        placement.prepare(module)


def _quantized(module: AnalogModule, site: AnalogSite) -> Tensor:
    """One site's weight, clipped and quantised tile by tile, (O, I)."""
    config = resolve(module._analog.config)
    matrix = site.weight(module).flatten(1)
    clips = getattr(module, site.state.clip) if config.learnable_clip else None
    out = []
    for tile, s in linear.tiles(list(site.in_sizes)):
        part = matrix[:, s]
        if clips is None:
            bound = ref.row_max(part)
            if not config.weight_per_channel:
                bound = ref.tile_max(bound, site.out_sizes)
        else:
            bound = clips[tile].abs()
        if config.weight_states:
            out.append(ref.quantize_weight(part, bound.unsqueeze(-1), config.weight_states))
        else:
            out.append(ref.clip_weight(part, bound.unsqueeze(-1)))
    return torch.cat(out, dim=1)
