"""Small models of transformers for the tests of ``analogfx.hf``."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import analogfx

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3, 27).view(2, 12)


def recipe(**input_range):
    """The recipe of analog foundation models with ranges that follow two batches."""
    config = analogfx.recipes.afm()
    for name, value in ({"init_from_data": 2} | input_range).items():
        setattr(config.pre_post.input_range, name, value)
    return config


def llama(tied=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)


def trained(digital, rpu_config):
    """An analog model whose ranges have followed data."""
    analog = analogfx.analogize(digital, rpu_config).train()
    for _ in range(3):
        analog(IDS)
    return analog.eval()


def assert_same(found, expected):
    """Two analog models are equal: state, configs, what trains, and logits, bit by bit."""
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype and torch.equal(states[0][name], value), name
    trains = [[p.requires_grad for p in model.parameters()] for model in (found, expected)]
    assert trains[0] == trains[1]
    assert configs(found) == configs(expected)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)


def configs(model):
    """The config of every analog module, by its path."""
    modules = model.named_modules()
    return {name: m._analog.config.to_dict() for name, m in modules if hasattr(m, "_analog")}
