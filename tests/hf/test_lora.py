"""LoRA adapters of PEFT beside and inside analog layers."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from tiny import IDS, llama, recipe, trained
from torch import nn
from transformers import AutoModelForCausalLM

import analogfx
from analogfx.errors import PlacementError
from analogfx.hf import lora_in_tiles

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def adapted(model, **options):
    """A model with adapters that do something."""
    usual = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = peft.get_peft_model(model, peft.LoraConfig(**(usual | options)))
    torch.manual_seed(5)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return made


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def status(model):
    return {site.name: site.status for site in analogfx.report(model).sites}


@pytest.mark.parametrize("first", ["analogize", "adapt"])
def test_adapters_are_digital_and_listed(first):
    if first == "analogize":
        model = adapted(analogfx.analogize(llama(), recipe()))
    else:
        model = analogfx.analogize(adapted(llama()), recipe(), strict=True)
    found = status(model)
    assert found[f"{LAYER}.base_layer"] == "analog"
    adapters = {name for name, what in found.items() if what == "digital"}
    assert adapters == {name for name in found if ".lora_" in name} and len(adapters) == 8


KEYS = {
    "all": ({"*": True}, False),
    "the layer": ({LAYER: True}, False),
    "by its name": ({f"{LAYER}.lora_A": True, "*": True}, True),
    "by a pattern": ({"re:.*lora_[AB].default": True, "*": True}, True),
    "all but": ({"*lora_A*": None, "*": True}, False),
}


@pytest.mark.parametrize("name", KEYS)
def test_an_adapter_is_analog_where_a_key_is_its_own(name):
    keys, analog = KEYS[name]
    config = {key: recipe() if value else None for key, value in keys.items()}
    found = status(analogfx.analogize(adapted(llama()), config))
    assert found[f"{LAYER}.base_layer"] == "analog"
    assert (found[f"{LAYER}.lora_A.default"] == "analog") == analog


def test_adapters_beside_a_layer_add_a_digital_product():
    model = adapted(trained(llama(), recipe()))
    layer = model.get_submodule(LAYER)
    x = torch.randn(3, 32)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer(x) + (x @ a.T @ b.T) * layer.scaling["default"]
        torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merging_adapters_in_tiles_changes_nothing(dtype, tmp_path):
    model = adapted(trained(llama(dtype=dtype), recipe()))
    beside = logits(model)
    assert lora_in_tiles(model) == 4
    expected = logits(model)
    assert not torch.equal(expected, beside)
    assert set(status(model).values()) == {"analog"}
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert set(status(merged)) == set(status(analogfx.analogize(llama(), recipe())))
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_merged_weights_are_seen_at_once():
    """PEFT writes through .data, which torch does not count: nothing kept may be used."""
    model = adapted(trained(llama(), recipe()))
    logits(model)
    with torch.no_grad():
        merged = model.merge_and_unload()
        found = merged(IDS).logits
        analogfx.weights_written(merged)
        assert torch.equal(found, merged(IDS).logits)


def test_adapters_in_tiles_are_saved_and_loaded(tmp_path):
    analog = trained(llama(), recipe())
    model = adapted(copy.deepcopy(analog))
    lora_in_tiles(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(analog, tmp_path)
    lora_in_tiles(again)
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert not torch.equal(logits(model), logits(again))
        assert torch.equal(logits(model), logits(again.unload()))


def test_adapters_in_tiles_learn():
    """The gradients are those of a weight that is a sum, computed by hand."""
    config = recipe(init_from_data=0)
    config.modifier.noise_type = analogfx.WeightNoiseInjectionType.NONE
    model = adapted(analogfx.analogize(llama(), config))
    lora_in_tiles(model)
    layer = model.train().get_submodule(LAYER)
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    plain = analogfx.analogize(nn.Linear(32, 32, bias=False), config)
    scale = layer.scaling["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        plain.weight.copy_(layer.base_layer.weight + scale * b @ a)
    plain(x).square().sum().backward()
    torch.testing.assert_close(a.grad, scale * b.T @ plain.weight.grad)
    torch.testing.assert_close(b.grad, scale * plain.weight.grad @ a.T)
    assert layer.base_layer.weight.grad is None


REFUSED = {
    "lora_dropout": {"lora_dropout": 0.1},
    "a variant such as DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_weight_can_hold_is_refused(reason):
    model = adapted(analogfx.analogize(llama(), recipe()), **REFUSED[reason])
    with pytest.raises(PlacementError, match=f"q_proj: the adapter 'default' has {reason}"):
        lora_in_tiles(model)
    assert type(model.get_submodule(LAYER)).__name__ == "Linear"


def test_a_model_without_such_adapters_is_refused():
    for model in (llama(), adapted(llama())):
        with pytest.raises(TypeError, match="no LoRA adapter beside an analog layer"):
            lora_in_tiles(model)


def test_one_batch_has_one_adapter():
    model = adapted(trained(llama(), recipe()))
    lora_in_tiles(model)
    with pytest.raises(ValueError, match="a tile has one"):
        model.get_submodule(LAYER)(torch.randn(2, 32), adapter_names=["default", "default"])
