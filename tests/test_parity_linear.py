"""The linear site against Lightning's AnalogLinear."""

import copy

import pytest
import torch
import torch.nn.functional as F
from aihwkit_lightning.simulator.configs import (
    TorchInferenceRPUConfig,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from hypothesis import event, given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    RANGE_MODES,
    Step,
    Tally,
    Twins,
    configs,
    copied_state,
    divides_zero,
    draws_of,
    feeding,
    lightning_layer,
    randomize,
    run,
    steps,
)
from torch import nn

import analogfx
from analogfx.kernels import noise

# Configs are drawn: 8 steps are meant.
pytestmark = pytest.mark.filterwarnings("ignore:forward[.].*_res = .* is a quantizer of")

EXAMPLES = 450
"""Configurations for each of the four range modes."""


def input_shapes(config, inputs):
    """Shapes of an input, of one to four dimensions, that Lightning takes with a config."""
    ranges = config.pre_post.input_range
    # The extremes of nothing are an error in Lightning, and a bound gives a vector an axis more.
    least = 1 if ranges.fast_mode else 0
    dims = st.integers(1 if config.forward.out_bound else 0, 3)
    rows = dims.flatmap(lambda n: st.tuples(*[st.integers(least, 4)] * n))
    return rows.map(lambda leading: (*leading, inputs))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", RANGE_MODES)
def test_three_steps(mode):
    tally = Tally()

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def compare(data):
        inputs, outputs = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 6))
        config, dtype = data.draw(configs(mode, inputs)), data.draw(DTYPES)
        digital = nn.Linear(inputs, outputs, bias=data.draw(st.booleans()), dtype=dtype)
        dead_row = data.draw(st.booleans()) and not divides_zero(config)
        randomize(digital, data.draw(st.integers(0, 99)), dead_row)
        digital.weight.requires_grad = data.draw(st.booleans())
        twins = Twins(digital, config, tally, explicit=data.draw(st.booleans()))
        shape = data.draw(input_shapes(config, inputs))
        for step in data.draw(steps(shape, (*shape[:-1], outputs), dtype, config)):
            twins.step(step)
            if not twins.within_domain():
                event("left Lightning's domain")
                break

    compare()
    assert tally.configurations >= EXAMPLES
    assert tally.tied <= 0.005 * tally.steps


@pytest.mark.parametrize("states", [1.0, 3.0, 7.0, 1 / 3])
def test_odd_numbers_of_states(states):
    """Both ends of a range are on a tie then, and all levels of one state are 0."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 0
    config.forward.inp_res, config.modifier.res = states, states
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    digital = randomize(nn.Linear(30, 5), seed=0, dead_row=True)
    x = torch.linspace(-4.0, 4.0, 240).view(8, 30)  # the range is 3
    Twins(digital, config, Tally()).step(Step(x, torch.ones(8, 5), training=True, seed=0))


@pytest.mark.parametrize("explicit", [False, True])
def test_noise_of_several_chunks(explicit):
    """Noise is keyed by chunks of rows, which must be the same rows whatever the shape of x."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.forward.out_noise = 0.1
    shape = (7, noise.CHUNK // 64 // 4, 64)
    generator = torch.Generator().manual_seed(0)
    step = Step(torch.randn(*shape[:2], 8, generator=generator), torch.ones(shape), True, 0)
    digital = randomize(nn.Linear(8, 64), seed=0, dead_row=False)
    Twins(digital, config, Tally(), explicit).step(step)


@pytest.mark.parametrize(("x", "tie"), [(0.5, True), (0.501, False)])
def test_ties_are_told_from_errors(x, tie):
    """What excuses a difference of a whole step: here the inputs are rounded to -1, 0 and 1."""
    config = TorchInferenceRPUConfig()
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_value, ranges.init_from_data = True, 1.0, 0
    config.forward.inp_res = 2.0
    twins = Twins(nn.Linear(1, 1), config, Tally())
    step = Step(torch.tensor([[x]]), torch.ones(1, 1), training=True, seed=0)
    assert twins.rounds_a_tie(copied_state(twins.oracle), step, torch.Size([1, 1])) is tie


def operands(digital, config, x):
    """Inputs and weights as Lightning converts them: what they make of an identity."""
    plain = copy.deepcopy(config)
    plain.modifier.quantization_type = WeightQuantizationType.NONE
    identity = nn.Linear(x.shape[1], x.shape[1], bias=False, dtype=x.dtype)
    identity.weight.data = torch.eye(x.shape[1], dtype=x.dtype)
    quantized = lightning_layer(digital, config)
    with pytest.warns(UserWarning, match="quantize_weights was called"):
        quantized.quantize_weights()
    return lightning_layer(identity, plain)(x).detach(), quantized.weight.detach()


def linear_gradients(x, weight, bias, grad):
    """Output and gradients of torch's linear, by the names of ``run``."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = F.linear(x, weight, bias)
    y.backward(grad)
    return {
        "output": y.detach(),
        "gradient of x": x.grad,
        "gradient of weight": weight.grad,
        "gradient of bias": bias.grad,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile", [-1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tile, seed):
    """At most twice the error of torch's linear in the same dtype on quantised operands.

    Both errors are to float64: ours with noise to Lightning's layer, fed the same noise, and that
    of torch's linear to itself.
    """
    config = TorchInferenceRPUConfig()
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_value, ranges.init_from_data = True, 2.7, 0
    # Half precision often holds half of a maximum: a tie, which 256 states round exactly.
    config.forward.inp_res, config.modifier.res = 254.0, 256.0
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    config.mapping.max_input_size = tile
    noisy = copy.deepcopy(config)
    noisy.modifier.noise_type, noisy.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.05

    digital = randomize(nn.Linear(100, 20, dtype=dtype), seed, dead_row=False)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 100, generator=generator).to(dtype)
    grad = torch.randn(32, 20, generator=generator).to(dtype)
    wide = copy.deepcopy(digital).double()
    oracle = lightning_layer(wide, noisy)
    with feeding(draws_of(oracle, seed, grad.shape, torch.float32), wide.weight.dtype):
        exact = run(oracle, Step(x.double(), grad.double(), training=True, seed=seed))
    torch.manual_seed(seed)
    actual = run(analogfx.analogize(digital, noisy), Step(x, grad, training=True, seed=seed))

    wide_operands = (*operands(wide, config, x.double()), wide.bias)
    exact_linear = linear_gradients(*wide_operands, grad.double())
    torchs = linear_gradients(*(t.to(dtype) for t in wide_operands), grad)
    for name, t in torchs.items():
        assert actual[name].dtype == dtype
        error = (actual[name].double() - exact[name]).abs().max()
        assert error <= 2 * (t.double() - exact_linear[name]).abs().max(), name
