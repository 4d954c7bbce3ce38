"""The state of a module's sites: made, registered, reset, and fitted to other weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from analogfx import shards
from analogfx.config import Resolved
from analogfx.kernels import reference as ref
from analogfx.kernels import seen
from analogfx.modules.program import AnalogSite
from analogfx.modules.write_back import dense_weight
from analogfx.state import CLIP, COUNT, VARIABLES


def make_state(
    module: nn.Module, sites: Sequence[AnalogSite], config: Resolved
) -> dict[str, Tensor]:
    """The tensors that the sites of a module remember, at their initial values, by name.

    Nothing of the module is touched. Learned clips start at the rows' largest weights.
    """
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for site in sites:
            weight = site.weight(module)
            for variable in VARIABLES:
                if not variable.kept(config):
                    continue
                tensor = torch.empty(
                    variable.shape(site.range_shape, sum(site.out_sizes)),
                    dtype=variable.dtype(weight.dtype),
                    device=weight.device,
                )
                if variable.initial is None:
                    tensor.copy_(_first_clips(site, dense_weight(module, site)))
                else:
                    tensor.fill_(variable.initial(config))
                if variable.trained is not None:
                    tensor = nn.Parameter(tensor, requires_grad=variable.trained(config))
                made[site.state.of(variable)] = tensor
    return made


def register_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module its sites' state."""
    for name, tensor in state.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


def forget_state(module: nn.Module, names: Collection[str]) -> None:
    """Take state from a module."""
    for name in names:
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)


def reset_state(
    module: nn.Module,
    sites: Sequence[AnalogSite],
    config: Resolved,
    only: Collection[str] | None = None,
) -> None:
    """Give the sites' state its initial values.

    Args:
        only: names to reset, None for all.
    """
    with torch.no_grad():
        for site in sites:
            for variable in VARIABLES:
                name = site.state.of(variable)
                state = getattr(module, name, None)
                if state is None or (only is not None and name not in only):
                    continue
                if variable.initial is None:
                    first = _first_clips(site, dense_weight(module, site))
                    shards.local(state).copy_(shards.part_of(first, state))
                else:
                    shards.local(state).fill_(variable.initial(config))


def renew_notes(module: nn.Module, sites: Sequence[AnalogSite], config: Resolved) -> None:
    """Give sites empty notes of what training sees, if their config collects such; else none."""
    for site in sites:
        if config.collects:
            count = shards.local(
                getattr(module, site.state.of(COUNT))
            )  # of the tiles that are here
            setattr(module, site.state.seen, seen.nothing(count.numel(), count.device))
            open_ = count.is_meta or bool((count < config.init_from_data).any())
            setattr(module, site.state.initializes, torch.tensor(open_, device="cpu"))
        else:
            module.__dict__.pop(site.state.seen, None)
            module.__dict__.pop(site.state.initializes, None)


def clip_names(sites: Sequence[AnalogSite], config: Resolved) -> set[str]:
    """Names of the state whose initial value depends on the weights."""
    return {site.state.of(CLIP) for site in sites} if CLIP.kept(config) else set()


def fit_state(
    module: nn.Module,
    before: Sequence[AnalogSite],
    after: Sequence[AnalogSite],
    config: Resolved,
) -> None:
    """Fit what a module remembers to sites that took the places of others, one by one.

    What has the shape that it needs is kept; the rest starts anew.
    """
    state = make_state(module, after, config)
    kept: dict[str, Tensor] = {}
    for old, new in zip(before, after, strict=True):
        for variable in VARIABLES:
            name = new.state.of(variable)
            had = getattr(module, old.state.of(variable), None)
            if name in state:
                fits = had is not None and had.shape == state[name].shape
                kept[name] = had if fits and had is not None else state[name]
    forget_state(module, [name for site in before for name in site.state.all()])
    register_state(module, kept)


def _first_clips(site: AnalogSite, weight: Tensor) -> Tensor:
    """Where learned clips start, (k, O): at the largest weight of every row of every tile.

    A row of zeros has none: a clip of 0, which scales the ADC's bound, would keep it at 0 for
    good. It starts at the tile's largest weight, which scales nothing else anew, or at 1.
    """
    maxima = row_maxima(site, weight)
    matrices = maxima.unflatten(1, (max(site.experts, 1), -1))
    largest = matrices.amax(dim=2, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    return torch.where(matrices > 0, matrices, largest).view_as(maxima)


def row_maxima(site: AnalogSite, weight: Tensor) -> Tensor:
    """Largest magnitude of every row of every input tile, (k, O)."""
    matrix = weight.flatten(1)
    return torch.stack([ref.row_max(tile) for tile in matrix.split(list(site.in_sizes), dim=1)])
