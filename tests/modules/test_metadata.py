import io
import warnings

import aihwkit_lightning.simulator.configs as lightning
import pytest
import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from samples import merged, mlp, ranged

import analogfx

FINE = merged(ranged(), {"forward": {"inp_res": 254}})
COARSE = merged(ranged(), {"forward": {"inp_res": 62}})


def test_a_state_dict_of_another_config_is_one_warning_that_names_both():
    analog, other = analogfx.analogize(mlp(), FINE), analogfx.analogize(mlp(), COARSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        other.load_state_dict(analog.state_dict())
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "forward.inp_res = 254.0 in the state dict, 62.0 in the model" in text
    assert "set_config" in text
    assert other.first.rpu_config.forward.inp_res == 62
    analogfx.set_config(other, analog.first.rpu_config)
    other.load_state_dict(analog.state_dict())  # warnings are errors


def test_the_config_survives_a_file_that_holds_plain_data_alone():
    analog, other = analogfx.analogize(mlp(), FINE), analogfx.analogize(mlp(), COARSE)
    file = io.BytesIO()
    torch.save(analog.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with pytest.warns(UserWarning, match="forward.inp_res = 254.0 in the state dict"):
        other.load_state_dict(state)


def test_lightnings_own_state_dict():
    config = lightning.TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.forward.inp_res = 254
    state = convert_to_analog(mlp(), config).state_dict()
    analogfx.analogize(mlp(), config).load_state_dict(state)  # no warning
    with pytest.warns(UserWarning, match="254.0 in the state dict, 62.0 in the model"):
        analogfx.analogize(mlp(), COARSE).load_state_dict(state)


def test_lightning_loads_ours():
    config = lightning.TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    oracle = convert_to_analog(mlp(), config)
    oracle.load_state_dict(analogfx.analogize(mlp(), config).state_dict())
    assert isinstance(oracle.first.rpu_config, lightning.TorchInferenceRPUConfig)


def test_what_acts_on_a_chip_alone_makes_no_difference():
    chip = analogfx.TorchInferenceRPUConfig.from_dict({"schema": 1, **FINE})
    chip.noise_model = analogfx.chip.PCMLikeNoiseModel()
    state = analogfx.analogize(mlp(), chip).state_dict()
    analogfx.analogize(mlp(), FINE).load_state_dict(state)


def test_a_config_that_cannot_be_read_is_a_warning():
    analog = analogfx.analogize(mlp(), FINE)
    state = analog.state_dict()
    state._metadata["first"]["analogfx_config"] = {"schema": 1, "forward": {"volts": 3}}
    with pytest.warns(UserWarning, match=r"cannot read: forward\.volts"):
        analog.load_state_dict(state)


def test_a_digital_state_dict_says_nothing_of_configs():
    digital = mlp()
    analog = analogfx.analogize(digital, FINE)
    assert analogfx.digital_state_dict(analog)._metadata == digital.state_dict()._metadata
