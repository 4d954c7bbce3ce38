"""What ``config.json`` says of a model follows the model."""

import copy
import pickle

import pytest

pytest.importorskip("transformers")

from tiny import llama, recipe
from torch import nn
from transformers import BitsAndBytesConfig

import analogfx
from analogfx.hf import AnalogConfig


def said(model):
    """The config of the head, as ``config.json`` would have it."""
    entry = model.config.to_dict()["quantization_config"]
    return entry["configs"][entry["modules"]["lm_head"]]


def test_another_config_is_said():
    model = analogfx.analogize(llama(), recipe())
    assert said(model) == recipe().to_dict()
    coarse = recipe()
    coarse.forward.inp_res = analogfx.bits(4)
    analogfx.set_config(model, {"lm_head": coarse})
    assert said(model) == coarse.to_dict()


def test_a_copy_follows_the_copy():
    model = analogfx.analogize(llama(), recipe())
    twin, config = copy.deepcopy(model), copy.deepcopy(model.config)
    analogfx.set_config(model, analogfx.TorchInferenceRPUConfig())
    assert said(twin) == recipe().to_dict()
    assert config.to_dict()["quantization_config"]["configs"] == [recipe().to_dict()]
    analogfx.to_digital(twin, inplace=True)
    assert not hasattr(twin.config, "quantization_config")
    assert said(model) == analogfx.TorchInferenceRPUConfig().to_dict()


def test_a_pickled_config_says_what_was_then():
    model = analogfx.analogize(llama(), recipe())
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_dict() == model.config.to_dict()


def test_a_digital_model_says_nothing():
    model = llama()
    analogfx.analogize(model, recipe())
    analogfx.analogize(model, lambda name, module: None, inplace=True)
    assert not hasattr(model.config, "quantization_config")


def test_a_model_inside_another():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

    model = analogfx.analogize(Wrapped(), recipe())
    assert said(model.inner) == recipe().to_dict()


def test_a_model_that_is_quantized_otherwise_is_told():
    model = llama()
    model.config.quantization_config = BitsAndBytesConfig()
    with pytest.warns(UserWarning, match="LlamaForCausalLM is quantized by bitsandbytes"):
        analogfx.analogize(model, recipe(), inplace=True)
    assert isinstance(model.config.quantization_config, BitsAndBytesConfig)


def test_it_reads_as_json():
    config = AnalogConfig.of(analogfx.analogize(llama(), recipe()))
    assert AnalogConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert dict(config) == config.to_dict()
    assert '"quant_method": "analogfx.hf"' in repr(config) and repr(AnalogConfig(recipe()))
