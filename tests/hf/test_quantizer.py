"""save_pretrained and from_pretrained."""

import json
import logging

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tiny import IDS, SIZES, assert_same, configs, llama, recipe, trained
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.quantizers import auto

import analogfx
import analogfx.hf
from analogfx.errors import CheckpointError, PlacementError
from analogfx.hf.config import METHOD

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = "model.layers.0.self_attn.q_proj"
KINDS = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def folder(tmp_path):
    """Of an analog model."""
    trained(llama(), recipe()).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_round_trip_is_bit_equal(tied, dtype, tmp_path):
    coarse = recipe(learn_input_range=False)
    coarse.forward.inp_res = analogfx.bits(6)
    model = trained(llama(tied, dtype), {FIRST: None, "*down_proj": coarse, "*": recipe()})
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for options in ({}, {"device_map": "auto" if tied else "cpu"}):
        found = load(tmp_path, **options)
        assert_same(found, model)
        placed = [[(s.name, s.status) for s in analogfx.report(m).sites] for m in (found, model)]
        assert placed[0] == placed[1]
    again = tmp_path / "again"
    found.save_pretrained(again)
    assert_same(load(again), model)


@pytest.mark.parametrize("experts", ["shared", "own"])
def test_experts(experts, tmp_path):
    config = recipe()
    config.mapping.experts = experts
    model = trained(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)), config)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


def test_layers_that_are_no_linear(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = trained(GPT2LMHeadModel(GPT2Config(**sizes, **tokens)), recipe())
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


@KINDS
def test_a_digital_folder_becomes_analog(tied, tmp_path):
    digital = llama(tied)
    digital.save_pretrained(tmp_path)
    clips = recipe(learn_input_range=False)
    clips.clip.type = analogfx.WeightClipType.LEARNABLE_PER_CHANNEL
    clips.clip.sigma = -1
    chosen = {FIRST: None, "*mlp*": clips, "*": recipe()}
    found = load(tmp_path, quantization_config=analogfx.hf.AnalogConfig(chosen))
    assert_same(found, analogfx.analogize(digital, chosen).eval())
    found.save_pretrained(tmp_path / "analog")
    assert_same(load(tmp_path / "analog"), found)


def test_a_loaded_model_is_what_analogize_gives(folder):
    found = load(folder)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert not getattr(found, name, None), name
    assert not hasattr(found.config, "_is_quantized")
    assert found._keys_to_ignore_on_load_missing == llama()._keys_to_ignore_on_load_missing
    assert found.half().dtype == torch.float16
    assert found.lm_head.input_range.dtype == torch.float32


def test_another_head_and_none(folder):
    """As of weights, transformers itself reports what of a head is left out or new."""
    base = AutoModel.from_pretrained(folder)
    whole = load(folder)
    assert configs(base) == configs(whole.model)
    with torch.no_grad():
        expected = whole.model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, expected)
        base.save_pretrained(folder / "base")
        found = load(folder / "base")
        assert torch.equal(found.model(IDS).last_hidden_state, expected)
    assert not hasattr(found.lm_head, "_analog")


def test_without_the_import_transformers_names_it(folder, monkeypatch, caplog):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert not configs(load(folder))
    assert "Unknown quantization type, got analogfx.hf" in caplog.text
    assert "lm_head.input_range" in caplog.text


def test_offloaded_to_the_disk(folder, tmp_path):
    expected = load(folder)(IDS).logits
    here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    found = load(folder, device_map=places, offload_folder=tmp_path / "off")
    assert found.model.layers[1].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(found(IDS).logits, expected)
    llama().save_pretrained(tmp_path / "digital")
    config = analogfx.hf.AnalogConfig(recipe())
    with pytest.raises(PlacementError, match="load the model without, call save_pretrained"):
        load(tmp_path / "digital", device_map=places, quantization_config=config)


# -------------------------------------------------------------------------------------- damage


def change(folder, edit):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    edit(record["quantization_config"])
    path.write_text(json.dumps(record))


DAMAGE = {
    "no configs": (lambda q: q.pop("configs"), "KeyError: 'configs'"),
    "another schema": (lambda q: q.update(schema=9), "schema 9; this version reads 1"),
    "a truth for a schema": (lambda q: q.update(schema=True), "schema True"),
    "no such config": (lambda q: q["modules"].update({FIRST: 7}), "there is no config 7"),
    "modules in a list": (lambda q: q.update(modules=[1]), "damaged"),
    "an unknown field": (lambda q: q["configs"][0]["forward"].update(no=1), "forward.no = 1"),
    "cannot run": (lambda q: q["configs"][0]["forward"].update(out_res=7.0, out_bound=0), "out_"),
    "another model": (lambda q: q["modules"].update({"model.layers.7.x": 0}), "'model.layers.7.x'"),
    "no site": (lambda q: q["modules"].update({"model.norm": 0}), "'model.norm' of LlamaFor"),
    "passes": (lambda q: q.update(passes=["drift"]), "analogfx.load"),
    "passes that are none": (lambda q: q.update(passes=1), "no list of names"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_config_is_refused(name, folder):
    edit, message = DAMAGE[name]
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_tiles_of_other_sizes_are_refused(folder):
    change(folder, lambda q: q["configs"][0]["mapping"].update(max_input_size=8))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)


def test_a_range_that_is_not_there_is_missed(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.input_range"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the folder lacks 'lm_head.input_range'"):
        load(folder)
