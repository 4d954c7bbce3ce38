"""DeepSpeed's ZeRO on two processes: weights are its own, ranges have an optimizer beside it."""

import functools

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param
from distributed_models import batch, config, joint, net, one_process, same_everywhere, state

import analogfx

STEPS = 3


def as_one_process(rank, folder, stage, dtype, accumulate):
    number = STEPS * accumulate
    batches = [joint(n, torch.float32) for n in range(number)]
    expected, _, _ = one_process(config(), batches, accumulate, torch.float32)
    model = analogfx.analogize(net(dtype=torch.float32), config())
    weights, ranges = analogfx.parameter_groups(model, 0.01)
    how = {"lr": 0.05, "momentum": 0.5}
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD([weights], **how), config=settings
    )
    own = torch.optim.SGD([ranges], **how)
    analogfx.prepare_training(own, model)
    for n in range(number):
        x, y = batch(rank, n, torch.float32)
        engine.backward(F.mse_loss(engine(x.to(dtype)).float(), y))
        engine.step()
        if n % accumulate == accumulate - 1:
            own.step()
            own.zero_grad()
    same_everywhere(model)
    found = state(model)
    assert found["inp.input_range"].dtype == torch.float32
    assert found["inp.weight"].dtype == dtype
    names = [name for name, _ in model.named_parameters() if "input_range" not in name]
    found |= {name: safe_get_full_fp32_param(model.get_parameter(name)) for name in names}
    rounding = (
        {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.01}
    )
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda m, n=name: f"{n}: {m}", **rounding
        )


CASES = {
    f"ZeRO-{stage}, {str(dtype)[6:]}, {accumulate} in a step": functools.partial(
        as_one_process, stage=stage, dtype=dtype, accumulate=accumulate
    )
    for stage in (1, 2)
    for dtype in (torch.float32, torch.bfloat16)
    for accumulate in (1, 3)
}
