import os
import pickle
from pathlib import Path

import aihwkit_lightning.simulator.configs as lightning
import pytest
import torch
from torch import nn

from analogfx.compat.lightning.pickles import config_of, read_config, read_tensors
from analogfx.config import WeightClipType, WeightNoiseInjectionType
from analogfx.errors import CheckpointError, ConfigError


def theirs():
    config = lightning.TorchInferenceRPUConfig()
    config.forward.inp_res = 254
    config.clip.type, config.clip.sigma = lightning.WeightClipType.LAYER_GAUSSIAN, 2.5
    config.pre_post.input_range.enable = True
    return config


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_config_is_read(tmp_path, protocol):
    (tmp_path / "rpu_config").write_bytes(pickle.dumps(theirs(), protocol))
    config = read_config(tmp_path / "rpu_config")
    assert config == config_of(theirs())
    assert (config.forward.inp_res, config.clip.sigma) == (254, 2.5)
    assert config.clip.type is WeightClipType.LAYER_GAUSSIAN and config.pre_post.input_range.enable


def test_a_state_dict_with_configs_is_read(tmp_path):
    torch.save({"weight": torch.ones(2), "config": theirs()}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert found["weight"].tolist() == [1, 1] and config_of(found["config"]) == config_of(theirs())


@pytest.mark.parametrize("write", ["torch", *range(2, 6)])
@pytest.mark.parametrize("read", [read_tensors, read_config])
@pytest.mark.parametrize("place", ["whole", "in a config"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_attack_is_refused_and_does_not_run(tmp_path, write, read, place):
    attack = Attack(tmp_path / "ran")
    if place == "in a config":
        attack, config = theirs(), attack
        attack.forward = config
    path = tmp_path / "attack"
    if write == "torch":
        torch.save(attack, path)
    else:
        path.write_bytes(pickle.dumps(attack, write))
    with pytest.raises(CheckpointError):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_the_refusal_names_what_was_called(tmp_path):
    torch.save({"x": Attack(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"names 'posix\.mkdir', which a pickle could call"):
        read_tensors(tmp_path / "a.pt")
    (tmp_path / "b").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"names 'posix\.mkdir'"):
        read_config(tmp_path / "b")
    torch.save(nn.Linear(2, 2), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"names 'torch\.nn\.modules\.linear\.Linear'"):
        read_tensors(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "code",
    [
        # a dotted name that leads from a class to its globals
        b"\x80\x04\x8c/aihwkit_lightning.simulator.configs.configs\x8c"
        b"(TorchInferenceRPUConfig.__init__.__doc__\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x041+11\x85R.",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, code):
    (tmp_path / "a").write_bytes(code)
    with pytest.raises(CheckpointError):
        read_config(tmp_path / "a")


@pytest.mark.parametrize("read", [read_tensors, read_config])
@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x02]q\x00."])
def test_damaged_files_are_named_errors(tmp_path, read, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(
        (CheckpointError, ConfigError), match=r"expected|damaged|refused|no pickled"
    ):
        config_of(read(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(Path(tmp_path / "nowhere"))


def test_deprecated_and_older_fields():
    config = theirs()
    config.modifier.type = lightning.WeightModifierType.ADD_NORMAL_PER_CHANNEL
    config.modifier.offset = 0.0
    config.pre_post.input_range.init_with_max = False
    found = config_of(config)
    assert found.modifier.noise_type is WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.offset = 0.1
    with pytest.raises(ConfigError, match=r"modifier\.offset = 0\.1"):
        config_of(config)


def test_a_config_inside_itself_is_refused():
    config = theirs()
    config.forward = config
    with pytest.raises(ConfigError):
        config_of(config)
