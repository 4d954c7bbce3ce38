"""Both uses of the backend on models of transformers, built from their configs."""

import copy

import pytest
import torch
import transformers as hf
from compiled import DYNAMO_CONFIGS, RESUMES, assert_same, compiled, ranges

import analogfx

TOKENS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": TOKENS, "labels": TOKENS}
PICTURES = {"pixel_values": IMAGES, "labels": torch.tensor([0, 1])}
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False,
    "loss_type": "ForCausalLM",
}  # fmt: skip

MODELS = {
    "gpt2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        bos_token_id=0, eos_token_id=0, use_cache=False, loss_type="ForCausalLM")), TEXT),
    "llama": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), TEXT),
    "mixtral": lambda: (
        hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **SMALL)), TEXT),
    "vit": lambda: (hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )), PICTURES),
    "resnet": lambda: (hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")), PICTURES),
}  # fmt: skip


@RESUMES
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_infers_as_analogize_makes_it(name):
    model, inputs = MODELS[name]()
    config = DYNAMO_CONFIGS["everything"]
    analog = analogfx.analogize(model.train(), config)
    twin = compiled(model, config)
    for seed in range(2):
        losses = []
        for run in (twin, analog):
            torch.manual_seed(seed)
            loss = run(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        assert_same(*losses)
    grads = {n: p.grad for n, p in analog.named_parameters() if not n.endswith("input_range")}
    # The order in which autograd adds up gradients is not the same.
    assert_same({n: p.grad for n, p in model.named_parameters()}, grads, exact=False)
    assert_same(ranges(twin), ranges(analog))
    assert analogfx.report(twin).coverage == analogfx.report(analog).coverage

    model.eval(), analog.eval()
    again = compiled(copy.deepcopy(analog), None)
    with torch.no_grad():
        expected = analog(**inputs).logits
        # A product of three sums in another order, which may turn the rounding of a DAC.
        for run in (twin, again):
            close = (run(**inputs).logits - expected).abs() < 1e-4 * expected.abs().max()
            assert close.double().mean() > 0.98
    assert (expected.abs().max() > 0.01) and analogfx.report(analog).coverage > 0.15
