"""What every crossbar is to hold, as files that any tool can read: safetensors and JSON."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analogfx import files
from analogfx.device import Device, key_of
from analogfx.errors import CaptureError, ConfigError, Conflict
from analogfx.kernels import held
from analogfx.kernels.spec import MVMSpec, reference_only
from analogfx.kernels.weights import maxima, scale
from analogfx.tiles.rows import Tile
from analogfx.tiles.sites import Named, named_sites
from analogfx.tiles.tile_map import TileMap, tile_map

SCHEMA = 1
RECORD = "tiles.json"
_LARGEST_CODE = 32767


def export_tiles(
    analog: nn.Module,
    directory: str | os.PathLike[str],
    device: Device | None = None,
    seconds: float | None = 1.0,
    read: int = 0,
    mapped: TileMap | None = None,
) -> Path:
    """Write what every crossbar holds, and what is needed to compute with it.

    ``tiles.json`` lists sites and tiles; ``tiles-<id>.safetensors`` holds, for a site NAME and for
    the tile of number N in the list:

    * ``N:codes`` (rows, columns): whole numbers, int8 or int16, where the config quantises
      weights; a weight is its code times the step of its output.
    * ``N:weights`` (rows, columns): the weights where they are not quantised, and of a ``device``
      as it holds them.
    * ``N:conductances`` (n, rows, columns), of a ``device``: microsiemens, of the n devices of
      each weight.
    * ``NAME:step`` (k, O): steps of the codes, of k tiles along the inputs and O outputs.
    * ``NAME:input_range`` (k,): what inputs are clamped to; absent where inputs have their own.
    * ``NAME:bound`` (k, O): the ADC's bound in units of the input range; absent for none.
    * ``NAME:conductance_scale.T``, of a ``device``: what its converter makes weights of
      conductances by, of the site's tile T.

    Matrices lie as on the crossbar: an input drives a row, an output reads a column; cells off the
    diagonal of a grouped convolution are 0. Biases are digital, and not here.

    Args:
        analog: the model. Weights are as it evaluates them, clipped and quantised.
        directory: made if it does not exist. An export that is interrupted leaves what was there
            before.
        device: a chip that ``analogfx.program`` gave for this model; None for what a chip is asked
            to hold.
        seconds: when the device is read, after programming; None for the conductances that it was
            asked to hold, without noise.
        read: number of the reading at that time.
        mapped: where the weights lie: what ``tile_map`` gave for this model, with one slice. None
            for its defaults.

    Returns:
        The path of ``tiles.json``.

    Raises:
        ConfigError: a map of several slices: what each holds is decided by a converter of
            :mod:`analogfx.chip`; or the map of another model.
        CaptureError: a site has no fused product or no weights.
        OSError: the folder cannot be written.
    """
    mapped = tile_map(analog) if mapped is None else mapped
    if mapped.slices != 1:
        valid = "1; the devices of a weight are those of the device's converter"
        raise ConfigError([Conflict("mapped.slices", mapped.slices, valid)])
    named = {one.name: one for one in named_sites(analog)}
    if [(s.name, s.outputs, s.inputs) for s in mapped.sites] != [
        (name, sum(one.site.out_sizes), sum(one.site.in_sizes)) for name, one in named.items()
    ]:
        raise ConfigError([Conflict("mapped", mapped, "the map of this model")])
    with torch.no_grad():
        tensors: dict[str, Tensor] = {}
        sites, matrices = {}, {}
        for name, one in named.items():
            sites[name], matrices[name], shared = _site(one)
            tensors |= {f"{name}:{key}": value for key, value in shared.items()}
        if device is not None:
            _read(device, named, seconds, read, sites, matrices, tensors)
        tiles = []
        for number, tile in enumerate(mapped.tiles):
            laid = {kind: _on_crossbar(matrix, tile) for kind, matrix in matrices[tile.site]}
            tensors |= {f"{number}:{kind}": matrix for kind, matrix in laid.items()}
            tiles.append({"number": number, **asdict(tile), "holds": list(laid)})
    record = {
        "schema": SCHEMA,
        "crossbar": list(mapped.crossbar),
        "seconds": None if device is None else seconds,
        "sites": sites,
        "tiles": tiles,
    }
    whole = {key: value.cpu().contiguous() for key, value in tensors.items()}
    files.commit(Path(directory), RECORD, "tiles", record, whole)
    return Path(directory) / RECORD


_Matrices = list[tuple[str, Tensor]]
"""Matrices of a site, (..., O, I) of all groups, by what they are."""


def _site(one: Named) -> tuple[dict[str, Any], _Matrices, dict[str, Tensor]]:
    """A site's record, what its tiles hold, and what they share."""
    lowered, state = one.lowered, one.site.state
    if lowered is None:
        raise CaptureError(f"{one.name}: its chain of ops is not one that lower knows")
    weight = one.site.weight(one.module).detach()
    if weight.is_meta:
        raise CaptureError(f"{one.name} has no weights: it is on the meta device")
    spec = lowered.spec
    if reason := reference_only(spec):
        raise CaptureError(f"{one.name}: files of tiles cannot hold it: {reason}")
    clip = getattr(one.module, state.clip, None)
    wanted, _ = held.asked_for(weight, clip, spec)
    shared: dict[str, Tensor] = {}
    learned = getattr(one.module, state.input_range, None)
    if learned is not None:
        shared["input_range"] = learned.detach().abs()
    rows = spec._replace(groups=1, noise_std=0.0)
    peaks = maxima(weight.flatten(1), clip, rows)
    if spec.out_bound:
        shared["bound"] = spec.out_bound * _spread(peaks, spec.bound_per_channel, rows)
    matrices: _Matrices = [("weights", wanted)]
    if spec.weight_states and spec.weight_states / 2 <= _LARGEST_CODE:
        step = 2 * _spread(peaks, spec.weight_per_channel, rows) / spec.weight_states
        shared["step"] = torch.where(step == 0, 1.0, step)
        sizes = torch.tensor(spec.in_sizes, device=wanted.device)
        steps = shared["step"].T.repeat_interleave(sizes, dim=1)
        dtype = torch.int8 if spec.weight_states / 2 <= 127 else torch.int16
        matrices = [("codes", (wanted / steps).round().to(dtype))]
    record = {
        "outputs": wanted.shape[0],
        "inputs": wanted.shape[1],
        "groups": spec.groups,
        "in_sizes": list(spec.in_sizes),
        "out_sizes": list(spec.out_sizes),
        "range_mode": spec.range_mode,
        "inp_res": spec.inp_res,
        "out_res": spec.out_res,
        "weight_states": spec.weight_states,
    }
    return record, matrices, shared


