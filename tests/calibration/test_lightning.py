"""Our four methods beside aihwkit-lightning's own ``calibrate_input_ranges``."""

import copy

import pytest
import torch
from aihwkit_lightning.inference.calibration.calibration import (
    InputRangeCalibrationType,
    calibrate_input_ranges,
)
from aihwkit_lightning.nn.conversion import convert_to_analog
from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
from torch import nn

import analogfx

METHODS = ["MAX", "CACHE_QUANTILE", "MOVING_STD", "MOVING_QUANTILE"]


def config(enable, tile=-1):
    made = TorchInferenceRPUConfig()
    made.pre_post.input_range.enable = enable
    made.mapping.max_input_size = tile
    return made


def lightning_ranges(digital, batches, method, tile, **settings):
    """The ranges of every layer that Lightning's calibration gives."""
    model = convert_to_analog(copy.deepcopy(digital), config(False, tile)).eval()
    calls = [((b,), {}) for b in batches]
    calibrate_input_ranges(
        model, InputRangeCalibrationType[method], calls, verbose=False, **settings
    )
    return [layer.input_range.detach() for layer in model.analog_layers()]


def our_ranges(digital, batches, method, tile, **settings):
    model = analogfx.analogize(digital, config(True, tile)).train()
    analogfx.calibrate(
        model, batches, InputRangeCalibrationType[method], progress=False, **settings
    )
    return [m.input_range.detach() for m in model.modules() if hasattr(m, "input_range")]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 9, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


def images(count=4, batch=6):
    """Without a negative number: Lightning's quantiles are those of signed values."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(batch, 3, 5, 5, generator=generator) ** 3 for _ in range(count)]
    batches[0][2] = 0.0  # rows that are all zero, which both leave out
    return batches


@pytest.mark.parametrize("tile", [-1, 10])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_lightning(method, tile):
    settings = {"quantile": 0.97, "max_samples": 10_000}
    expected = lightning_ranges(network(), images(), method, tile, **settings)
    found = our_ranges(network(), images(), method, tile, **settings)
    assert [len(r) for r in found] == [len(r) for r in expected]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_a_quantile_of_one_is_the_largest():
    for method in ("CACHE_QUANTILE", "MOVING_QUANTILE"):
        settings = {"quantile": 1.0, "max_samples": 10_000}
        expected = lightning_ranges(network(), images(), method, -1, **settings)
        found = our_ranges(network(), images(), method, -1, **settings)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_std_alpha_is_that_of_the_call():
    expected = lightning_ranges(network(), images(), "MOVING_STD", -1, std_alpha=2.0)
    found = our_ranges(network(), images(), "MOVING_STD", -1, std_alpha=2.0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_later_layers_see_what_a_moving_range_clamps():
    """With weights above 0 the second layer's inputs shrink with the first's."""
    digital = nn.Sequential(nn.Linear(75, 5), nn.Linear(5, 2))
    for p in digital.parameters():
        p.data.abs_()
    batches, settings = [images(1)[0].flatten(1)], {"quantile": 0.5}
    moving = our_ranges(digital, batches, "MOVING_QUANTILE", -1, **settings)
    at_once = our_ranges(digital, batches, "CACHE_QUANTILE", -1, **settings)
    assert torch.equal(moving[0], at_once[0])
    assert moving[1] < 0.5 * at_once[1]
    expected = lightning_ranges(digital, batches, "MOVING_QUANTILE", -1, **settings)
    torch.testing.assert_close(moving, expected, rtol=2e-6, atol=0)


# ------------------------------------------------------------------------------- departures


def test_quantiles_are_of_magnitudes():
    """Lightning's are of signed values: inputs below 0 get a range below 0."""
    batches = [-images(1)[0].flatten(1)]
    digital = nn.Linear(75, 3)
    model = nn.Sequential(digital)
    for method in ("CACHE_QUANTILE", "MOVING_QUANTILE"):
        (lightning,) = lightning_ranges(model, batches, method, -1, quantile=0.99)
        (ours,) = our_ranges(model, batches, method, -1, quantile=0.99)
        rows = batches[0][batches[0].any(1)]
        assert lightning < 0.0
        torch.testing.assert_close(ours, rows.abs().flatten().quantile(0.99).view(1))


def test_a_calibrated_layer_trains():
    """Lightning counts up to -inf, and the next training forward makes the range NaN."""
    batches, digital = [torch.randn(8, 5)], nn.Sequential(nn.Linear(5, 3))
    model = convert_to_analog(copy.deepcopy(digital), config(False)).eval()
    calibrate_input_ranges(
        model, InputRangeCalibrationType.MAX, [((b,), {}) for b in batches], verbose=False
    )
    model.train()(batches[0])
    assert next(iter(model.analog_layers())).input_range.isnan().all()

    ours = analogfx.analogize(digital, config(True))
    analogfx.calibrate(ours, batches, "max", progress=False)
    before = ours[0].input_range.detach().clone()
    ours.train()(10 * batches[0]).sum().backward()
    assert torch.equal(ours[0].input_range, before)  # closed to statistics,
    assert ours[0].input_range.grad.abs() > 0  # but not to the optimizer


def test_every_batch_weighs_the_same():
    """Lightning keeps a random part of what it kept and of the new, so late batches prevail."""
    batches = [torch.full((100, 1), float(number)) for number in range(1, 21)]
    model = nn.Sequential(nn.Linear(1, 1))
    torch.manual_seed(0)
    settings = {"quantile": 0.5, "max_samples": 100}
    (lightning,) = lightning_ranges(model, batches, "CACHE_QUANTILE", -1, **settings)
    (ours,) = our_ranges(model, batches, "CACHE_QUANTILE", -1, **settings)
    assert lightning > 18
    assert 8 <= ours <= 13  # five standard errors of a median of 100
