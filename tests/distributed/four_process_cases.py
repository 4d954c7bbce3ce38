"""What four processes do together: two are data-parallel, of two shards or parts each."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import one_process
from distributed_models import (
    batch,
    checkpointed,
    close,
    config,
    joint,
    mesh,
    net,
    prepared,
    same_everywhere,
    sharded,
    state,
    train,
)
from tensor_parallel_cases import cut
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import analogfx
from analogfx.errors import PlacementError

STEPS = 4
CASES = {}


def case(name):
    def add(function):
        CASES[name] = function
        return function

    return add


@functools.cache
def grid(names=("data", "tp")):
    return mesh((2, 2), names)


def sharded_and_cut(made, policy):
    """FSDP2 over the first dimension of the mesh, tensor parallelism over the second."""
    model = cut(analogfx.analogize(net(), made), grid()["tp"])
    return sharded(model, policy=policy, over=grid()["data"])


def as_one_process(rank, folder, made, policy, checkpoint, accumulate):
    batches = [joint(number) for number in range(STEPS * accumulate)]
    expected, losses, gradients = one_process(made, batches, accumulate)
    model = sharded_and_cut(made, policy)
    if checkpoint:
        model = checkpointed(model)
    data = grid().get_local_rank("data")
    own = [batch(data, number) for number in range(STEPS * accumulate)]
    found_losses, found = train(model, prepared(model, mesh_or_group=grid()), own, accumulate)
    same_everywhere(model)
    close(state(model), expected)
    close(found, gradients)
    dist.all_reduce(found_losses)
    torch.testing.assert_close(found_losses / 4, losses, rtol=1e-9, atol=0)


for _policy, _init in itertools.product((True, False), (0, 3)):
    _name = f"FSDP2 and TP, {_init} batches for ranges{', ranges outside' * _policy}"
    CASES[_name] = functools.partial(
        as_one_process, made=config(_init), policy=_policy, checkpoint=False, accumulate=1
    )
CASES["FSDP2 and TP, checkpointed, 3 in a step, bounds of matrices"] = functools.partial(
    as_one_process, made=config(clip="LayerGaussian"), policy=True, checkpoint=True, accumulate=3
)


@case("HSDP")
def hybrid(rank, folder):
    both = [
        tuple(map(torch.cat, zip(*(batch(r, n) for r in range(4)), strict=True)))
        for n in range(STEPS)
    ]
    expected, _, gradients = one_process(config(), both)
    model = sharded(analogfx.analogize(net(), config()), over=grid(("replica", "shard")))
    _, found = train(model, prepared(model), [batch(rank, n) for n in range(STEPS)])
    same_everywhere(model)
    close(state(model), expected)
    close(found, gradients)


@case("which processes are data-parallel must be said")
def data_parallel(rank, folder):
    with pytest.raises(PlacementError, match="tensor-parallel over 2 of 4 processes: pass"):
        prepared(sharded_and_cut(config(), policy=True))
    assert len(prepared(sharded_and_cut(config(), True), mesh_or_group=grid()["data"]).state) == 0


@case("a checkpoint of four processes, two by two, loads in one")
def other_world(rank, folder):
    model = sharded_and_cut(config(2), policy=True)
    data = grid().get_local_rank("data")
    train(model, prepared(model, mesh_or_group=grid()), [batch(data, n) for n in range(3)])
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    dist.barrier()
    single = analogfx.analogize(net(seed=1), config(2))
    loaded = {"model": single.state_dict()}
    dcp.load(loaded, checkpoint_id=folder / "dcp", no_dist=True)
    single.load_state_dict(loaded["model"])
    close(state(single), state(model))
