"""Training on several processes: what all of them saw makes the ranges that all of them use."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from analogfx import shards
from analogfx.config import Resolved
from analogfx.errors import PlacementError
from analogfx.kernels import seen
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.collect import collect_statistics
from analogfx.modules.program import AnalogSite
from analogfx.modules.sites import analog_modules, required_sites, sites
from analogfx.state import RANGES, X_MIN
from analogfx.training import clip_what_has_a_bound


class Preparation:
    """What :func:`prepare_training` did, until ``remove()``."""

    def __init__(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        """See :func:`prepare_training`."""
        self._model = model
        self._handles = handles

    def remove(self) -> None:
        """End it: training writes its ranges in the forward again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        collect_statistics(self._model, on=False)


def prepare_training(
    optimizer: Optimizer, model: nn.Module, mesh_or_group: Any = None, exact: bool = True
) -> Preparation:
    """Let processes that train a model together have the same input ranges, and clip its weights.

    Training forwards stop writing ranges; they note what they see. Before every step of the
    optimizer the notes of all processes are added up, and set the ranges as one process would on
    all their data; gradients of ranges that no wrapper has reduced are averaged; and the decay of
    ranges is added once, whatever the loss is scaled by and however many backward passes there
    were. One all-reduce does that for the whole model (a second one for the extremes of ranges in
    fast mode). After the step weights are clipped, see :func:`analogfx.clip_weights`.

    While ranges follow the data (the first ``init_from_data`` forwards), processes share what they
    see in every forward, by a small all-reduce for each site, so that gradients are those of one
    process on all the data, too. All processes must run the same modules in the same order for
    that, or they wait for each other for ever: a mixture of experts does not. Without ``exact``
    each clamps by what it has seen itself since the last step, and the gradients of these steps,
    but not the ranges, differ a little from one process's.

    With one process it does the same without communication, so that a loop is written once.

    Args:
        optimizer: any torch optimizer, or what accelerate made of one.
        model: the analog model, in wrappers or not. Call this after ``DistributedDataParallel`` or
            ``fully_shard``, and before the first training forward.
        mesh_or_group: the data-parallel processes: a process group, or a ``DeviceMesh``, of which
            dimensions that ``model`` is tensor-parallel over do not count. None for all processes;
            with pipeline parallelism pass the data-parallel part of the mesh.
        exact: share what is seen in every forward while ranges follow the data.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer, ``model`` has no analog layer, or
            ``mesh_or_group`` is neither a group nor a mesh.
        ValueError: the optimizer holds none of the analog parameters.
        PlacementError: the model is tensor-parallel over some of all processes, and nothing says
            which of the others are data-parallel; or it is in ``FullyShardedDataParallel``, FSDP's
            first version, or in stage 3 of ZeRO, which leave a module no ranges to write.

    Example:
        >>> model = DistributedDataParallel(analogize(net, recipes.afm()))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-4)
        >>> prepare_training(optimizer, model)
    """
    optimizer = _inner(optimizer)
    _refuse_flat_parameters(model)
    clipping = clip_what_has_a_bound(optimizer, model)
    try:
        groups = _groups(mesh_or_group, _tensor_parallel(model))
        step = _Step(model, groups, exact)
    except BaseException:
        clipping.remove()
        raise
    names = ",".join(group.group_name for group in groups) if exact else ""
    collect_statistics(model, on=True, processes=names)
    handle = optimizer.register_step_pre_hook(step.hook)
    return Preparation(model, [handle, clipping])


