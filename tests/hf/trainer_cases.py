"""Trainer on two processes, compared with a loop in one: accelerate has DDP alone on CPUs."""

import functools

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from processes import alone, gathered
from test_trainer import ROWS, analog_llama, trainer
from torch.nn.parallel import DistributedDataParallel

import analogfx

STEPS = 2
WAYS = {"one batch in a step": 1, "two batches in a step": 2}


@functools.cache
def expected(accumulate):
    """One process that sees what both see, without Trainer."""
    model = analog_llama(noise=False).train()
    optimizer = torch.optim.AdamW(analogfx.parameter_groups(model, 0.0), lr=1e-2)
    analogfx.prepare_training(optimizer, model, mesh_or_group=alone())
    for step in range(STEPS):
        for number in range(step * accumulate, (step + 1) * accumulate):
            rows = ROWS[4 * number : 4 * number + 4]
            (model(input_ids=rows, labels=rows).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def as_a_loop(rank, folder, accumulate):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = trainer(
        folder, model=analog_llama(noise=False), max_steps=STEPS, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch", ddp_backend="gloo",
        train_sampling_strategy="sequential", gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    assert run.args.world_size == dist.get_world_size() == 2
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(
            value, expected(accumulate)[name], rtol=1e-4, atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
        assert torch.equal(*gathered(value)), name


CASES = {way: functools.partial(as_a_loop, accumulate=number) for way, number in WAYS.items()}