def _spread(peaks: Tensor | None, per_channel: bool, spec: MVMSpec) -> Tensor:
    assert peaks is not None
    return torch.stack([scale(peak, per_channel, spec) for peak in peaks])


def _read(
    device: Device,
    named: dict[str, Named],
    seconds: float | None,
    read: int,
    sites: dict[str, dict[str, Any]],
    matrices: dict[str, _Matrices],
    tensors: dict[str, Tensor],
) -> None:
    """What a chip holds, in the place of what it is asked to hold."""
    conductances = device.conductances(seconds, read)
    weights = None if seconds is None else device.weights(seconds, read)
    for name, one in named.items():
        key = key_of(one.path, one.site)
        if key not in conductances:
            raise ConfigError([Conflict("device", device, f"a chip of this model, with {key}")])
        whole, scales = conductances[key]
        own: _Matrices = [("conductances", whole)]
        if weights is not None:
            own.append(("weights", weights[key]))
        else:
            own += matrices[name]
        matrices[name] = own
        sites[name]["devices"] = len(whole)
        tensors |= {f"{name}:conductance_scale.{n}": value for n, value in enumerate(scales)}


def _on_crossbar(matrix: Tensor, tile: Tile) -> Tensor:
    """A tile's share of a site's matrix (..., O, I) as its rows and columns: (..., rows, columns).

    Groups lie on the diagonal.
    """
    part = matrix[..., slice(*tile.outputs), slice(*tile.inputs)]
    if tile.groups == 1:
        return part.mT.contiguous()
    out = part.new_zeros((*part.shape[:-2], tile.rows, tile.columns))
    blocks = part.mT.chunk(tile.groups, dim=-1)
    height, width = tile.rows // tile.groups, tile.columns // tile.groups
    for group, block in enumerate(blocks):
        rows = slice(group * height, (group + 1) * height)
        out[..., rows, group * width : (group + 1) * width] = block
    return out
