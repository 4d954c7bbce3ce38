"""transformers' tensor parallelism on two processes, compared with a dense model in each."""

import functools

import pytest
import torch
import torch.distributed as dist
from distributed_models import whole
from processes import alone
from tiny import IDS, llama, recipe
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import analogfx
import analogfx.hf
from analogfx.errors import PlacementError


def config(tile=8, **ranges):
    made = recipe(**ranges)
    made.mapping.max_input_size = tile
    made.modifier.noise_type = analogfx.WeightNoiseInjectionType.NONE
    return made


def learned_clips(made):
    made.clip.type = analogfx.WeightClipType.LEARNABLE_PER_CHANNEL
    made.clip.sigma = -1
    return made


def load(folder, **options):
    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, **options)


def trained(model, group):
    optimizer = torch.optim.SGD(analogfx.parameter_groups(model.train(), 0.01), lr=0.1)
    analogfx.prepare_training(optimizer, model, group)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def as_dense(rank, folder, tied, made, is_analog):
    digital = llama(tied)
    dense = analogfx.analogize(digital, made).eval()
    if rank == 0:
        (dense if is_analog else digital).save_pretrained(folder / "before")
    dist.barrier()
    options = {} if is_analog else {"quantization_config": analogfx.hf.AnalogConfig(made)}
    model = load(folder / "before", **options).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        close(whole(model(IDS).logits), dense(IDS).logits)
    close(trained(model, None), trained(dense, alone()))
    for name, value in model.state_dict().items():
        close(whole(value), dense.state_dict()[name], msg=lambda m, n=name: f"{n}: {m}")
    model.save_pretrained(folder / "after")
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(folder / "after")
    with torch.no_grad():
        close(again(IDS).logits, whole(model(IDS).logits))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS[:, :4], **how), again.generate(IDS[:, :4], **how))


def tile_edges(rank, folder):
    made = config(tile=-1)
    if rank == 0:
        llama().save_pretrained(folder / "digital")
    dist.barrier()
    with pytest.raises(
        PlacementError, match=r"layers[.]0[.]self_attn[.]o_proj: .*at 16, .*max_input_size=16 fits"
    ):
        load(folder / "digital", quantization_config=analogfx.hf.AnalogConfig(made))


CASES = {
    "tp_plan of an analog folder, tied, learned clips": functools.partial(
        as_dense, tied=True, made=learned_clips(config()), is_analog=True
    ),
    "tp_plan of a digital folder": functools.partial(
        as_dense, tied=False, made=config(init_from_data=0), is_analog=False
    ),
    "tp_plan and tile edges that are no shard edges": tile_edges,
}
