"""What two processes do together, each case a function of its rank and of a folder both see.

Numbers are compared with those of one process that sees the data of both, in float64.
"""

import functools
import itertools

import torch
import torch.distributed as dist
from distributed_models import (
    WRAPPERS,
    batch,
    checkpointed,
    close,
    config,
    joint,
    net,
    one_process,
    prepared,
    same_everywhere,
    sharded,
    state,
    train,
)  # fmt: skip
from processes import gathered
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import analogfx
from analogfx.kernels import dispatch

STEPS = 5


@functools.cache
def reference(init, accumulate):
    return one_process(config(init), map(joint, range(STEPS * accumulate)), accumulate)


def as_one_process(rank, folder, wrapper, init, checkpoint, accumulate, order="analog first"):
    made = config(init)
    numbers = range(STEPS * accumulate)
    expected, losses, gradients = reference(init, accumulate)
    if order == "analog first":
        model = analogfx.analogize(net(), made)
        model = WRAPPERS[wrapper](checkpointed(model) if checkpoint else model)
    else:
        model = WRAPPERS[wrapper](net())
        model = analogfx.analogize(model, made, inplace=True)
    batches = (batch(rank, number) for number in numbers)
    own, found = train(model, prepared(model), batches, accumulate)
    same_everywhere(model)
    close(state(model), expected)
    if order == "analog first" or accumulate == 1:
        close(found, gradients)
    dist.all_reduce(own)
    torch.testing.assert_close(own / 2, losses, rtol=1e-9, atol=0)


CASES = {}
for _wrapper, _init, _checkpoint, _accumulate in itertools.product(
    WRAPPERS, (0, 3), (False, True), (1, 3)
):
    _name = f"{_wrapper}, {_init} batches for ranges, {_accumulate} in a step"
    _name += ", checkpointed" * _checkpoint
    CASES[_name] = functools.partial(
        as_one_process, wrapper=_wrapper, init=_init, checkpoint=_checkpoint, accumulate=_accumulate
    )
for _init in (0, 3):
    CASES[f"sharded first, {_init} batches for ranges"] = functools.partial(
        as_one_process, wrapper="fsdp", init=_init, checkpoint=False, accumulate=1,
        order="sharded first",
    )  # fmt: skip
for _kind, _ranges in {
    "fast": {"fast_mode": True}, "fast with momentum": {"fast_mode": True, "act_range_momentum": 0.5},
    "frozen": {"learn_input_range": False},
}.items():  # fmt: skip

    def _of_kind(rank, folder, ranges=_ranges):
        made = config(3, **ranges)
        expected, _, _ = one_process(made, map(joint, range(STEPS)))
        for wrapper in ("ddp", "fsdp"):
            model = WRAPPERS[wrapper](analogfx.analogize(net(), made))
            train(model, prepared(model), (batch(rank, number) for number in range(STEPS)))
            same_everywhere(model)
            close(state(model), expected)

    CASES[f"{_kind} ranges"] = _of_kind


def case(name):
    def add(function):
        CASES[name] = function
        return function

    return add


def _note(seen, name, module, args):
    seen[name] = args[0].detach()


@case("the first step's ranges are those of the inputs of all ranks")
def first_step(rank, folder):
    for exact in (True, False):
        model = analogfx.analogize(net(), config(3, learn_input_range=False, init_std_alpha=2.5))
        seen = {}
        for name, module in model.named_modules():
            if hasattr(module, "input_range"):
                module.register_forward_pre_hook(functools.partial(_note, seen, name))
        wrapped = DistributedDataParallel(model)
        train(wrapped, prepared(wrapped, exact=exact), [batch(rank, 0)])
        same_everywhere(model)
        for name, x in seen.items():
            tiles = torch.cat(gathered(x)).tensor_split(2 if x.shape[1] > 20 else 1, dim=1)
            expected = torch.stack([2.5 * tile.std() for tile in tiles])
            torch.testing.assert_close(model.get_submodule(name).input_range.detach(), expected)


@case("a mixed-precision policy leaves ranges outside of units in float32")
def ranges_in_float32(rank, folder):
    model = analogfx.analogize(net(dtype=torch.float32), config(3))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(model, policy=True, mp_policy=policy)
    seen, forward = [], dispatch.forward

    def spy(op, x, weight, bias, input_range, *rest):
        seen.append((weight.dtype, input_range.dtype))
        return forward(op, x, weight, bias, input_range, *rest)

    dispatch.forward = spy
    try:
        batches = (batch(rank, number, torch.float32) for number in range(STEPS))
        losses, _ = train(model, prepared(model), batches)
    finally:
        dispatch.forward = forward
    assert losses.isfinite().all()
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert model.inp.input_range.dtype == torch.float32
    same_everywhere(model)
    expected = torch.stack([2.5 * joint(number)[0].std() for number in range(3)])
    assert model.inp.input_range_update_idx.tolist() == [3]
    assert 0.5 < model.inp.input_range.item() / expected.mean().item() < 1.5