def _refuse_flat_parameters(model: nn.Module) -> None:
    """Refuse the first version of FSDP, and ZeRO-3: between forwards a module has no parameters.

    Raises:
        PlacementError: saying what to use.
    """
    for path, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):  # DeepSpeed's mark of what stage 3 keeps in parts
            raise PlacementError(
                f"{path} is in stage 3 of DeepSpeed's ZeRO, whose patched forwards cannot be "
                "traced: use fully_shard of torch.distributed.fsdp, or stage 1 or 2"
            )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for path, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise PlacementError(
                    f"{path or type(model).__name__} is in FullyShardedDataParallel, which makes "
                    "one flat tensor of weights and ranges: use its successor, fully_shard of "
                    "torch.distributed.fsdp, which prepare_training() knows"
                )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A model's trainable parameters in two groups for an optimizer, so that no range decays.

    Weight decay shrinks an input range or a learned clip at every step, whatever the data.

    Args:
        model: analog or not, in wrappers or not.
        weight_decay: of everything that is no range and no learned clip.

    Returns:
        A group of the other parameters with the weight decay given, and one of ranges and clips
        with none; groups without parameters are left out.
    """
    ours = set(map(id, _own_parameters(model)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in ours], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in ours], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def keep_decay_off_ranges(optimizer: Optimizer, model: nn.Module) -> list[RemovableHandle]:
    """Let no step decay ranges and learned clips, whatever groups the optimizer has.

    For optimizers that somebody else made; where you make it, use :func:`parameter_groups`. During
    a step ranges and clips stand in groups of their own, with the other options of their group and
    no weight decay. Before and after it the groups are what they were, so that schedulers and
    checkpoints of the optimizer know nothing of it.

    Args:
        optimizer: any torch optimizer, or what accelerate made of one.
        model: analog or not, in wrappers or not.

    Returns:
        Handles whose ``remove()`` ends it.
    """
    optimizer = _inner(optimizer)
    before: list[tuple[dict[str, Any], list[nn.Parameter]]] = []

    def restore(*_: object) -> None:
        if before:
            del optimizer.param_groups[len(before) :]
            for group, parameters in before:
                group["params"] = parameters
            before.clear()

    def split(*_: object) -> None:
        restore()  # if the last step raised
        ours = set(map(id, _own_parameters(model)))
        for group in optimizer.param_groups:
            before.append((group, group["params"]))
        for group, parameters in before:
            kept = [p for p in parameters if id(p) in ours]
            if kept and group.get("weight_decay"):
                group["params"] = [p for p in parameters if id(p) not in ours]
                optimizer.param_groups.append({**group, "params": kept, "weight_decay": 0.0})

    return [
        optimizer.register_step_pre_hook(split),
        optimizer.register_step_post_hook(restore),
    ]


def fully_shard_policy(module: nn.Module) -> dict[str, Any]:
    """Arguments of ``fully_shard`` that leave ranges and learned clips out of a unit, in float32.

    A range is a number or a few. Inside a unit it is cut into shards of which all but one are
    empty, and ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` rounds it to 8 bits. Outside,
    every process holds it, and :func:`prepare_training` averages its gradient.

    Args:
        module: the module that is to be a unit, already analog and on its device.

    Example:
        >>> for block in model.blocks:
        ...     fully_shard(block, mesh=mesh, mp_policy=policy, **fully_shard_policy(block))
        >>> fully_shard(model, mesh=mesh, mp_policy=policy, **fully_shard_policy(model))
    """
    return {"ignored_params": set(_own_parameters(module))}


def _own_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Ranges and learned clips."""
    for module in model.modules():
        if isinstance(module, AnalogModule):
            for name in module._analog.state_names():
                parameter = module._parameters.get(name)
                if parameter is not None:
                    yield parameter


def _inner(optimizer: Any) -> Optimizer:
    """The torch optimizer inside of a wrapper that is one by name only, as accelerate's."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _tensor_parallel(model: nn.Module) -> list[Any]:
    """The process groups that hold parts of the model's analog layers."""
    layouts = [module._analog.layout for _, module in analog_modules(model)]
    found = {x.group.group_name: x.group for x in layouts if x is not None and x.cut is not None}
    return list(found.values())


def _groups(mesh_or_group: Any, tensor_parallel: list[Any]) -> list[Any]:
    """The data-parallel process groups to sum over, one after the other; none for one process.

    Raises:
        PlacementError: not all processes are data-parallel, and nothing says which are.
    """
    dist = torch.distributed
    if shards.world_size() == 1:
        return []
    parts = {group.group_name for group in tensor_parallel}
    if mesh_or_group is None:
        if not tensor_parallel:
            return [dist.group.WORLD]
        sizes = [dist.get_world_size(group) for group in tensor_parallel]
        if math.prod(sizes) == shards.world_size():
            return []
        raise PlacementError(
            f"the model is tensor-parallel over {math.prod(sizes)} of {shards.world_size()} "
            "processes: pass prepare_training() the device mesh, or its data-parallel part"
        )
    if isinstance(mesh_or_group, dist.ProcessGroup):
        groups = [mesh_or_group]
    elif hasattr(mesh_or_group, "get_all_groups"):
        groups = mesh_or_group.get_all_groups()
    else:
        raise TypeError(
            "prepare_training() takes a ProcessGroup or a DeviceMesh of data-parallel processes, "
            f"found {type(mesh_or_group).__name__}"
        )
    return [g for g in groups if dist.get_world_size(g) > 1 and g.group_name not in parts]


# ------------------------------------------------------------------------------ before the step


@dataclass
class _Lot:
    """Sites of one config, whose tiles are computed together."""

    config: Resolved
    sites: list[tuple[AnalogModule, AnalogSite]]

    def state(self, number: int) -> list[Tensor]:
        """One of the ranges and their statistics, for every site: of the tiles that are here."""
        return [getattr(m, s.state.of(RANGES[number])) for m, s in self.sites]

    def notes(self) -> list[Tensor]:
        return [getattr(m, s.state.seen) for m, s in self.sites]


class _Step:
    """What happens before a step of the optimizer."""

    def __init__(self, model: nn.Module, groups: list[Any], exact: bool) -> None:
        self.model = model
        self.exact = exact
        self.groups = groups
        self.processes = 1
        for group in groups:
            self.processes *= torch.distributed.get_world_size(group)
        required_sites(model)
        self.parts = {group.group_name for group in _tensor_parallel(model)}
        """Names of the groups whose processes have a part of each layer."""
        self._tiles_held: dict[Any, Tensor] = {}

    def hook(
        self, optimizer: Optimizer, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What an optimizer calls first: gradients may be there, or a closure makes them later."""
        own, *rest = args
        closure = rest[0] if rest else options.get("closure")
        if closure is None:
            self.before(optimizer)
            return None

        def completed() -> Any:
            loss = closure()
            self.before(optimizer)
            return loss

        if rest:
            return (own, completed, *rest[1:]), options
        return args, {**options, "closure": completed}

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """Gather what all processes saw, set the ranges, and complete their gradients."""
        lots = self._lots()
        notes = [torch.cat(lot.notes()) for lot in lots]
        if self.groups:
            notes = self._gathered(lots, notes)
        scale = getattr(optimizer, "grad_scale", None)  # of gradients that are not unscaled yet
        for lot, seen_by_all in zip(lots, notes, strict=True):
            self._commit(lot, seen_by_all)
            if lot.config.learns_by_share:
                self._decay(lot, seen_by_all, scale)
            for noted in lot.notes():
                seen.forget_(noted)

    def _is_reduced(self, parameter: Tensor) -> bool:
        """Whether a wrapper averages a parameter's gradient over data-parallel processes.

        It does where it cut the parameter over other processes than tensor parallelism did.
        """
        if not shards.is_sharded(parameter):
            return False
        return not shards.mesh_groups(parameter) <= self.parts

    def _lots(self) -> list[_Lot]:
        """The sites that note what they see, by config, device and precision."""
        found: dict[Any, _Lot] = {}
        for _, module, site in sites(self.model):
            if module._analog.resolved.collects:
                low = shards.local(getattr(module, site.state.of(X_MIN)))
                config = module._analog.resolved
                lot = found.setdefault((config, low.device, low.dtype), _Lot(config, []))
                lot.sites.append((module, site))
        return list(found.values())

    def _gathered(self, lots: list[_Lot], notes: list[Tensor]) -> list[Tensor]:
        """The notes of all processes; gradients of ranges that each holds alone are averaged."""
        ours = dict.fromkeys(_own_parameters(self.model))
        dense = [p for p in ours if p.requires_grad and not self._is_reduced(p)]
        if not notes and not dense:
            return notes
        device = [*notes, *dense][0].device
        gradients = [
            torch.zeros_like(shards.local(p)) if p.grad is None else shards.local(p.grad)
            for p in dense
        ]
        has = torch.tensor([p.grad is not None for p in dense], dtype=torch.float64)
        pieces = [seen.summands(n).flatten() for n in notes] + [g.flatten() for g in gradients]
        stacked = torch.cat([piece.to(device, torch.float64) for piece in [*pieces, has]])
        shards.all_reduce(stacked, self.groups)
        sums = stacked.split([piece.numel() for piece in [*pieces, has]])
        self._store_gradients(dense, sums[len(notes) : -1], sums[-1])

        rows = [total.to(n.device).view(len(n), -1) for n, total in zip(notes, sums, strict=False)]
        if self.exact:  # the rest of the notes was seen by all at once
            return [seen.with_inputs_of(n, row) for n, row in zip(notes, rows, strict=True)]
        extremes = [torch.stack((-n[:, seen.LOW], n[:, seen.HIGH])).flatten() for n in notes]
        if any(lot.config.range_mode == "fast" for lot in lots):
            together = torch.cat([e.to(device) for e in extremes])
            shards.all_reduce(together, self.groups, largest=True)
            extremes = list(together.split([e.numel() for e in extremes]))
        gathered = []
        for row, most in zip(rows, extremes, strict=True):
            minus_low, high = most.to(row.device).view(2, -1)
            gathered.append(seen.of_all(row, -minus_low, high))
        return gathered

    def _store_gradients(
        self, parameters: list[nn.Parameter], sums: tuple[Tensor, ...], has: Tensor
    ) -> None:
        for p, total, count in zip(parameters, sums, has.tolist(), strict=True):
            if not count:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            held = shards.local(p.grad)
            held.copy_((total / self.processes).view_as(held))

    def _commit(self, lot: _Lot, notes: Tensor) -> None:
        """Write the state of a lot: buffers whole, of parameters the part that is held here."""
        config = lot.config
        rule = seen.Rule(
            config.range_mode, config.init_from_data, config.init_std_alpha, config.momentum
        )
        parameters, *buffers = (lot.state(number) for number in range(len(RANGES)))
        buffers = [[shards.local(b) for b in kind] for kind in buffers]
        held, at = self._held(lot, parameters)
        count, x_min, x_max = map(torch.cat, buffers)
        state = seen.Ranges(torch.cat(held), count[at], x_min[at], x_max[at])
        new_range = seen.updated(state, rule, notes[at]).input_range
        whole = seen.updated(seen.Ranges(x_min, count, x_min, x_max), rule, notes)
        _store(held, new_range)
        self._close(lot, whole.count)
        for old, new in zip(buffers, (whole.count, whole.x_min, whole.x_max), strict=True):
            _store(old, new)

    def _close(self, lot: _Lot, count: Tensor) -> None:
        """Tell forwards which ranges are set, while there are such that are not."""
        flags = [getattr(m, s.state.initializes) for m, s in lot.sites]
        if not any(flags):
            return
        open_ = (count < lot.config.init_from_data).cpu()
        tiles = [len(noted) for noted in lot.notes()]
        for flag, its in zip(flags, open_.split(tiles), strict=True):
            flag.fill_(bool(its.any()))

    def _decay(self, lot: _Lot, notes: Tensor, scale: Tensor | None) -> None:
        """Add to the gradients what shrinks ranges while few of all inputs are saturated."""
        parameters = lot.state(0)
        held, at = self._held(lot, parameters)
        share = notes[at, seen.BEYOND] / notes[at, seen.INPUTS]  # NaN where nothing was seen
        shrinks = 1 - share > lot.config.input_min_percentage
        decay = lot.config.decay * torch.cat(held) * shrinks
        if scale is not None:
            decay = decay * scale.to(decay.device)
        parts = decay.split([h.numel() for h in held])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None and part.numel():
                shards.local(parameter.grad).add_(part.to(parameter.grad.dtype))

    def _held(self, lot: _Lot, parameters: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The parts of parameters that this process holds, and which tiles of the lot they are."""
        held = [shards.local(p) for p in parameters]
        numbers, first = [], 0
        for p, part, (module, _), noted in zip(
            parameters, held, lot.sites, lot.notes(), strict=True
        ):
            numbers.append(self._tiles(module, p, part, len(noted)) + first)
            first += len(noted)
        return held, torch.cat(numbers)

    def _tiles(self, module: AnalogModule, parameter: Tensor, held: Tensor, count: int) -> Tensor:
        """Which of the tiles of a site that are here have their range in this process."""
        spec: Any = parameter
        cut = (spec.device_mesh, spec.placements) if shards.is_sharded(parameter) else None
        key = (count, held.device, cut)
        if key not in self._tiles_held:
            tiles = torch.arange(count, device=held.device)
            parallel = module._analog.layout is not None
            part = shards.part_within if parallel else shards.part_of
            self._tiles_held[key] = part(tiles, parameter)
        return self._tiles_held[key]


def _store(places: list[Tensor], values: Tensor) -> None:
    """Write values to tensors, one after the other."""
    parts = list(values.split([p.numel() for p in places]))
    torch._foreach_copy_(places, parts)
