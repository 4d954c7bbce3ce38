"""The small models of the distributed cases, their data, and wrappers around them."""

import torch
import torch.nn.functional as F
from processes import WORLD, alone, gathered
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import analogfx

INPUTS, WIDTH, OUTPUTS, ROWS = 8, 16, 4, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Net().to(dtype)


def config(init=3, clip="LayerGaussianPerChannel", **ranges):
    """8-bit converters, two tiles in the wide layer, ranges that decay fast, a tight clip."""
    return {
        "pre_post": {
            "input_range": {
                "enable": True,
                "init_from_data": init,
                "init_value": 2.0,
                "decay": 0.05,
                "input_min_percentage": 0.9,
                **ranges,
            }
        },
        "forward": {"inp_res": 254, "out_res": 254, "out_bound": 12.0},
        "mapping": {"max_input_size": 20},
        "clip": {"type": clip, "sigma": 1.5},
    }


def batch(rank, number, dtype=torch.float64):
    """What a rank sees; the second one's inputs are four times as large."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    y = torch.randn(ROWS, OUTPUTS, generator=generator)
    return (x * (1 + 3 * rank)).to(dtype), y.to(dtype)


def joint(number, dtype=torch.float64):
    """What all ranks see."""
    both = zip(*(batch(rank, number, dtype) for rank in range(WORLD)), strict=True)
    return tuple(torch.cat(tensors) for tensors in both)


def mesh(shape=(WORLD,), names=("data",)):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def sharded(model, policy=False, over=None, **options):
    """Every block a unit, and the rest another."""
    own = analogfx.distributed.fully_shard_policy if policy else lambda module: {}
    over = mesh() if over is None else over
    for module in (*model.blocks, model):
        fully_shard(module, mesh=over, **own(module), **options)
    return model


def layer_by_layer(model):
    """Units that are one analog layer or several, as torchtitan has them, and the rest another."""
    first, second = model.blocks
    for unit in (first.up, first.down, [second.norm, second.down, model.head], model):
        fully_shard(unit, mesh=mesh())
    return model


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
    "hsdp": lambda model: sharded(model, over=mesh((WORLD, 1), ("replica", "shard"))),
    "fsdp, ranges outside": lambda model: sharded(model, policy=True),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clean(name):
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def state(model):
    """Parameters and buffers, whole, by their names without wrappers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {clean(name): whole(t).detach().clone() for name, t in named}


def train(model, optimizer, batches, accumulate=1):
    """Losses of every micro-batch, and the gradients of the last step.

    Gradients are those at the step: reduced, with the decay of ranges.
    """
    losses, gradients = [], {}

    def keep(*_):
        gradients.update(
            (clean(n), whole(p.grad).clone())
            for n, p in model.named_parameters()
            if p.requires_grad
        )

    handle = optimizer.register_step_pre_hook(keep)
    for number, (x, y) in enumerate(batches):
        loss = F.mse_loss(model(x), y)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if number % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    return torch.stack(losses), gradients


def prepared(model, **options):
    """An optimizer of a model, prepared."""
    optimizer = torch.optim.SGD(analogfx.parameter_groups(model, 0.01), lr=0.05, momentum=0.5)
    analogfx.prepare_training(optimizer, model, **options)
    return optimizer


def one_process(made, batches, accumulate=1, dtype=torch.float64):
    """The state, losses and last gradients of one process that sees what all ranks see."""
    model = analogfx.analogize(net(dtype=dtype), made)
    losses, gradients = train(model, prepared(model, mesh_or_group=alone()), batches, accumulate)
    return state(model), losses, gradients


def same_everywhere(model):
    for name, tensor in state(model).items():
        first, *others = gathered(tensor)
        assert all(torch.equal(first, other) for other in others), name


def close(found, expected, names=None):
    for name in names or expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
