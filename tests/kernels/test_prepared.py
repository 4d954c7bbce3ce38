import pytest
import torch
from compiled import DYNAMO_CONFIGS, QUIET
from samples import LAYERS, TILES, layer_and_input, merged
from whole_graph import Case, set_ranges

from analogfx.kernels import prepared
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, encode
from analogfx.passes.freeze import freeze

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    name: DYNAMO_CONFIGS[name]
    for name in ("DAC and ADC", "discrete rows", "dynamic", "everything", "everything, dynamic")
}


def pair(layer, config, dtype):
    """A site as the fused op and as the prepared product, and an input."""
    module, x = layer_and_input(layer, torch.float32)
    with torch.no_grad():
        module.weight[0] = 0  # a row that no output leaves, whose bound is 0
    fused, ready = (Case(module, config) for _ in range(2))
    for case in (fused, ready):
        set_ranges(case.analog)
        case.analog.to(dtype)
    assert ready.apply(freeze) == [1]
    return fused, ready, x.to(dtype)


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_the_fused_op_to_the_bit(layer, config, dtype, tiles):
    fused, ready, x = pair(layer, merged(CONFIGS[config], tiles), dtype)
    expected = fused(x)
    assert expected.isfinite().all() and expected.any()
    assert_same_bits(ready(x), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("config", ["DAC and ADC", "everything, dynamic"])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "grouped"])
def test_nan_infinity_and_zeros_in_the_input(layer, config, value):
    fused, ready, x = pair(layer, merged(CONFIGS[config], TILES), torch.float32)
    x[0] = value
    assert_same_bits(ready(x), fused(x))


@pytest.mark.parametrize("layer", ["linear", "linear of 3-D", "conv2d", "grouped", "depthwise"])
@pytest.mark.parametrize("config", CONFIGS)
def test_empty_batches(layer, config):
    fused, ready, x = pair(layer, CONFIGS[config], torch.float32)
    expected = fused(x[:0])
    assert expected.numel() == 0
    assert_same_bits(ready(x[:0]), expected)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_weights_of_zeros_and_ranges_of_zero(layer):
    fused, ready, x = pair(layer, QUIET, torch.float32)
    for case in (fused, ready):
        with torch.no_grad():
            case.analog.weight.zero_()
    assert_same_bits(ready(x), fused(x))
    for case in (fused, ready):
        set_ranges(case.analog, 0.0)
    assert_same_bits(ready(x), fused(x))


SPEC = MVMSpec([4, 4], [4, 2], range_mode="static", inp_res=30.0, out_res=61.0, out_bound=1.5)


def operands():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(7, 8), draw(6, 8), draw(6), torch.tensor([0.8, 1.1])


def ready(weight, ranges, spec=SPEC, clip=None):
    """A weight as the tiles hold it, and what limits their outputs."""
    held, scale = prepared.prepare(weight, clip, encode(spec))
    return held, prepared.limits(scale, ranges, encode(spec))


def test_an_input_that_was_converted_before_is_not_again():
    x, weight, bias, ranges = operands()
    spec = encode(SPEC)
    held, adc = ready(weight, ranges)
    once = prepared.convert(x, ranges, spec)
    assert once.abs().amax(0)[:4].max() == 0.8
    direct = prepared.linear(x, held, adc, bias, None, ranges, None, spec)
    assert_same_bits(prepared.linear(x, held, adc, bias, None, ranges, once, spec), direct)


@pytest.mark.parametrize("activation", prepared.ACTIVATIONS)
def test_the_last_steps_come_in_the_models_order(activation):
    x, weight, bias, ranges = operands()
    held, adc = ready(weight, ranges)
    residual = torch.linspace(-1, 1, 42, dtype=torch.float64).view(7, 6)
    plain = prepared.linear(x, held, adc, bias, None, ranges, None, encode(SPEC))
    whole = prepared.linear(
        x, held, adc, bias, residual, ranges, None, encode(SPEC._replace(activation=activation))
    )
    assert_same_bits(whole, prepared.ACTIVATIONS[activation](plain) + residual)
    assert whole.dtype == torch.float64  # as the sum of the model would be


def test_one_side_of_the_clamp_is_enough_for_what_is_not_negative():
    x, weight, _, ranges = operands()
    held, adc = ready(weight, ranges)
    x = x.relu()
    both, one = (
        prepared.linear(x, held, adc, None, None, ranges, None, encode(spec))
        for spec in (SPEC, SPEC._replace(nonnegative=True))
    )
    assert_same_bits(one, both)
    assert (x > ranges.max()).any()


def test_nothing_is_cast_under_autocast():
    x, weight, bias, ranges = operands()
    spec = encode(SPEC)
    expected = prepared.linear(x, *ready(weight, ranges), bias, None, ranges, None, spec)
    with torch.autocast("cpu", torch.bfloat16):
        held, adc = ready(weight, ranges)
        found = prepared.linear(x, held, adc, bias, None, ranges, None, spec)
    assert_same_bits(found, expected)


def test_without_a_bound_no_scale_is_kept():
    held, scale = prepared.prepare(operands()[1], None, encode(MVMSpec([8], [6])))
    assert scale.numel() == 0
    assert_same_bits(held, operands()[1])


def test_a_learned_clip_scales_the_bounds():
    _, weight, _, _ = operands()
    clip = torch.full((2, 6), 0.5)
    held, scale = prepared.prepare(weight, clip, encode(SPEC._replace(bound_per_channel=True)))
    assert held.abs().max() == 0.5
    assert_same_bits(scale, clip.unsqueeze(0))


@pytest.mark.parametrize("out_res", [0.0, 61.0])
def test_limits_are_the_bound_and_the_step_of_every_output(out_res):
    _, weight, _, ranges = operands()
    with torch.no_grad():
        weight[0] = 0
    spec = SPEC._replace(out_res=out_res, bound_per_channel=True)
    bound, *steps = prepared.limits(weight.abs().amax(-1).expand(1, 2, -1), ranges, encode(spec))
    assert_same_bits(bound, ranges[:, None] * 1.5 * weight.abs().amax(-1))
    assert len(steps) == bool(out_res)
    for step in steps:
        assert (step[:, 0] == 1).all()  # where nothing comes out, there is nothing to divide by 0
        assert_same_bits(step[:, 1:], 2 * bound[:, 1:] / out_res)


def test_an_image_that_was_converted_before_is_not_again():
    spec = encode(SPEC._replace(in_sizes=[18], out_sizes=[6]))
    window = encode(Window([3, 3], [1, 1], [1, 1], [1, 1]))
    x, weight = torch.randn(2, 2, 5, 7), torch.randn(6, 2, 3, 3)
    ranges = torch.tensor([0.9])
    once = prepared.convert(x, ranges, spec)
    operands = *ready(weight, ranges, SPEC._replace(in_sizes=[18], out_sizes=[6])), None, None
    given = [prepared.conv(x, *operands, ranges, a, window, spec) for a in (None, once)]
    assert_same_bits(*given)
