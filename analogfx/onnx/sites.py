"""What a chip is programmed with at one site, and how a file says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from analogfx.config import resolve
from analogfx.errors import OnnxError
from analogfx.kernels import integers
from analogfx.kernels import reference as ref
from analogfx.kernels.spec import MVMSpec, reference_only
from analogfx.kernels.weights import code_scale
from analogfx.onnx.calls import SiteCall
from analogfx.onnx.grid import grid_of

SCHEMA = 2
"""Version of the site records in a file's metadata: 2 since a site may have a ``code_scale``."""

_INT4 = 21
"""First opset with 4-bit integers."""

_INT4_MAX, _INT8_MAX, _INT16_MAX = 7, 127, 32767
"""Largest codes; the grid is symmetric."""


@dataclass(frozen=True)
class Programmed:
    """The constants of one site. The weight is computed when it is written, not before."""

    name: str
    call: SiteCall
    spec: MVMSpec
    """Hashable, without what only training reads; with noise strengths if they are asked for, and
    with the states of weights that were quantized before."""
    weight: ir.TensorProtocol | None
    """Codes, or weights that the config changes; None where they are a parameter as it is."""
    codes: bool
    peaks: Tensor | None
    """(k, O) largest weight or learned clip of each row of each tile; None if nothing needs it."""

    @property
    def scale(self) -> Tensor | None:
        """(k, O) steps of the codes, as ``reference.quantize_weight`` takes them."""
        return _scale(self.peaks, self.spec) if self.codes and self.peaks is not None else None

    @property
    def code_scale(self) -> Tensor | None:
        """(k, O) ``rho`` of ``kernels.integers``, for a site that multiplies codes."""
        if self.peaks is None or not (self.codes and integers.depth(self.spec)):
            return None
        return torch.stack([code_scale(p, self.spec).expand_as(p) for p in self.peaks])

    def weight_codes(self) -> Tensor:
        """The weights in units of their steps, (O, I), in the precision of the computation."""
        assert self.peaks is not None
        return _codes(self.held(), self.peaks, self.spec)

    @property
    def gain(self) -> Tensor | None:
        """(k, O) factors behind the ADC that make up for drift; None for none."""
        held = self.call.held
        return None if held is None or held.gain is None else _of_expert(held.gain, self.call, 1)

    @property
    def maxima(self) -> Tensor | None:
        """The peaks, where converters or noise read them."""
        return self.peaks if _reads_peaks(self.spec) else None

    def held(self) -> Tensor:
        """The weights as the tiles hold them, (O, I), in the precision of the computation."""
        return _held(self.call, self.spec, self.peaks)

    def input_range(self) -> Tensor | None:
        """(k,) range of each tile; None where inputs have their own, or none."""
        learned = getattr(self.call.module, self.call.site.state.input_range, None)
        if learned is None:
            return None
        return (learned if learned.dim() == 1 else learned[self.call.expert]).detach().abs()


def _of_expert(t: Tensor, call: SiteCall, axis: int) -> Tensor:
    """The outputs of a call's expert among those of all; all of them without experts."""
    outputs = sum(call.spec.out_sizes)
    return t.narrow(axis, (call.expert or 0) * outputs, outputs)


def program(name: str, call: SiteCall, opset: int, noise: bool) -> Programmed:
    """The constants of one site, from its module's present weights.

    Args:
        opset: 4-bit codes need 21; below it they are stored in 8 bits.
        noise: keep the strengths of the config's training noise.

    Raises:
        OnnxError: the site has a scalar of ``kernels.spec.REFERENCE_ONLY``.
    """
    if reason := reference_only(call.spec):
        raise OnnxError(f"{name}: a file cannot hold the site: {reason}")
    spec = _spec(call, noise)
    codes = _code_type(spec, opset)
    peaks = _peaks(call, spec) if spec.weight_states or _reads_peaks(spec) else None
    weight = _weight(call, spec, codes, peaks)
    return Programmed(name, call, spec, weight, codes is not None, peaks)


