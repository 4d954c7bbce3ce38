"""Tensor parallelism: a linear layer of which this process computes a part.

``ColwiseParallel`` cuts a weight along its outputs, ``RowwiseParallel`` along its inputs. A part
runs on tensors of this process alone, as ``local_map`` does it, by a program of its own:

    cut along outputs: every process sees all inputs and has all ranges; the gradient of the inputs
                       is summed at the DAC, so that ranges learn from all outputs
    cut along inputs:  every process has its tiles, with their ranges and ADCs, and gives a partial
                       sum; the bias is added by the first
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analogfx import shards
from analogfx.errors import PlacementError
from analogfx.kernels.part import Part
from analogfx.modules.program import AnalogSite
from analogfx.passes.take_part import Share
from analogfx.state import VARIABLES

DISTRIBUTED = "_distribute_module_applied"
"""What ``torch.distributed.tensor.distribute_module`` sets on a module whose parameters it cut."""


@dataclass(frozen=True)
class Layout:
    """How a layer's weight lies on the processes of a mesh."""

    mesh: Any
    """A ``DeviceMesh`` of one dimension."""
    cut: int | None
    """The axis along which the weight, (O, I), is cut; None where every process has all of it."""
    site: AnalogSite
    share: Share | None
    """What this process computes; None for all of it."""

    @property
    def group(self) -> Any:
        """The processes that hold a part each."""
        return self.mesh.get_group()

    def of_state(self, per_output: bool) -> Any:
        """The placement of state that has a value for every tile, or one for each of its rows."""
        from torch.distributed.tensor import Replicate, Shard

        if self.cut == 1:
            return Shard(0)
        return Shard(1) if self.cut == 0 and per_output else Replicate()


def layout_of(name: str, module: nn.Module, sites: tuple[AnalogSite, ...]) -> Layout:
    """The layout of a module whose parameters are DTensors.

    Args:
        name: the module's path, for messages.

    Raises:
        PlacementError: this layer cannot be cut so, or not at all.
    """
    site = sites[0]
    weight: Any = module.get_parameter(site.name)
    if not shards.is_sharded(weight):
        raise PlacementError(f"{name}: {site.name} is dense, and other parameters are DTensors")
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise PlacementError(
            f"{name}: its weight is a DTensor over a mesh of {mesh.ndim} dimensions. Call "
            "analogize() before fully_shard() where layers are tensor-parallel"
        )
    (placement,) = weight.placements
    if placement.is_replicate():
        return Layout(mesh, None, site, None)
    if len(sites) != 1 or not isinstance(module, nn.Linear) or weight.dim() != 2:
        raise PlacementError(
            f"{name}: {type(module).__name__} is cut for tensor parallelism, which only "
            "nn.Linear can be: leave this layer out of the plan"
        )
    if not placement.is_shard():
        raise PlacementError(f"{name}: its weight is {placement}: shard it by Shard(0) or Shard(1)")
    cut = placement.dim % 2
    starts = _starts(weight.shape[cut], mesh.size())
    if cut == 1:
        _check_tiles(name, site, starts)
    return Layout(mesh, cut, site, _share(site, cut, starts, mesh))


