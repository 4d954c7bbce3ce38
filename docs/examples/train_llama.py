"""A tiny Llama, trained analog on several processes: the same losses whatever shares the work.

    torchrun --nproc-per-node 2 docs/examples/train_llama.py [--picture FILE]

Each process sees its own sequences. The table has the mean loss of every step: of one process that
sees all sequences, under DistributedDataParallel, under FSDP2, and under tensor parallelism, where
all processes see all sequences. A picture of it needs matplotlib.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import analogfx

STEPS, SEQUENCES, LENGTH, VOCABULARY = 10, 4, 16, 64


def analog_llama():
    """The same model in every process: noisy 8-bit tiles, ranges that follow four batches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)).double()
    config = analogfx.recipes.afm()
    config.pre_post.input_range.init_from_data = 4
    config.mapping.max_input_size = 16  # tiles end where tensor parallelism cuts
    config.modifier.noise_type = analogfx.WeightNoiseInjectionType.NONE  # other noise, other losses
    return analogfx.analogize(model, config)


def sequences(rank, step):
    """Counting up from somewhere: what comes next is easy to learn."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    first = torch.randint(VOCABULARY, (SEQUENCES, 1), generator=generator)
    return (first + torch.arange(LENGTH)) % VOCABULARY


def train(model, group, ranks):
    """The loss of every step, averaged over the processes of a group."""
    optimizer = torch.optim.AdamW(analogfx.parameter_groups(model, 0.01), lr=3e-3)
    analogfx.prepare_training(optimizer, model, group)
    losses = []
    for step in range(STEPS):
        ids = torch.cat([sequences(rank, step) for rank in ranks])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean, group=group)
        losses.append(mean.item() / dist.get_world_size(group))
    return losses


def draw(curves, path):
    """The losses over each other, and how far they are from those of one process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    above, below = FigureCanvasAgg(figure).figure.subplots(2, sharex=True, height_ratios=(2, 1))
    marks = zip(("-", "s", "o", "x"), (0, 11, 6, 6), curves.items(), strict=True)
    alone = curves["one process"]
    for mark, size, (name, losses) in marks:
        (line,) = above.plot(losses, mark, markersize=size, fillstyle="none", label=name)
        apart = [abs(loss - its) / its for loss, its in zip(losses, alone, strict=True)]
        if name != "one process":
            below.plot(apart, mark, markersize=size, fillstyle="none", color=line.get_color())
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.set_ylabel("relative difference\nfrom one process")
    below.set_xlabel("step")
    below.margins(y=0.15)
    for axes in (above, below):
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    """Train in four ways and print the losses side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", metavar="FILE", help="draw the losses, too")
    picture = parser.parse_args().picture
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = dist.new_group([rank], use_local_synchronization=True)
    curves = {"one process": train(analog_llama(), alone, range(world))}

    model = DistributedDataParallel(analog_llama())
    curves["DDP"] = train(model, dist.group.WORLD, [rank])

    model, mesh = analog_llama(), init_device_mesh("cpu", (world,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, **analogfx.distributed.fully_shard_policy(unit))
    curves["FSDP2"] = train(model, dist.group.WORLD, [rank])

    model, mesh = analog_llama(), init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    plan = dict.fromkeys((*columns, "mlp.up_proj"), ColwiseParallel())
    plan |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    curves["TP"] = train(model, alone, range(world))

    if rank == 0:
        print("step" + "".join(f"{name:>14}" for name in curves))
        for step, losses in enumerate(zip(*curves.values(), strict=True)):
            print(f"{step:4}" + "".join(f"{loss:14.8f}" for loss in losses))
        if picture:
            draw(curves, picture)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