def _reads_peaks(spec: MVMSpec) -> bool:
    return bool(spec.out_bound or spec.noise_std or spec.out_noise)


def weight_of(call: SiteCall) -> Tensor:
    """The stored weight as the op takes it: (O, I), or torch's layout for AnalogConv."""
    weight = call.site.weight(call.module).detach()
    return weight.flatten(1) if call.window is None else weight


def _clip_of(call: SiteCall) -> Tensor | None:
    clip = getattr(call.module, call.site.state.clip, None)
    return None if clip is None else _of_expert(clip.detach(), call, 1)


def _spec(call: SiteCall, noise: bool) -> MVMSpec:
    spec = call.spec
    config = resolve(call.module._analog.config)
    if not spec.weight_states:
        grid = grid_of(_tiles(call, spec), spec.out_sizes, _clip_of(call))
        if grid is not None:
            spec = spec._replace(weight_states=grid.states, weight_per_channel=grid.per_channel)
    return spec._replace(
        in_sizes=tuple(spec.in_sizes),  # type: ignore[arg-type]
        out_sizes=tuple(spec.out_sizes),  # type: ignore[arg-type]
        decay=0.0,
        input_min_percentage=0.0,
        weight_states=0.0 if call.held else spec.weight_states,  # a chip holds no codes
        noise_std=config.noise_std if noise else 0.0,
        noise_per_channel=config.noise_per_channel,
        out_noise=config.out_noise / math.sqrt(len(spec.in_sizes)) if noise else 0.0,
        out_noise_per_channel=config.out_noise_per_channel,
    )


def _code_type(spec: MVMSpec, opset: int) -> ir.DataType | None:
    """The smallest type that holds every code; None for weights that stay floats."""
    largest = integers.largest(spec.weight_states)
    if spec.weight_states and largest > _INT8_MAX and integers.depth(spec):
        return ir.DataType.INT16 if largest <= _INT16_MAX else None
    if not spec.weight_states or largest > _INT8_MAX:
        return None
    return ir.DataType.INT4 if largest <= _INT4_MAX and opset >= _INT4 else ir.DataType.INT8


# ------------------------------------------------------------------------ computing constants

_dialect = torch.ops.analogfx


def _tiles(call: SiteCall, spec: MVMSpec) -> tuple[Tensor, ...]:
    """The stored weights of every tile, (O, I_t); rows of all groups side by side."""
    return weight_of(call).flatten(1).split(list(spec.in_sizes), dim=1)


@torch.no_grad()
def _peaks(call: SiteCall, spec: MVMSpec) -> Tensor:
    """Largest weight, or learned clip, of every row of every tile, (k, O)."""
    if call.held is not None:
        assert call.held.peaks is not None
        return _of_expert(call.held.peaks, call, 1)
    clip = _clip_of(call)
    if clip is not None:
        return ref.wide(clip).abs()
    return torch.stack([_dialect.row_max(tile) for tile in _tiles(call, spec)])


def _bounds(peaks: Tensor, spec: MVMSpec) -> Tensor:
    """What the codes of every row span, (k, O)."""
    if spec.weight_per_channel:
        return peaks
    return torch.stack([_dialect.tile_max(row, list(spec.out_sizes)) for row in peaks])


def _scale(peaks: Tensor, spec: MVMSpec) -> Tensor:
    """Steps of the codes, (k, O), as ``reference.quantize_weight`` takes them."""
    step = 2 * (_bounds(peaks, spec) / spec.weight_states)
    return torch.where(step == 0, 1.0, step)


@torch.no_grad()
def _held(call: SiteCall, spec: MVMSpec, peaks: Tensor | None) -> Tensor:
    """The weights as the tiles hold them, (O, I), in the precision of the computation."""
    if call.held is not None:
        return _of_expert(call.held.weight.flatten(1), call, 0)
    clip, states, tiles = _clip_of(call), spec.weight_states, _tiles(call, spec)
    if clip is not None:
        held = [_dialect.clip_weight(*pair, states) for pair in zip(tiles, clip, strict=True)]
    elif states:
        assert peaks is not None
        bounds = _bounds(peaks, spec)
        held = [_dialect.quantize_weight(*pair, states) for pair in zip(tiles, bounds, strict=True)]
    else:
        return ref.wide(weight_of(call).flatten(1))
    return torch.cat(held, dim=1)