def _starts(size: int, processes: int) -> list[int]:
    """Where the parts of an axis begin and, last, where it ends: torch's even chunks."""
    chunk = -(-size // processes)
    return [min(number * chunk, size) for number in range(processes + 1)]


def _edges(sizes: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _check_tiles(name: str, site: AnalogSite, starts: list[int]) -> None:
    """Refuse parts that do not end with a tile, or that have other tiles than ranges.

    Raises:
        PlacementError: with a tile size that fits.
    """
    edges, processes = _edges(site.in_sizes), len(starts) - 1
    ranges = _starts(len(site.in_sizes), processes)
    if [edges[tile] for tile in ranges] == starts:
        return
    inputs, largest = edges[-1], max(site.in_sizes)
    fits = (n for n in range(largest, 0, -1) if inputs % n == 0 and inputs // n % processes == 0)
    size = next(fits, None)
    advice = (
        f"mapping.max_input_size={size} fits"
        if size is not None
        else f"no tile size fits {inputs} inputs in {processes} processes: use ColwiseParallel"
    )
    raise PlacementError(
        f"{name}: RowwiseParallel over {processes} processes cuts its {inputs} inputs at "
        f"{', '.join(map(str, starts[1:-1]))}, but its tiles end at "
        f"{', '.join(map(str, edges[1:]))}, and each tile has an ADC in one process: {advice}"
    )


def _share(site: AnalogSite, cut: int, starts: list[int], mesh: Any) -> Share:
    rank = mesh.get_local_rank()
    begin, end = starts[rank], starts[rank + 1]
    rows, columns = sum(site.out_sizes), sum(site.in_sizes)
    outputs = _edges(site.out_sizes)
    if cut == 1:
        edges = _edges(site.in_sizes)
        first, last = edges.index(begin), edges.index(end)
        part = Part(rows, columns, 0, begin, first, 0, len(site.out_sizes))
        return Share(part, site.in_sizes[first:last], site.out_sizes, "", "")
    tiles = [
        (tile, min(b, end) - max(a, begin))
        for tile, (a, b) in enumerate(itertools.pairwise(outputs))
        if min(b, end) > max(a, begin)
    ] or [(0, 0)]
    group = mesh.get_group().group_name
    peers = "" if set(starts) <= set(outputs) else group
    part = Part(rows, columns, begin, 0, 0, tiles[0][0], len(site.out_sizes))
    return Share(part, site.in_sizes, tuple(size for _, size in tiles), peers, group)


def place_state(module: nn.Module, layout: Layout) -> None:
    """Cut the state of a layer as its weight is: what a process computes, it has the state of."""
    for variable in VARIABLES:
        name = layout.site.state.of(variable)
        state = getattr(module, name, None)
        if state is None:
            continue
        placed = shards.placed(state.detach(), layout.mesh, layout.of_state(variable.per_output))
        if name in module._parameters:
            parameter = nn.Parameter(placed, requires_grad=state.requires_grad)
            module._parameters[name] = parameter
        else:
            module._buffers[name] = placed


def run(
    layout: Layout,
    module: nn.Module,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A layer's output from what this process holds of it.

    Args:
        program: the forward of this part.

    Returns:
        A DTensor (..., O): cut along its outputs, or a partial sum for a weight cut along inputs.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    (x,) = (*args, *kwargs.values())
    if not shards.is_sharded(x):
        raise PlacementError(
            f"{config_name(module)}: its weight is a DTensor, its input is not: apply the layer "
            "by parallelize_module, whose hooks make it one"
        )
    last = x.dim() - 1
    wanted = Shard(last) if layout.cut == 1 else Replicate()
    own = x.redistribute(placements=[wanted])
    y = program(_Here(layout, module), own.to_local())  # whose gradient the program has summed
    given = {None: Replicate(), 0: Shard(last), 1: Partial()}[layout.cut]
    shape = torch.Size((*x.shape[:-1], sum(layout.site.out_sizes)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, layout.mesh, [given], run_check=False, shape=shape, stride=stride)


def config_name(module: nn.Module) -> str:
    """What a message calls an analog module."""
    placement: Any = module._analog
    return placement.name or type(module).__name__


class _Here:
    """A module as this process has it: the ``self`` of the program for its part."""

    def __init__(self, layout: Layout, module: nn.Module) -> None:
        self._module = module
        for name, parameter in module._parameters.items():
            own: Any = parameter
            if name == layout.site.state.input_range:
                own = _Stored.apply(parameter)
            elif parameter is not None:
                own = shards.local(parameter)
                if name == "bias" and layout.cut == 1:
                    own = _Once.apply(own, layout.mesh.get_local_rank() == 0)
            self.__dict__[name] = own
        with torch.no_grad():
            buffers = module._buffers.items()
            self.__dict__ |= {name: None if b is None else shards.local(b) for name, b in buffers}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class _Stored(torch.autograd.Function):
    """What a process has of a parameter that a forward stores to: the same memory."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        """The local tensor, no view of it: to autograd a write to it is none to the parameter."""
        ctx.like = parameter.detach()
        return parameter.to_local().data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """That of the parameter, which lies as it does."""
        return shards.from_local(grad, like=ctx.like)


class _Once(torch.autograd.Function):
    """A value that one of several processes adds to a sum that all of them form."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, adds: bool) -> Tensor:
        """The value where it is added, zeros elsewhere."""
        return value.clone() if adds else torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """That of the sum, which all processes have."""
        return grad, None
