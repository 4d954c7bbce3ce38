"""Models whose weights accelerate keeps elsewhere between forwards."""

import copy

import pytest
import torch

pytest.importorskip("accelerate")

import accelerate
from tiny import IDS, llama, recipe

import analogfx
from analogfx.errors import PlacementError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_analog_model_is_offloaded_and_its_clip_is_refused():
    dense = analogfx.analogize(llama(), recipe(init_from_data=0)).eval()
    offloaded = accelerate.cpu_offload(copy.deepcopy(dense), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, dense(IDS).logits)
    with pytest.raises(PlacementError, match=r"q_proj: its weight is on the meta device"):
        analogfx.clip_weights(offloaded)
    accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
    for model in (offloaded, dense):
        analogfx.clip_weights(model)
    assert torch.equal(offloaded.lm_head.weight, dense.lm_head.weight)


def test_a_model_that_is_offloaded_before_is_not_taken_for_an_analog_one():
    offloaded = accelerate.cpu_offload(llama(), torch.device("cpu"))
    with pytest.warns(UserWarning, match="no product of LlamaForCausalLM became analog: 15 stay"):
        analog = analogfx.analogize(offloaded, recipe(init_from_data=0), inplace=True)
    assert {site.status for site in analogfx.report(analog).sites} == {"digital"}
    with pytest.raises(PlacementError):
        analogfx.analogize(offloaded, recipe(init_from_data=0), inplace=True, strict=True)