@torch.no_grad()
def _codes(held: Tensor, peaks: Tensor, spec: MVMSpec) -> Tensor:
    """The weights in units of their steps, (O, I)."""
    tiles, steps = held.split(list(spec.in_sizes), dim=1), _scale(peaks, spec).unsqueeze(-1)
    codes = [tile / step for tile, step in zip(tiles, steps, strict=True)]
    return torch.cat(codes, dim=1).round_()


def _weight(
    call: SiteCall, spec: MVMSpec, codes: ir.DataType | None, peaks: Tensor | None
) -> ir.TensorProtocol | None:
    """A weight that is computed when it is written; None for a parameter as it is."""
    raw = weight_of(call)
    dtype = _onnx_type(raw)

    def compute() -> ir.TensorProtocol:
        if not modified:
            return TorchTensor(weight_of(call).contiguous())
        held = _held(call, spec, peaks)
        if codes is None:
            return TorchTensor(held.reshape(raw.shape).contiguous())
        assert peaks is not None
        whole = _codes(held, peaks, spec).to(torch.int16)
        array = whole.reshape(raw.shape).cpu().numpy()
        return ir.Tensor(array.astype(codes.numpy()), dtype=codes)

    modified = bool(spec.weight_states) or call.held is not None or _clip_of(call) is not None
    if codes is not None:
        dtype = codes
    elif modified:
        dtype = _onnx_type(ref.wide(raw.new_empty(0)))
    elif _is_parameter(call):
        return None
    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(raw.shape))


def _is_parameter(call: SiteCall) -> bool:
    """Whether the product reads an initializer of the graph as it is."""
    value = call.node.inputs[1]
    return value is not None and value.is_initializer()


def _onnx_type(t: Tensor) -> ir.DataType:
    return TorchTensor(t.new_empty(0)).dtype


# ------------------------------------------------------------------------------------ records


def record(site: Programmed, inputs: dict[str, str], nodes: list[str]) -> dict[str, Any]:
    """A site as plain data for the file's metadata.

    Args:
        inputs: names of the initializers that hold its constants, by input of the op.
        nodes: names of the nodes that compute it.
    """
    spec, window = site.spec, site.call.window
    return {
        "name": site.name,
        "module": site.call.path,
        "op": "AnalogLinear" if window is None else "AnalogConv",
        "parameter": site.call.site.name,
        "weight_shape": list(weight_of(site.call).shape),
        "tiles": tile_map(spec),
        "spec": {name: getattr(spec, name) for name in _RECORDED},
        "window": None if window is None else window._asdict(),
        "initializers": inputs,
        "nodes": nodes,
    }


_RECORDED = (
    "in_sizes", "out_sizes", "groups", "range_mode", "inp_res", "weight_states",
    "weight_per_channel", "noise_std", "noise_per_channel", "out_noise", "out_noise_per_channel",
    "out_bound", "out_res", "bound_per_channel",
)  # fmt: skip
"""The scalars that a file tells: its format does not change with what kernels want to know."""


def tile_map(spec: MVMSpec) -> list[dict[str, Any]]:
    """Every tile's place in the grid and its slice of the weight matrix (outputs, inputs)."""
    rows, columns = (_spans(sizes) for sizes in (spec.in_sizes, spec.out_sizes))
    return [
        {"row": row, "column": column, "inputs": inputs, "outputs": outputs}
        for column, outputs in enumerate(columns)
        for row, inputs in enumerate(rows)
    ]


def _spans(sizes: Sequence[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(sizes))
    return [[end - size, end] for end, size in zip(ends, sizes, strict=True)]
