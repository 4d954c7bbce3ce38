"""Configs and models that the export tests share."""

import re
from typing import NamedTuple

import onnx_compare
import samples
import torch
import transformers
from torch import nn

from analogfx import TorchInferenceRPUConfig, analogize, export_onnx, recipes
from analogfx.onnx import levels

LEVELS = tuple(levels.LEVELS)

DATA = re.compile(r"model\.onnx\.[0-9a-f]{8}\.data")
"""Name of the weights beside a model.onnx."""


def config(**fields):
    """A config from dotted fields with ``__`` for dots; an input range unless told otherwise."""
    made = TorchInferenceRPUConfig()
    for name, value in {"pre_post__input_range__enable": True, **fields}.items():
        *path, last = name.split("__")
        section = made
        for part in path:
            section = getattr(section, part)
        setattr(section, last, value)
    return made


CONFIGS = {
    "ideal": config(pre_post__input_range__enable=False),
    "afm": recipes.afm(),
    "dynamic": config(
        pre_post__input_range__dynamic=True,
        forward__inp_res=254,
        forward__out_res=254,
        forward__out_bound=10,
        mapping__max_input_size=5,
        mapping__max_output_size=3,
    ),
    "int8": config(
        pre_post__input_range__fast_mode=True,
        forward__inp_res=1 / 254,
        modifier__quantization_type="Discretize",
        modifier__res=254,
        mapping__max_input_size=7,
    ),
    "int4": config(
        forward__inp_res=254,
        forward__out_res=254,
        forward__out_bound=10,
        modifier__quantization_type="DiscretizePerChannel",
        modifier__res=14,
    ),
    "lsq": config(
        forward__inp_res=62,
        modifier__quantization_type="DiscretizePerChannel",
        modifier__res=14,
        clip__type="LearnablePerChannel",
        mapping__max_input_size=6,
    ),
    "clip": config(pre_post__input_range__enable=False, clip__type="LearnablePerChannel"),
}


def mlp():
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5, bias=False))


def conv2d():
    features = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    return nn.Sequential(features, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))


MODELS = {
    "linear": (mlp, (4, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (2, 4, 9)),
    "conv2d": (conv2d, (2, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=1, dilation=(1, 2, 1)), (2, 2, 5, 6, 4)),
}


TRANSFORMERS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, use_cache=False,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            image_size=16, patch_size=8,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic",
        )
    ),
}  # fmt: skip


def example(name, batch=2, length=5):
    """An input of a model."""
    if name in MODELS:
        return torch.randn(batch, *MODELS[name][1][1:])
    if name in ("gpt2", "llama"):
        return torch.randint(0, 50, (batch, length))
    return torch.randn(batch, 3, 16, 16)


def analog(model, rpu_config, *inputs):
    """An analog model whose ranges have seen data, in eval mode."""
    torch.manual_seed(0)
    made = analogize(model(), rpu_config)
    made.train()(*inputs)
    return made.eval()


class Case(NamedTuple):
    """One export of the matrix."""

    model: str
    config: str
    """Name in ``samples.CONFIGS``."""
    level: str
    tiled: bool
    opset: int

    def check(self, folder, verify=True):
        """Export it and hold the file against the model, in both runtimes and on other sizes.

        Returns:
            What the comparison in ONNX Runtime saw.
        """
        x = example(self.model)
        factory = MODELS[self.model][0] if self.model in MODELS else TRANSFORMERS[self.model]
        tiles = samples.TILES if self.tiled else {}
        made = analog(factory, samples.merged(samples.CONFIGS[self.config], tiles), x)
        path = folder / "model.onnx"
        export_onnx(made, (x,), path, level=self.level, opset=self.opset, verify=verify)
        found = onnx_compare.Found()
        for other in (x, example(self.model, batch=3, length=9), x[:1]):
            found += onnx_compare.compare(path, made, [other])
        onnx_compare.compare(path, made, [x], onnx_compare.reference_evaluator)
        if self.level in ("fused", "explicit"):
            onnx_compare.compare(path, made, [x], onnx_compare.backend)
        return found


def matrix():
    """Every config on every model at every level; half of them tiled, half of them in opset 21.

    ONNX's reference evaluator has no DequantizeLinear below opset 19.
    """
    models = (*MODELS, *TRANSFORMERS)
    return [
        Case(model, config, level, (c + n) % 2 == 1, 21 if level == "qdq" or c % 2 else 18)
        for model in models
        for c, config in enumerate(samples.CONFIGS)
        for n, level in enumerate(LEVELS)
    ]
