"""Causal language models with a cache: a loop in ONNX Runtime writes PyTorch's text."""

import numpy as np
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from torch import nn

from analogfx import export_onnx, load_onnx_sites
from analogfx.errors import OnnxError

CONFIG = cases.config(
    forward__inp_res=254, forward__out_res=254, forward__out_bound=12, modifier__res=254,
    modifier__quantization_type="DiscretizePerChannel", mapping__max_input_size=7,
)  # fmt: skip


def written(path, tokens, steps):
    """Tokens that a greedy loop appends: first on the whole text, then on one token at a time."""
    session = onnxruntime.InferenceSession(path)
    places = {place.name: place.shape for place in session.get_inputs()}
    assert places["input_ids"] == ["batch", "sequence"]
    past = {
        name: np.zeros((len(tokens), shape[1], 0, shape[3]), np.float32)
        for name, shape in places.items()
        if name.startswith("past_key_values.")
    }
    assert set(past) == {"past_key_values.0.key", "past_key_values.0.value"}
    assert places["past_key_values.0.key"][2] == "past"
    names = [place.name for place in session.get_outputs()]
    text, new = tokens, tokens
    for _ in range(steps):
        feed = {"input_ids": new, "attention_mask": np.ones_like(text)} | past
        found = dict(zip(names, session.run(None, feed), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        new = found["logits"][:, -1:].argmax(-1)
        text = np.concatenate([text, new], 1)
    return text


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_greedy_loop_writes_what_pytorch_writes(name, tmp_path):
    tokens = torch.randint(0, 50, (2, 5))
    analog = cases.analog(cases.TRANSFORMERS[name], CONFIG, tokens)
    with torch.no_grad():  # so that tokens do not just repeat themselves
        for parameter in analog.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
        analog.lm_head.weight = nn.Parameter(torch.randn_like(analog.lm_head.weight))
    path = tmp_path / "m.onnx"
    export_onnx(analog, (tokens,), path, cache=True, opset=21)
    expected = analog.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
        use_cache=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(written(path, tokens.numpy(), 8), expected.numpy())
    assert len(set(expected[:, 5:].flatten().tolist())) > 2
    assert all(site.name.startswith(("transformer.", "model.", "lm_head"))
               for site in load_onnx_sites(path).sites)  # fmt: skip


def test_what_has_no_cache_is_told(tmp_path):
    tokens = torch.randint(0, 50, (2, 5))
    analog = cases.analog(lambda: nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 3)), CONFIG,
                          tokens)  # fmt: skip
    with pytest.raises(OnnxError, match="Sequential keeps no keys and values"):
        export_onnx(analog, (tokens,), tmp_path / "m", cache=True)
    with pytest.raises(OnnxError, match="found input_ids, labels"):
        export_onnx(analog, (tokens,), tmp_path / "m", kwargs={"labels": tokens}, cache=True)
    with pytest.raises(OnnxError, match="two tokens at least"):
        export_onnx(analog, (tokens[:, :1],), tmp_path / "m", cache=True)
