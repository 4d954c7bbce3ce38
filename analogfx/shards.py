"""Parameters of which a process holds a part: torch's DTensors, as FSDP2 and others make them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def any_dtensor() -> bool:
    """Whether there may be a DTensor at all."""
    return "torch.distributed.tensor" in sys.modules


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Loads nothing where no DTensor was ever made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a dense tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered: every process of its mesh must ask. A dense tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of a dense value that this process would hold, were it cut as another tensor is.

    Every process has the whole value, so that nothing is sent.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    spec: Any = like
    replicated = [Replicate()] * spec.device_mesh.ndim
    whole_value = DTensor.from_local(value, spec.device_mesh, replicated, run_check=False)
    return whole_value.redistribute(placements=spec.placements).to_local()


def part_within(value: Tensor, like: Tensor) -> Tensor:
    """The part of a value that FSDP2 leaves to this process.

    Args:
        value: dense; what this process has under tensor parallelism alone.
        like: a DTensor whose mesh has the tensor-parallel dimension last.
    """
    spec: Any = like
    for dim, placement in enumerate(spec.placements[:-1]):
        if not placement.is_replicate():
            chunks = value.chunk(spec.device_mesh.size(dim))
            number = spec.device_mesh.get_local_rank(dim)
            value = chunks[number] if number < len(chunks) else value[:0]
    return value


def is_dense(parameter: Tensor) -> bool:
    """Whether a parameter is a whole, and what is trained: DeepSpeed may train a copy."""
    return not is_sharded(parameter) and "deepspeed.utils" not in sys.modules


def trained_copy(parameter: Tensor) -> Tensor | None:
    """What DeepSpeed's ZeRO trains in place of a parameter: its values in float32, gathered.

    Every process must ask. None for a parameter that ZeRO does not train, and for all of them where
    DeepSpeed is not loaded.
    """
    deepspeed = sys.modules.get("deepspeed.utils")
    return None if deepspeed is None else deepspeed.safe_get_full_fp32_param(parameter)


def store_trained_copy(parameter: Tensor, value: Tensor) -> None:
    """Write a parameter that ZeRO trains: the float32 values, of which a process has a part."""
    sys.modules["deepspeed.utils"].safe_set_full_fp32_param(parameter, value)
    parameter.copy_(value)


def mesh_groups(tensor: Tensor) -> set[str]:
    """Names of the process groups of the mesh that a sharded tensor lies on."""
    spec: Any = tensor
    return {group.group_name for group in spec.device_mesh.get_all_groups()}


def from_local(value: Tensor, like: Tensor) -> Tensor:
    """This process's part as that of a tensor that lies where another does."""
    from torch.distributed.tensor import DTensor

    spec: Any = like
    shape, stride = spec.shape, spec.stride()
    return DTensor.from_local(
        value, spec.device_mesh, spec.placements, run_check=False, shape=shape, stride=stride
    )


def placed(value: Tensor, mesh: Any, placement: Any) -> Tensor:
    """A value as a DTensor over a mesh of one dimension, with memory of its own.

    A dense value is the same in all processes, and nothing is sent for it.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not is_sharded(value):
        value = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    spec: Any = value
    return spec.redistribute(placements=[placement]).clone()


def shard_groups(tensor: Tensor, rows: bool = True) -> list[Any]:
    """The process groups whose members hold the parts of a tensor, one for each way it is cut.

    Args:
        rows: whether cuts along the first dimension count.
    """
    spec: Any = tensor
    cut = [
        dim
        for dim, p in enumerate(spec.placements)
        if not p.is_replicate() and (rows or p.dim % spec.ndim != 0)
    ]
    return [spec.device_mesh.get_group(dim) for dim in cut]


def all_reduce(values: Tensor, groups: list[Any], largest: bool = False) -> Tensor:
    """The sum (or the largest) of values over groups of processes, one group after the other."""
    import torch.distributed as dist

    for group in groups:
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        dist.all_reduce(values, op=op, group=group)
    return values


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
