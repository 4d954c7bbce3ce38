"""Where ours departs from Lightning on purpose: what Lightning does, and what ours does instead."""

import copy

import pytest
import torch
from aihwkit_lightning.nn import AnalogConv1d, AnalogConv2d, AnalogLinear
from aihwkit_lightning.nn.modules.torch_utils.torch_linear import StraightThroughClamp
from aihwkit_lightning.simulator.configs import (
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from oracle import randomize
from torch import nn

import analogfx
from analogfx.errors import ConfigError


def with_range(**values):
    """A config with an enabled input range and the given fields of it."""
    config = TorchInferenceRPUConfig()
    for name, value in {"enable": True, **values}.items():
        setattr(config.pre_post.input_range, name, value)
    return config


def linear(inputs, outputs, dtype=torch.float32):
    return randomize(nn.Linear(inputs, outputs, dtype=dtype), seed=0, dead_row=False)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def both(digital, config):
    """Lightning's layer and ours."""
    lightning = {nn.Linear: AnalogLinear, nn.Conv1d: AnalogConv1d, nn.Conv2d: AnalogConv2d}
    oracle = lightning[type(digital)].from_digital(digital, copy.deepcopy(config))
    return oracle, analogfx.analogize(digital, config)


# ------------------------------------------------------------------------------- resolutions


def test_a_scale_above_one_is_not_inverted():
    """Lightning takes a scale for a number of states as soon as all its elements are above 1."""
    config = TorchInferenceRPUConfig()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    digital = nn.Linear(2, 2, bias=False)
    digital.weight.data = torch.tensor([[4.0, 1.0], [8.0, 1.0]])
    oracle, ours = both(digital, config)
    # Nothing exceeds clips that start at the rows' maxima, but these are above 1.
    torch.testing.assert_close(
        oracle(torch.eye(2)).mT, torch.tensor([[0.25, 0.25], [0.125, 0.125]])
    )
    torch.testing.assert_close(ours(torch.eye(2)).mT, digital.weight)


def test_a_step_above_one_is_not_inverted():
    config = TorchInferenceRPUConfig()
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE
    config.modifier.res = 4.0
    digital = nn.Linear(3, 1, bias=False)
    digital.weight.data = torch.tensor([[8.0, 3.0, -5.0]])
    oracle, ours = both(digital, config)
    # Four states over +-8 are 4 apart; Lightning's are 2 / (8 / 4) = 1 apart and end at +-2.
    assert oracle(torch.eye(3)).flatten().tolist() == [2.0, 2.0, -2.0]
    assert ours(torch.eye(3)).flatten().tolist() == [8.0, 4.0, -4.0]


# ------------------------------------------------------------------------- ranges and counters


def test_counters_do_not_stick_in_half_precision():
    config = with_range(init_from_data=300)
    oracle, ours = both(linear(4, 3, torch.bfloat16), config)
    x = normal(8, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(300):
            oracle(x)
            ours(x)
    assert oracle.input_range_update_idx.item() == 256  # 256 + 1 is 256 in bfloat16
    assert ours.input_range_update_idx.item() == 300
    assert ours.input_range_update_idx.dtype == torch.int64


def test_ranges_are_single_precision_in_half_precision():
    config = with_range(init_from_data=1)
    oracle, ours = both(linear(4, 3, torch.bfloat16), config)
    x = normal(8, 4, dtype=torch.bfloat16)
    oracle(x)
    ours(x)
    exact = 3 * x.double().std().item()
    assert oracle.input_range.dtype == torch.bfloat16
    assert ours.input_range.dtype == torch.float32
    assert abs(oracle.input_range.item() - exact) > 5e-4 * exact
    assert abs(ours.input_range.item() - exact) < 1e-6 * exact


def test_ranges_are_double_precision_in_double_precision():
    """Lightning rounds them to float32."""
    config = with_range(init_from_data=1)
    oracle, ours = both(linear(4, 3, torch.float64), config)
    x = normal(8, 4, dtype=torch.float64)
    oracle(x)
    ours(x)
    exact = (3 * x.std()).item()
    assert 1e-9 * exact < abs(oracle.input_range.item() - exact) < 1e-6 * exact
    assert abs(ours.input_range.item() - exact) < 1e-14 * exact


def test_range_gradient_has_the_range_of_its_own_forward():
    """Two forwards may come before the backward: recurrent steps, two views of a sample."""
    config = with_range(init_from_data=2, init_std_alpha=0.5, decay=0.0)
    x = normal(16, 6)

    def gradient(layer, *later):
        y = layer(x).sum()
        for other in later:
            layer(other)  # moves the running range
        y.backward()
        return layer.input_range.grad.item()

    alone, ours = both(linear(6, 4), config)
    oracle = copy.deepcopy(alone)
    expected = gradient(alone)
    assert gradient(oracle, 10 * x) == pytest.approx(
        expected * (oracle.input_range / alone.input_range).item(), rel=1e-5
    )
    assert oracle.input_range > 2 * alone.input_range
    assert gradient(ours, 10 * x) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------- what is written to


def test_incoming_gradients_are_not_written_to():
    x, r = torch.tensor([[5.0, 1.0]], requires_grad=True), torch.tensor(3.0)
    gradient = torch.ones(1, 2)
    StraightThroughClamp.apply(x, x >= r, x <= -r, r).backward(gradient)
    assert gradient.tolist() == [[0.0, 1.0]]  # Lightning's clamp zeroes what it was handed

    gradient = torch.ones(1, 2)
    clamped = torch.ops.analogfx.dac(x, r, 0.0, "static", 0.0, 0.0)
    clamped.backward(gradient)
    assert gradient.tolist() == [[1.0, 1.0]]


def test_parameters_are_bit_identical_after_a_forward():
    """Lightning's kernels write noise into the weights; its torch mode, run here, does not."""
    config = with_range(init_from_data=0)
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE
    config.modifier.std_dev, config.modifier.res = 0.1, 14.0
    for layer in both(linear(6, 4), config):
        before = copy.deepcopy(layer.state_dict())
        layer(normal(3, 6)).sum().backward()
        for name, t in layer.state_dict().items():
            assert torch.equal(t, before[name]), name


def test_quantize_weights_leaves_the_config_alone():
    """Lightning quantises one layer, and switches quantisation off for all of the same config."""
    config = TorchInferenceRPUConfig()
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE
    config.modifier.res = 2.0
    layers = [AnalogLinear.from_digital(linear(6, 4), config) for _ in range(2)]
    handed_in = copy.deepcopy(config)
    ours = analogfx.analogize(nn.Sequential(linear(6, 4), linear(6, 4)), handed_in)
    for layer in layers:
        with pytest.warns(UserWarning, match="quantize_weights was called"):
            layer.quantize_weights()
    analogfx.quantize_weights(ours)

    assert config.modifier.quantization_type is WeightQuantizationType.NONE
    assert [layer.weight.unique().numel() for layer in layers] == [3, 24]
    assert handed_in.modifier.quantization_type is WeightQuantizationType.DISCRETIZE
    assert [layer.weight.unique().numel() for layer in ours] == [3, 3]


# ------------------------------------------------------------------------------- convolutions


def test_conv1d_is_clipped():
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 1.0
    digital = randomize(nn.Conv1d(3, 4, 5), seed=0, dead_row=False)
    oracle, ours = both(digital, config)
    oracle.clip_weights()
    analogfx.clip_weights(ours)
    assert torch.equal(oracle.weight.flatten(), digital.weight.flatten())
    std = digital.weight.std()
    torch.testing.assert_close(ours.weight, digital.weight.clamp(-std, std))


def test_a_converted_convolutions_clips_start_from_its_weights():
    config = TorchInferenceRPUConfig()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    digital = randomize(nn.Conv2d(3, 4, 2), seed=0, dead_row=False)
    oracle, ours = both(digital, config)
    maxima = digital.weight.detach().flatten(1).abs().amax(1, keepdim=True).mT
    assert not torch.isclose(oracle.learnable_weight_clip, maxima).any()
    assert torch.equal(ours.learnable_weight_clip, maxima)


# --------------------------------------------------------------------------------------- edges


def test_a_vector_with_a_bound_gives_a_vector():
    config = with_range()
    config.forward.out_bound = 2.0
    oracle, ours = both(linear(6, 4), config)
    x = normal(6)
    assert oracle.eval()(x).shape == (1, 4)
    assert ours.eval()(x).shape == (4,)
    torch.testing.assert_close(ours(x), oracle(x)[0])


def test_a_row_of_zeros_with_bound_and_noise_is_not_nan():
    config = with_range(init_from_data=0)
    config.forward.out_bound, config.forward.out_res, config.forward.out_noise = 4.0, 254.0, 10.0
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    digital = linear(6, 4)
    digital.weight.data[0] = 0
    digital.bias.data.zero_()
    oracle, ours = both(digital, config)
    x = normal(50, 6)
    assert oracle(x)[:, 0].isnan().any()
    assert ours(x)[:, 0].eq(0).all()
    assert ours(x).isfinite().all()


def test_an_impossible_config_is_refused_before_it_runs():
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = 254.0  # of a range that there is not
    layer = AnalogLinear.from_digital(linear(6, 4), config)
    with pytest.raises(AssertionError, match="Input range must be provided"):
        layer(normal(3, 6))
    with pytest.raises(ConfigError, match=r"forward\.inp_res = 254\.0: expected .*input_range"):
        analogfx.analogize(linear(6, 4), config)


# --------------------------------------------------------------------------------------- noise


def noise_of(layer):
    """The weight noise of one training forward, (O, I)."""
    torch.manual_seed(0)
    return (layer(torch.eye(8)).mT - layer.weight).detach()


def test_weight_noise_does_not_depend_on_the_tiles():
    """The same seed and element give the same noise however the weight is cut."""
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    cut = copy.deepcopy(config)
    cut.mapping.max_input_size = 3
    digital = nn.Linear(8, 4, bias=False)
    digital.weight.data = 0.5 * normal(8, 4).sign().mT.contiguous()  # all tiles' maxima are equal
    oracle, ours = both(digital, config)
    cut_oracle, cut_ours = both(digital, cut)
    assert not torch.allclose(noise_of(oracle), noise_of(cut_oracle), atol=0.01)
    torch.testing.assert_close(noise_of(ours), noise_of(cut_ours))
    torch.testing.assert_close(noise_of(ours), noise_of(ours))


@pytest.mark.parametrize("lightning", [True, False])
def test_a_checkpointed_forward_counts_once(lightning):
    """Recomputing a forward in the backward is not another batch."""
    layers = both(linear(6, 4), with_range(init_from_data=10))
    layer = layers[0] if lightning else layers[1]
    x = normal(5, 6).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.input_range_update_idx.item() == (2 if lightning else 1)


def test_a_batch_that_is_not_finite_leaves_a_fast_range_alone():
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = config.pre_post.input_range.fast_mode = True
    layer = analogfx.analogize(torch.nn.Linear(4, 3), config)
    good, bad = torch.randn(8, 4), torch.randn(8, 4)
    bad[0, 0] = float("nan")
    layer(good)
    before = layer.input_range.detach().clone()
    layer(bad)
    assert torch.equal(layer.input_range, before)
    assert layer.input_range_update_idx.tolist() == [1]


@pytest.mark.parametrize("fast", [False, True])
def test_an_absurd_batch_sets_no_range(fast):
    oracle, ours = both(linear(6, 4), with_range(init_from_data=1, fast_mode=fast))
    bad, good = 2e34 * normal(5, 6), normal(5, 6)
    for layer in (oracle, ours):
        layer(bad)
        layer(good)
    assert oracle.input_range > 1e34
    assert ours.input_range < 100 and ours.input_range_update_idx == 1


@pytest.mark.parametrize("lightning", [True, False])
def test_the_decay_of_a_range_is_that_of_one_step_whatever_the_loss_is_scaled_by(lightning):
    decay, start = 0.1, 50.0  # so wide that nothing is saturated: all of the gradient is decay
    config = with_range(init_from_data=0, init_value=start, decay=decay, input_min_percentage=0.9)
    layer = both(linear(6, 4), config)[0 if lightning else 1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    if not lightning:
        analogfx.prepare_training(optimizer, layer)
    moved = []
    for scale, batches in ((1.0, 1), (1024.0, 1), (1.0, 3)):
        with torch.no_grad():
            layer.input_range.fill_(start)
        optimizer.zero_grad()
        for _ in range(batches):
            (scale * layer(normal(5, 6)).square().mean() / batches).backward()
        for parameter in layer.parameters():
            parameter.grad /= scale
        optimizer.step()
        moved.append((start - layer.input_range.item()) / (decay * start))
    expected = [1, 1 / 1024, 3] if lightning else [1, 1, 1]
    assert moved == pytest.approx(expected, rel=1e-3)
