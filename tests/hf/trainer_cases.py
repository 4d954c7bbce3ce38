"""Trainer on two processes, compared with a loop in one; and the cases of ``tp_plan_cases.py``."""

import functools
from unittest import mock

import torch
import torch.distributed as dist
import tp_plan_cases
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from distributed_models import whole
from processes import alone, gathered
from test_trainer import ROWS, analog_llama, trainer
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import analogfx

STEPS = 2


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


def run(folder, accumulate=1, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    made = trainer(
        folder, model=analog_llama(noise=False), max_steps=STEPS, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch", ddp_backend="gloo",
        train_sampling_strategy="sequential", gradient_accumulation_steps=accumulate, **options,
    )  # fmt: skip
    assert made.args.world_size == dist.get_world_size() == 2
    return made


def compare(found, accumulate=1):
    for name, value in found.model.state_dict().items():
        value = whole(value)
        torch.testing.assert_close(
            value, expected(accumulate)[name], rtol=1e-4, atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
        assert torch.equal(*gathered(value)), name


def under_ddp(rank, folder, accumulate):
    found = run(folder, accumulate)
    found.train()
    assert isinstance(found.model_wrapped, DistributedDataParallel)
    compare(found, accumulate)


def under_fsdp(rank, folder):
    """accelerate offers FSDP2 on GPUs alone, so it is told that these processes have one each."""
    units = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {
        "fsdp": True,
        "fsdp_config": {"fsdp_version": 2, "cpu_ram_efficient_loading": False, **units},
        "save_strategy": "steps",
        "save_steps": 1,
    }
    with (
        mock.patch.object(
            PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)
        ),
        mock.patch.object(
            PartialState, "set_device", lambda state: setattr(state, "device", torch.device("cpu"))
        ),
    ):
        found = run(folder, **options)
        found.train()
        assert isinstance(found.model_wrapped, FSDPModule)
        assert isinstance(found.model.lm_head, FSDPModule)  # a unit that is one layer
        compare(found)
        resumed = run(folder, **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        compare(resumed)


CASES = {
    "one batch in a step": functools.partial(under_ddp, accumulate=1),
    "two batches in a step": functools.partial(under_ddp, accumulate=2),
    "FSDP2, and resumed": under_fsdp,
    **tp_plan_cases.CASES,
}
