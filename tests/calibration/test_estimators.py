"""The statistics, each beside arithmetic of another kind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import analogfx
from analogfx.calibration.adc import Outputs, smallest_bound
from analogfx.calibration.entropy import least_divergence
from analogfx.calibration.least_error import least_error
from analogfx.calibration.quantile import quantile


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_that_of_torch(values, q):
    values = torch.tensor(values, dtype=torch.float64)
    assert quantile(values, q) == pytest.approx(values.quantile(q).item(), rel=1e-12)


def test_a_batch_of_more_than_2_to_the_24_elements():
    """At which ``torch.quantile`` gives up."""
    x = torch.linspace(-1, 1, (1 << 24) + 4096).view(-1, 64)
    with pytest.raises(RuntimeError, match="too large"):
        x.flatten().quantile(0.9)
    config = {"pre_post": {"input_range": {"enable": True}}}
    analog = analogfx.analogize(nn.Linear(64, 1), config)
    for method in ("moving_quantile", "quantile"):
        analogfx.calibrate(analog, [x], method, quantile=0.9, progress=False)
        assert analog.input_range.item() == pytest.approx(0.9, abs=5e-3)


SHAPES = {
    "normal": lambda g: torch.randn(4000, generator=g).abs(),
    "heavy tail": lambda g: torch.randn(4000, generator=g).abs() ** 4,
    "uniform": lambda g: torch.rand(4000, generator=g),
    "outlier": lambda g: torch.cat([torch.rand(4000, generator=g), torch.tensor([500.0])]),
}


def rounding_error(x, bound, steps):
    """Mean squared error of the nearest of steps + 1 levels, found by looking at all of them."""
    levels = torch.linspace(-bound, bound, steps + 1, dtype=torch.float64)
    return (x.double()[:, None] - levels).abs().amin(1).square().mean().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [14, 62])
def test_least_error_is_as_small_as_an_exhaustive_search_finds(shape, steps):
    x = SHAPES[shape](torch.Generator().manual_seed(0))[:1000]
    if shape == "outlier":
        x = torch.cat([x, torch.tensor([500.0])])
    found = least_error(x, float(steps))
    bounds = x.max().item() * torch.logspace(-3.5, 0, 300).double()
    least = min(rounding_error(x, bound.item(), steps) for bound in bounds)
    assert rounding_error(x, found, steps) <= 1.02 * least
    assert found <= x.max()
    assert least_error(x, 1 / steps) == found  # the same resolution, as a fraction


def test_values_on_a_grid_keep_it():
    x = torch.arange(8.0).repeat(5)
    assert least_error(x, 14.0) == 7.0


@pytest.mark.parametrize("choose", [least_error, least_divergence])
def test_without_rounding_nothing_is_worth_clipping(choose):
    assert choose(torch.tensor([1.0, 2.0, 700.0]), 0.0) == 700.0


def test_entropy_clips_an_outlier_and_keeps_a_uniform_distribution():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator)
    assert least_divergence(uniform, 254.0) > 0.95
    outlier = torch.cat([uniform, torch.full((3,), 8.0)])
    assert 0.9 < least_divergence(outlier, 254.0) < 1.3
    normal = torch.randn(200_000, generator=generator).abs()
    assert 2.0 < least_divergence(normal, 14.0) < least_divergence(normal, 254.0) <= normal.max()


def test_entropy_ignores_zeros():
    values = SHAPES["normal"](torch.Generator().manual_seed(0))
    zeros = torch.cat([values, torch.zeros(10_000)])
    assert least_divergence(zeros, 30.0) == least_divergence(values, 30.0)


@given(
    st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
)
def test_the_smallest_bound(sizes, share):
    sizes = torch.tensor(sizes)
    outputs = Outputs()
    outputs.see(sizes * 6.0, torch.tensor([2.0]), torch.tensor(3.0))
    bound = smallest_bound(outputs.counts, share)
    beyond = (sizes > bound).double().mean().item()
    assert outputs.clipped(bound) == pytest.approx(beyond)
    assert beyond <= share
    smaller = bound / (1 + 2**-7) * (1 - 1e-6)
    assert (sizes > smaller).double().mean() > share or math.isclose(bound, 0)


def test_a_row_of_zero_weights_has_no_say():
    outputs = Outputs()
    outputs.see(torch.tensor([[0.0, 4.0]]), torch.tensor([0.0, 1.0]), torch.tensor(2.0))
    assert outputs.counts.sum() == 1
    assert smallest_bound(outputs.counts, 0.0) == 2.0
