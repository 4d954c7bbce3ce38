import pytest
import torch
from samples import CONFIGS, merged, mlp, modifier, ranged
from torch import nn

import analogfx
from analogfx.chip import AdditiveNoiseModel, PCMLikeNoiseModel
from analogfx.errors import ConfigError
from analogfx.search.perturb import ChangedConfig, Digital, ProgrammingNoise, as_perturbation

CONVERTERS = merged(ranged(init_from_data=0), {"forward": {"inp_res": 30, "out_res": 62}},
                    {"forward": {"out_bound": 4.0}})  # fmt: skip


@pytest.fixture
def analog():
    return analogfx.analogize(mlp(), CONVERTERS).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def run(analog, perturbation, modules, seed=0):
    with perturbation.applied(analog, modules, seed), torch.no_grad():
        return analog(X)


def test_noise_alone_is_the_noise_of_the_whole_chip(analog):
    noise = PCMLikeNoiseModel()
    chip = analogfx.program(analog, noise, seed=4)
    held = chip.weights(1.0)
    only = run(analog, ProgrammingNoise(noise), [analog.first], seed=4)
    with torch.no_grad():
        analog.first.weight.copy_(held["first.weight"])
    # bounds follow the largest weights, which the copy has changed: they are wide
    torch.testing.assert_close(only, analog(X), rtol=0, atol=0.2)
    both = run(analog, ProgrammingNoise(noise), [analog.first, analog.second], seed=4)
    assert not torch.equal(only, both)


def test_noise_of_both_is_the_chips(analog):
    noise = PCMLikeNoiseModel()
    both = run(analog, ProgrammingNoise(noise, seconds=60.0), [analog.first, analog.second], 4)
    with analogfx.program(analog, noise, seed=4).at(60.0, read=0), torch.no_grad():
        assert torch.equal(both, analog(X))


def test_noise_of_none_is_exact(analog):
    assert torch.equal(run(analog, ProgrammingNoise(PCMLikeNoiseModel()), []), analog(X))


def test_digital_modules_run_their_own_forward(analog):
    digital = mlp()
    with torch.no_grad():
        expected = digital(X)
    assert torch.equal(run(analog, Digital(), [analog.first, analog.second]), expected)
    with torch.no_grad():
        mixed = analog.second(torch.relu(digital.first(X)))
    assert torch.equal(run(analog, Digital(), [analog.first]), mixed)


def test_a_changed_config_is_what_a_model_of_that_config_computes(analog):
    coarse = merged(CONVERTERS, {"forward": {"inp_res": 6}},
                    modifier(quantization_type="DiscretizePerChannel", res=6))  # fmt: skip
    other = analogfx.analogize(mlp(), coarse).eval()
    fields = {
        "forward.inp_res": 6,
        "modifier.quantization_type": "DiscretizePerChannel",
        "modifier.res": 6,
    }
    with torch.no_grad():
        assert torch.equal(
            run(analog, ChangedConfig(fields), [analog.first, analog.second]), other(X)
        )
        expected = analog.second(torch.relu(other.first(X)))
    assert torch.equal(run(analog, ChangedConfig(fields), [analog.first]), expected)


@pytest.mark.parametrize(
    "perturbation", [ProgrammingNoise(AdditiveNoiseModel(0.1)), Digital(), as_perturbation(
        {"forward.inp_res": 6})], ids=str
)  # fmt: skip
def test_the_model_is_untouched_afterwards(analog, perturbation):
    before, text = analog(X), analog.first._analog.config.to_json()
    state = {k: v.clone() for k, v in analog.state_dict().items()}
    with (
        pytest.raises(KeyError),
        perturbation.applied(analog, [analog.first, analog.second], 0),
    ):
        raise KeyError
    assert torch.equal(analog(X), before) and analog.first._analog.config.to_json() == text
    assert all(torch.equal(state[k], v) for k, v in analog.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"forward.inp_rs": 6},
        {"fowrard.inp_res": 6},
        {"mapping.max_input_size": 4},
        {"pre_post.input_range.dynamic": True},
        {"clip.type": "LearnablePerChannel"},
    ],
)
def test_fields_that_cannot_change_are_refused(analog, fields):
    with pytest.raises(ConfigError):
        run(analog, ChangedConfig(fields), [analog.first])


@pytest.mark.parametrize("value", ["noisy", 0.1, {}, {3: 4}])
def test_what_is_no_perturbation_is_refused(value):
    with pytest.raises(ConfigError, match="a noise model, None"):
        as_perturbation(value)


def test_none_takes_the_configs_own_noise():
    config = analogfx.TorchInferenceRPUConfig(noise_model=AdditiveNoiseModel(0.2))
    analog = analogfx.analogize(nn.Linear(8, 4), config).eval()
    own = run(analog, as_perturbation(None), [analog], seed=1)
    named = run(analog, as_perturbation(AdditiveNoiseModel(0.2)), [analog], seed=1)
    assert torch.equal(own, named) and not torch.equal(own, analog(X))
    bare = analogfx.analogize(nn.Linear(8, 4), CONFIGS["identity"])
    with pytest.raises(ConfigError, match="noise_model = None"):
        run(bare, as_perturbation(None), [bare])
