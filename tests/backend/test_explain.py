import copy
import subprocess
import sys

import pytest
import torch
from compiled import QUIET, compiled, ranges, stack
from samples import TILES, merged, mlp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

import analogfx
from analogfx.errors import CaptureError, ConfigError
from analogfx.passes import pipeline

EVERY_PASS = [p.__name__ for p in (*pipeline.EXPLICIT, *pipeline.FUSED, *pipeline.WHOLE_GRAPH)]


def counts(explanation):
    total = dict.fromkeys(EVERY_PASS, 0)
    for graph in explanation.graphs:
        for made in graph.steps:
            total[made.name] += made.count
    return total


def reasons(explanation, name):
    return [why for graph in explanation.graphs for n, _, why in graph.notes if n == name]


def llama():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(0, 40, (2, 6))


def resnet():
    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    return ResNetForImageClassification(config).eval(), torch.randn(2, 3, 16, 16)


@torch.no_grad()
def test_a_llama_shares_its_inputs():
    model, tokens = llama()
    found = analogfx.explain(model, QUIET, tokens, use_cache=False)
    total = counts(found)
    # 2 layers of q, k, v, o, gate, up, down, and the head.
    assert total["select"] == total["lower"] == total["freeze"] == 15
    assert total["share_input"] == 2 * (2 + 1)
    assert total["epilogue"] >= 2 * 2  # the residuals behind o and down
    assert set(reasons(found, "skip_conversion")) == {"its input may be below 0"}


@torch.no_grad()
def test_a_resnet_clamps_one_side_behind_its_relus():
    model, images = resnet()
    found = analogfx.explain(model, QUIET, images)
    total = counts(found)
    assert total["select"] == total["lower"] == total["freeze"] == 7
    assert total["skip_conversion"] > 0
    assert total["share_input"] == 0
    assert "skip_identity" in found.summary() and "inputs have a static range" in found.summary()


def test_with_gradients_nothing_is_frozen_and_the_reason_says_so():
    found = analogfx.explain(mlp(), QUIET, torch.randn(3, 8))
    assert counts(found)["freeze"] == 0
    assert all(why.startswith("gradients are on") for why in reasons(found, "freeze"))


def test_printing_gives_the_graph_after_every_pass_that_fired():
    with torch.no_grad():
        found = analogfx.explain(mlp().eval(), merged(QUIET, TILES), torch.randn(3, 8))
    (graph,) = found.graphs
    assert [made.name for made in graph.steps] == EVERY_PASS
    text = str(found)
    assert "graph 1 of 1" in text and "  lower: 2 changed" in text
    assert "# graph 1, after map_tiles" in text and "torch.ops.analogfx.adc.default" in text
    assert "# graph 1, after normalize" not in text  # which changed nothing
    assert "# graph 1, as captured" in text


def test_nothing_of_the_model_or_of_the_generator_changes():
    model = mlp()
    run = compiled(model, QUIET)
    run(torch.randn(3, 8))
    before = copy.deepcopy(model.state_dict()), ranges(run), torch.get_rng_state()
    analogfx.explain(run, merged(QUIET, {"modifier": {"noise_type": "AddNormal", "std_dev": 0.1}}),
                     torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))  # fmt: skip
    after = model.state_dict(), ranges(run), torch.get_rng_state()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_ranges_are_those_that_the_model_has():
    model = stack(breaks=False, depth=1).eval()
    run = compiled(model, QUIET)
    with torch.no_grad():
        run(torch.randn(3, 8))
        assert counts(analogfx.explain(run, QUIET, torch.randn(3, 8)))["share_input"] == 1
        analogfx.backend_state(run).state_dict()["blocks.0.key.input_range"].mul_(2)
        found = analogfx.explain(run, QUIET, torch.randn(3, 8))
    assert counts(found)["share_input"] == 0
    assert any("another range" in why for why in reasons(found, "share_input"))


def test_passes_may_be_chosen():
    with torch.no_grad():
        found = analogfx.explain(mlp().eval(), QUIET, torch.randn(3, 8), passes=["freeze"])
    assert [made.name for made in found.graphs[0].steps] == [*EVERY_PASS[:8], "freeze"]


def test_an_analogized_model_is_explained_without_a_config():
    analog = analogfx.analogize(mlp(), QUIET).eval()
    with torch.no_grad():
        found = analogfx.explain(analog, None, torch.randn(3, 8))
    assert [made.name for made in found.graphs[0].steps] == EVERY_PASS[8:]
    assert counts(found)["freeze"] == 2


def test_what_the_backend_refuses_is_refused():
    with pytest.raises(ConfigError, match="the model is digital"):
        analogfx.explain(mlp(), None, torch.randn(3, 8))


def test_importing_the_package_imports_no_compiler():
    code = "import sys, analogfx; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_input_in_the_place_of_the_config_is_named():
    with pytest.raises(TypeError, match=r"explain\(analog, None, x\)"):
        analogfx.explain(mlp(), torch.randn(2, 8))


def test_code_that_dynamo_has_given_up_is_an_error():
    class Given(nn.Module):
        def forward(self, x):
            return x * 2

    torch._dynamo.decorators.skip(Given.forward)
    with pytest.raises(CaptureError, match=r"compiled nothing of Given.*torch.compiler.reset"):
        analogfx.explain(Given(), QUIET, torch.randn(2))
