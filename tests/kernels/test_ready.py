import pytest
import torch
from samples import CONFIGS, TILES, merged

import analogfx
from analogfx.kernels import linear, ready
from analogfx.kernels.operands import Operands


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_product_made_ready_is_the_product(name, shape):
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 7, dtype=torch.float64)
    analog = analogfx.analogize(layer, merged(CONFIGS[name], TILES)).eval()
    placement = analog._analog
    (site,), ((spec, _),) = (
        placement.sites,
        next(p.lowered for (training, _), p in placement.programs.items() if not training),
    )
    r = getattr(analog, "input_range", None)
    clip = getattr(analog, site.state.clip, None)
    operands = (analog.weight, analog.bias, None if r is None else r.abs(), clip)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        kept = x.clone()
        product = ready.make(*operands, spec)
        expected = linear.forward(Operands(x, *operands), spec)[0]
        for _ in range(2):
            torch.testing.assert_close(ready.linear(x, product), expected)
        assert torch.equal(x, kept)
