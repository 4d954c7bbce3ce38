import pytest
import torch
from torch import nn

import analogfx
from analogfx import recipes
from analogfx.kernels import by_block, linear


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
    monkeypatch.setattr(by_block, "BLOCK", 64)
    torch.testing.assert_close(layer(x), whole)
    assert (whole - ideal).abs().max() > 0.05  # the bound acts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64), torch.randn(5, 64), torch.randn(2, 5, 64), torch.randn(3, 2, 5, 64),
        torch.randn(64, 5).T, torch.randn(2, 64, 5).mT, torch.randn(0, 64),
    ],
    ids=["vector", "matrix", "batch", "two batch axes", "transposed", "strided batch", "no rows"],
)  # fmt: skip
def test_a_site_with_everything_off_rounds_as_torchs_layer_does(x, dtype):
    layer = nn.Linear(64, 9).to(dtype)
    analog = analogfx.analogize(layer, analogfx.TorchInferenceRPUConfig())
    x = x.to(dtype)
    y = analog(x)
    assert torch.equal(y, layer(x))
    assert not y._is_view()  # what follows may write to it
    torch.compiler.reset()
    compiled = torch.compile(
        analog.eval(), backend="analogfx", options={"compiler": "eager"}, fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
