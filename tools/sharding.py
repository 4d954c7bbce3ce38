"""What each process of many holds and sends for a layer of a large Llama: on paper, and counted.

    python tools/sharding.py            the tables of docs/sharding.md
    python tools/sharding.py --count    what one process of a fake group of 1,024 holds and sends

A mesh has data-parallel processes (FSDP2, ranges outside of units) times tensor-parallel ones. The
fake group sends nothing and computes with what it has, so that one process stands for all.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import analogfx

COLUMNS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
ROWS = ("self_attn.o_proj", "mlp.down_proj")
BF16, FP32, FP64 = 2, 4, 8
NOTE = 8
"""Numbers that a range notes between two steps, float64."""
SUMMANDS = 7
"""Numbers of them that the step adds up; one more is the gradient of the range."""
MOMENTS = 3
"""Numbers of a row that a clip adds up where columns are cut, float64."""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tile: int
    """Inputs of a tile."""

    def layers(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the linear layers of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        outputs = {
            "q": square,
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "gate": wide,
            "up": wide,
        }
        names = dict(zip(("q", "k", "v", "gate", "up"), COLUMNS, strict=True))
        shapes = {names[key]: shape for key, shape in outputs.items()}
        return shapes | {ROWS[0]: square, ROWS[1]: (self.hidden, self.intermediate)}


LLAMA_70B = Sizes(8192, 28672, 64, 8, tile=512)
SMALL = Sizes(128, 256, 16, 8, tile=16)
"""The same shapes, small enough to compute; collectives do not depend on sizes."""
MESHES = ((8, 1), (1, 8), (8, 8), (32, 8), (128, 8), (1024, 1))


def held(sizes: Sizes, data: int, tensor: int) -> dict[str, int]:
    """Bytes that one process holds for a block between two steps, by kind."""
    shapes = sizes.layers()
    weights = sum(out * inputs for out, inputs in shapes.values()) // (data * tensor)
    ranges = _ranges(sizes, tensor)
    return {
        "weights, bf16": BF16 * weights,
        "gradients, bf16": BF16 * weights,
        "ranges, float32": FP32 * ranges,
        "statistics": NOTE * FP64 * ranges,
    }


def _ranges(sizes: Sizes, tensor: int) -> int:
    """Ranges of a block in one process: those of the tiles of which it has a part."""
    return sum(
        inputs // sizes.tile // (tensor if name in ROWS else 1)
        for name, (_, inputs) in sizes.layers().items()
    )


def maxima(sizes: Sizes, tensor: int) -> int:
    """Bytes of the largest weights of tiles' rows, which a forward computes and drops."""
    return sum(
        FP32 * out * (inputs // sizes.tile) // tensor for out, inputs in sizes.layers().values()
    )


def sent(sizes: Sizes, data: int, tensor: int) -> dict[str, int]:
    """Bytes of the tensors that one process hands to collectives for a block in a step, by kind.

    A gather or a reduce-scatter counts by the whole of what it gathers or scatters.
    """
    unit = sum(out * inputs for out, inputs in sizes.layers().values()) // tensor
    cut_rows = sum(sizes.layers()[name][0] for name in ROWS) // data
    noted = (SUMMANDS + 1) * FP64 * _ranges(sizes, tensor) + FP64 * len(sizes.layers())
    return {
        "weights, gathered twice": 2 * BF16 * unit if data > 1 else 0,
        "gradients, scattered": BF16 * unit if data > 1 else 0,
        "statistics": noted if data > 1 else 0,
        "clip": MOMENTS * FP64 * cut_rows if tensor > 1 else 0,
    }


# ----------------------------------------------------------------------------------- counting


def llama(sizes: Sizes, blocks: int, analog: bool) -> torch.nn.Module:
    """A Llama of a few blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate}
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=blocks, **shape, **heads)
    model = LlamaForCausalLM(config)
    if not analog:
        return model
    made = analogfx.recipes.afm()
    made.pre_post.input_range.init_from_data = 0
    made.mapping.max_input_size = sizes.tile
    return analogfx.analogize(model, {"model.layers": made, "*": None}, inplace=True)


def cut(model: torch.nn.Module, mesh: object) -> torch.nn.Module:
    """Tensor parallelism over one dimension of the mesh, FSDP2 over the other."""
    plan = dict.fromkeys(COLUMNS, ColwiseParallel()) | dict.fromkeys(ROWS, RowwiseParallel())
    if mesh["tp"].size() > 1:
        for block in model.model.layers:
            parallelize_module(block, mesh["tp"], plan)
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh["data"], **analogfx.distributed.fully_shard_policy(unit))
    return model


def local_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of this process's parts of a model on meta, by kind."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if ".layers." in name and name.endswith(("_proj.weight", "input_range")):
            kind = "weights" if name.endswith("weight") else "ranges"
            found[kind] += own.numel()
    for module in model.model.layers.modules():
        if hasattr(module, "range_statistics"):
            found["statistics"] += module.range_statistics.nbytes
    return {
        "weights, bf16": BF16 * found["weights"],
        "ranges, float32": FP32 * found["ranges"],
        "statistics": found["statistics"],
    }


def collectives(sizes: Sizes, blocks: int, analog: bool, mesh: object) -> dict[str, object]:
    """What a training step sends: how often in forward and backward, and bytes in the step."""
    torch.manual_seed(0)
    model = cut(llama(sizes, blocks, analog), mesh)
    optimizer = torch.optim.AdamW(analogfx.parameter_groups(model, 0.01), lr=1e-3)
    if analog:
        analogfx.prepare_training(optimizer, model, mesh)
    ids = torch.randint(64, (1, 8))
    inside: list[int] = []  # of ops, into which the mode does not see
    reduce = dist.all_reduce

    def spy(tensor: torch.Tensor, *args: object, **options: object) -> object:
        inside.append(tensor.nbytes)
        return reduce(tensor, *args, **options)

    with CommDebugMode() as mode, mock.patch.object(dist, "all_reduce", spy):
        model(input_ids=ids, labels=ids).loss.backward()
        passes = mode.get_total_counts() + len(inside)
        of_passes = len(inside)
        optimizer.step()
    return {"passes": passes, "step": inside[of_passes:]}


def count(data: int, tensor: int) -> dict[str, object]:
    """What a process of a fake group holds of one block, and sends for one and for two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=data * tensor, store=FakeStore())
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tp"))
    with torch.device("meta"):
        large = llama(LLAMA_70B, 1, analog=True)
    optimizer = torch.optim.SGD(cut(large, mesh).parameters(), lr=0.1)
    analogfx.prepare_training(optimizer, large, mesh)
    found: dict[str, object] = {"held": local_bytes(large)}
    for analog in (False, True):
        name = "analog" if analog else "digital"
        found[name] = [collectives(SMALL, blocks, analog, mesh) for blocks in (1, 2)]
    dist.destroy_process_group()
    return found


# -------------------------------------------------------------------------------------- tables


def shown(number: int) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def table(rows: list[dict[str, int]]) -> str:
    """One row for each mesh."""
    names = list(rows[0])
    lines = ["| data × tensor | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for (data, tensor), row in zip(MESHES, rows, strict=True):
        cells = " | ".join(shown(row[name]) for name in names)
        lines.append(f"| {data} × {tensor} | {cells} |")
    return "\n".join(lines)


def tables() -> tuple[str, str]:
    """Both tables of the page."""
    holds = [
        held(LLAMA_70B, *m) | {"maxima, in a forward": maxima(LLAMA_70B, m[1])} for m in MESHES
    ]
    return table(holds), table([sent(LLAMA_70B, *m) for m in MESHES])


def main() -> None:
    """Print the tables, or what was counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", action="store_true")
    if parser.parse_args().count:
        print(json.dumps(count(128, 8)))
    else:
        print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
