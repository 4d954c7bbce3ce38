import subprocess
import sys

import pytest
import torch
from samples import ALL_LAYERS, CONFIGS, TILES, layer_and_input, merged
from torch.utils.flop_counter import FlopCounterMode

import analogfx


def counted(layer, x, backward):
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", ["identity", "DAC and ADC"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ALL_LAYERS)
def test_an_analog_layer_counts_as_the_digital_one(name, backward, config):
    layer, x = layer_and_input(name, torch.float32)
    expected = counted(layer, x.requires_grad_(), backward)
    assert expected > 0
    analog = analogfx.analogize(layer, CONFIGS[config])
    assert counted(analog, x, backward) == expected
    tiled = analogfx.analogize(layer, merged(CONFIGS[config], TILES))
    # torch counts the weight's gradient of a grouped convolution as if it had one group, and
    # tiles of unfolded patches make it a linear product, which is counted as it is.
    if not backward or getattr(layer, "groups", 1) == 1:
        assert counted(tiled, x, backward) == expected


def test_only_the_gradients_that_are_wanted_are_counted():
    layer, x = torch.nn.Linear(8, 3), torch.randn(5, 8)
    analog = analogfx.analogize(layer, analogfx.TorchInferenceRPUConfig())
    assert counted(analog, x, True) == counted(layer, x, True) == 2 * (2 * 5 * 8 * 3)
    layer.weight.requires_grad_(False)
    analog.weight.requires_grad_(False)
    assert counted(analog, x, True) == 2 * 5 * 8 * 3


@pytest.mark.parametrize("first", ["analogfx", "torch.utils.flop_counter"])
def test_it_does_not_matter_which_is_imported_first(first):
    code = f"""if True:
        import sys
        import {first}
        assert "triton" not in sys.modules or "{first}" != "analogfx"
        import analogfx, torch
        from torch.utils.flop_counter import flop_registry
        assert torch.ops.analogfx.analog_linear in flop_registry
    """
    subprocess.run([sys.executable, "-c", code], check=True)
