"""What happens around steps, against Lightning: clipping, quantisation for good, checkpoints.

In float64, where no two ways to sum round to different sides of a tie.
"""

import pytest
import torch
from aihwkit_lightning.nn import AnalogConv2d, AnalogConv3d, AnalogLinear
from aihwkit_lightning.nn.conversion import convert_to_analog
from aihwkit_lightning.optim import AnalogOptimizer
from aihwkit_lightning.simulator.configs import (
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightQuantizationType,
)
from oracle import assert_equal, feeding, lightning_layer, load, randomize, state
from torch import nn

import analogfx

# Configs are drawn: 8 steps are meant.
pytestmark = pytest.mark.filterwarnings("ignore:forward[.].*_res = .* is a quantizer of")

DTYPE = torch.float64


def mlp():
    layers = nn.Linear(12, 9, dtype=DTYPE), nn.ReLU(), nn.Linear(9, 5, dtype=DTYPE)
    return nn.Sequential(*layers)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 5, dtype=DTYPE), (7, 12)),
    "conv2d": (lambda: nn.Conv2d(2, 5, 3, dtype=DTYPE), (3, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, padding=1, dtype=DTYPE), (2, 2, 4, 4, 4)),
}
MODELS = {**LAYERS, "mlp": (mlp, (7, 12))}
GAUSSIAN = [WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL]
RANGES = ["static", "fast_mode", "dynamic"]


def make_config(ranges="static", clip=WeightClipType.NONE, sigma=-1.0):
    """8-bit converters, a range of some kind, and several tiles."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 2
    config.pre_post.input_range.decay = 0.01
    if ranges != "static":
        setattr(config.pre_post.input_range, ranges, True)
    config.forward.inp_res, config.forward.out_res, config.forward.out_bound = 254.0, 254.0, 5.0
    config.mapping.max_input_size = 7
    config.clip.type, config.clip.sigma = clip, sigma
    return config


def both(kind, config):
    """Lightning's model and ours, from one digital model, and inputs for five steps."""
    make, shape = MODELS[kind]
    digital = randomize(make(), seed=1, dead_row=False)
    convert = convert_to_analog if kind == "mlp" else lightning_layer
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    oracle, ours = convert(digital, config), analogfx.analogize(digital, config)
    load(ours, state(oracle))  # Lightning's convolutions begin with ranges rounded to float32
    return oracle, ours, inputs


def train(model, optimizer, inputs):
    """Pull the outputs to 1."""
    model.train()
    for x in inputs:
        optimizer.zero_grad()
        with feeding([], DTYPE):
            (model(x) - 1).square().mean().backward()
        optimizer.step()


def evaluated(model, x):
    with torch.no_grad():
        return model.eval()(x)


def assert_same_state(ours, oracle):
    actual, expected = state(ours), state(oracle)
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert_equal(actual[name], t)


@pytest.mark.parametrize("clip", GAUSSIAN)
@pytest.mark.parametrize("kind", MODELS)
def test_clip_after_step(kind, clip):
    oracle, ours, inputs = both(kind, make_config(clip=clip, sigma=1.2))
    layers = [
        m for m in oracle.modules() if isinstance(m, (AnalogLinear, AnalogConv2d, AnalogConv3d))
    ]
    wrapped = AnalogOptimizer(torch.optim.AdamW, lambda: iter(layers), oracle.parameters(), lr=0.05)
    train(oracle, wrapped, inputs)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05)
    analogfx.clip_after_step(optimizer, ours)
    train(ours, optimizer, inputs)
    assert_same_state(ours, oracle)

    _, unclipped, _ = both(kind, make_config(clip=clip, sigma=1.2))
    train(unclipped, torch.optim.AdamW(unclipped.parameters(), lr=0.05), inputs)
    assert any(not torch.equal(t, state(unclipped)[name]) for name, t in state(ours).items())


QUANTIZERS = [
    (WeightQuantizationType.DISCRETIZE, WeightClipType.NONE),
    (WeightQuantizationType.DISCRETIZE_PER_CHANNEL, WeightClipType.NONE),
    (WeightQuantizationType.NONE, WeightClipType.LEARNABLE_PER_CHANNEL),
    (WeightQuantizationType.DISCRETIZE_PER_CHANNEL, WeightClipType.LEARNABLE_PER_CHANNEL),
]


@pytest.mark.parametrize(("quantization", "clip"), QUANTIZERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_quantize_weights(kind, quantization, clip):
    config = make_config(clip=clip)
    config.modifier.quantization_type, config.modifier.res = quantization, 14.0
    oracle, ours, _ = both(kind, config)
    for layer in (oracle, ours):
        if clip is WeightClipType.LEARNABLE_PER_CHANNEL:
            layer.learnable_weight_clip.data *= 0.7
    before = ours.weight.detach().clone()
    analogfx.quantize_weights(ours)
    with pytest.warns(UserWarning, match="quantize_weights was called"):
        oracle.quantize_weights()
    assert torch.equal(ours.weight, oracle.weight)
    assert not torch.equal(ours.weight, before)


@pytest.mark.parametrize("clip", [WeightClipType.NONE, WeightClipType.LEARNABLE_PER_CHANNEL])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("kind", MODELS)
def test_state_dicts_are_interchangeable(kind, ranges, clip):
    config = make_config(ranges, clip)
    oracle, ours, inputs = both(kind, config)
    oracle_twin, our_twin, _ = both(kind, config)
    train(oracle, torch.optim.SGD(oracle.parameters(), lr=0.1), inputs)
    train(ours, torch.optim.SGD(ours.parameters(), lr=0.2), inputs)

    our_twin.load_state_dict(oracle.state_dict(), strict=True)
    assert_same_state(our_twin, oracle)
    assert_equal(evaluated(our_twin, inputs[0]), evaluated(oracle, inputs[0]))

    oracle_twin.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, oracle_twin)
    assert_equal(evaluated(ours, inputs[0]), evaluated(oracle_twin, inputs[0]))
