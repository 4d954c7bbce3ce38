import pytest
import torch
from samples import CONFIGS, EVERYTHING, TILES, merged, mlp, product
from torch import nn
from torch.fx import GraphModule

import analogfx
from analogfx.errors import CaptureError

pytestmark = pytest.mark.usefixtures("one_thread")

dialect = torch.ops.analogfx


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


MODELS = {
    # name: (makes it, its input, analog products)
    "MLP": (mlp, torch.randn(3, 8), 2),
    "CNN": (cnn, torch.randn(2, 2, 4, 4), 3),
    "GPT-2": (gpt2, torch.arange(6).view(1, 6), 5),
}


def census(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_at_the_explicit_level_computes_what_the_model_computes(name):
    make, x, products = MODELS[name]
    analog = analogfx.analogize(make().eval(), EVERYTHING)
    traced = analogfx.trace(analog, x)
    assert isinstance(traced, GraphModule)
    called = census(traced)
    for op in (dialect.dac, dialect.clip_weight, dialect.mvm, dialect.adc):
        assert called.count(op.default) == products
    assert not {dialect.analog_linear.default, dialect.analog_conv.default} & set(called)
    assert not {dialect.update_range.default, dialect.draw_seed.default} & set(called)
    with torch.no_grad():
        expected = analog(x)
        (y, *_) = torch.utils._pytree.tree_leaves(traced(x))
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    torch.testing.assert_close(y, expected)


def test_a_training_models_graph_has_its_noise_and_statistics():
    analog = analogfx.analogize(mlp(), EVERYTHING)
    before = {name: t.clone() for name, t in analog.state_dict().items()}
    called = census(analogfx.trace(analog, torch.randn(3, 8)))
    for op in (dialect.update_range, dialect.draw_seed, dialect.weight_noise, dialect.output_noise):
        assert called.count(op.default) == 2
    torch.testing.assert_close(dict(analog.state_dict()), before, rtol=0, atol=0)


def test_every_tile_has_its_node():
    analog = analogfx.analogize(mlp().eval(), merged(EVERYTHING, TILES))
    called = census(analogfx.trace(analog, torch.randn(3, 8)))
    assert called.count(dialect.mvm.default) == 2 + 3


def test_the_model_runs_fused_afterwards():
    analog = analogfx.analogize(mlp().eval(), CONFIGS["DAC"])
    x = torch.randn(3, 8)
    y = analog(x)
    analogfx.trace(analog, x)
    assert torch.equal(analog(x), y)
    assert type(analog.first).__name__ == "AnalogLinear"


def test_keywords_and_several_inputs():
    module = product(lambda self, x, y: x @ self.w + y, dtype=torch.float32, w=(8, 4))
    analog = analogfx.analogize(module, CONFIGS["DAC"]).eval()
    x, y = torch.randn(3, 8), torch.randn(3, 4)
    traced = analogfx.trace(analog, x, y=y)
    torch.testing.assert_close(traced(x, y=y), analog(x, y))


def test_a_model_without_a_single_graph_says_so():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    analog = analogfx.analogize(Gate(), CONFIGS["DAC"])
    with pytest.raises(CaptureError, match="Gate has no single graph: "):
        analogfx.trace(analog, torch.ones(2, 4))
    from analogfx.modules import program

    assert program._explicit is False
