import pytest
import torch
from torch import nn

import analogfx
from analogfx import recipes
from analogfx.kernels import blocks, linear


@pytest.mark.parametrize("max_input_size", [-1, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_read_block_by_block_give_the_same(monkeypatch, max_input_size, dtype):
    config = recipes.afm()
    config.mapping.max_input_size = max_input_size
    config.forward.out_res = -1  # no grid, on which the order of a sum could cost a step
    config.forward.out_bound = 0.3  # but a bound, which shows the maxima
    layer = analogfx.analogize(nn.Linear(40, 33).to(dtype), config).eval()
    x = torch.randn(2, 5, 40, dtype=dtype)
    whole, ideal = layer(x), analogfx.to_digital(layer)(x)
    monkeypatch.setattr(linear, "_STREAMED", 1)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    torch.testing.assert_close(layer(x), whole)
    assert (whole - ideal).abs().max() > 0.05  # the bound acts
