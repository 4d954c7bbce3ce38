import copy
import json
import os
import pickle
from collections import OrderedDict

import aihwkit_lightning.simulator.configs as lightning
import pytest
import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from safetensors.torch import save_file
from torch import nn

import analogfx
from analogfx.compat.lightning import checkpoint
from analogfx.compat.lightning.pickles import config_of
from analogfx.errors import CheckpointError, CompatError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:You are using AIHWKIT-Lightning version <2")


def config(inp_res=254, **ranges):
    made = lightning.TorchInferenceRPUConfig()
    made.forward.inp_res = inp_res
    made.pre_post.input_range.enable = True
    for name, value in ranges.items():
        setattr(made.pre_post.input_range, name, value)
    return made


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)


class Net(nn.Module):
    """Every kind of layer that Lightning has, at the top and below."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.conv1, self.conv2 = nn.Conv1d(2, 3, 2), nn.Conv2d(2, 3, 2)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.gru = nn.GRU(6, 4, 2, bidirectional=True)
        self.head = nn.Linear(6, 4)


INPUTS = {
    "block.up": torch.randn(5, 6),
    "conv1": torch.randn(2, 2, 5),
    "conv2": torch.randn(2, 2, 5, 5),
    "conv3": torch.randn(2, 2, 3, 3, 3),
    "gru": torch.randn(3, 2, 6),
    "head": torch.randn(5, 6),
}


def output(model, path):
    found = model.get_submodule(path)(INPUTS[path])
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture(scope="module")
def oracle():
    """Lightning's model, with ranges of its own."""
    torch.manual_seed(0)
    model = convert_to_analog(Net(), config()).eval()
    for name, parameter in model.named_parameters():
        if "input_range" in name:
            parameter.data.uniform_(0.5, 2)
    return model


def assert_same(analog, oracle):
    with torch.no_grad():
        for path in INPUTS:
            torch.testing.assert_close(output(analog, path), output(oracle, path))


def test_a_file_of_lightnings_model(oracle, tmp_path):
    torch.save(oracle.state_dict(), tmp_path / "a.pt")
    digital = Net()
    analog = checkpoint.load(tmp_path / "a.pt", digital).eval()
    assert_same(analog, oracle)
    assert analogfx.report(analog).coverage == 1
    assert not isinstance(digital.head, analogfx.AnalogModule)
    assert checkpoint.load(oracle.state_dict(), digital, inplace=True) is digital
    assert_same(digital.eval(), oracle)


def test_there_and_back(oracle, tmp_path):
    analog = checkpoint.load(oracle.state_dict(), Net()).eval()
    checkpoint.save(analog, tmp_path / "b.pt")
    again = convert_to_analog(Net(), config(inp_res=14)).eval()
    again.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=False))
    # Lightning takes the config over where it looks for one: not in Conv1d.
    assert again.block.up.rpu_config.forward.inp_res == 254
    again.conv1.rpu_config = config()
    assert_same(again, oracle)
    assert_same(checkpoint.load(tmp_path / "b.pt", Net()).eval(), oracle)


def test_a_config_for_each_layer(tmp_path):
    specific = {"head": config(14), "block.up": config(30)}
    model = convert_to_analog(
        Net(), config(), specific_rpu_config_fun=lambda name, _, given: specific.get(name, given)
    )
    analog = checkpoint.load(model.state_dict(), Net(), rpu_config=config())
    found = {path: layer.rpu_config for path, layer in analogfx.named_analog_layers(analog)}
    assert found["head"].forward.inp_res == 14 and found["conv2"].forward.inp_res == 254
    # Ours says it of every layer.
    analogfx.set_config(analog, {"block.up": specific["block.up"]})
    again = checkpoint.load(checkpoint.state_dict(analog), Net())
    assert again.block.up.rpu_config.forward.inp_res == 30
    assert again.block.down.rpu_config.forward.inp_res == 254


def test_excluded_layers_stay_digital():
    model = convert_to_analog(Net(), config(), exclude_modules=["block.down", "gru"])
    analog = checkpoint.load(model.state_dict(), Net())
    digital = [site.name for site in analogfx.report(analog).sites if site.status == "digital"]
    assert digital[0] == "block.down" and all(name.startswith("gru") for name in digital[1:])


def test_without_ranges_every_layer_is_analog():
    for made in (lightning.TorchInferenceRPUConfig(), config(dynamic=True)):
        analog = checkpoint.load(convert_to_analog(Net(), made).state_dict(), Net())
        assert analogfx.report(analog).coverage == 1


def test_keys_with_the_paths_of_lightnings_cells(oracle):
    inside = OrderedDict((f"gru.rnn.{k}", v) for k, v in oracle.gru.rnn.state_dict().items())
    rest = {k: v for k, v in oracle.state_dict().items() if not k.startswith("gru.")}
    assert "gru.rnn.layers.0.directions.1.cell.weight_ih.input_range" in inside
    assert_same(checkpoint.load({**rest, **inside}, Net(), rpu_config=config()).eval(), oracle)


def test_a_folder_of_a_foundation_model(oracle, tmp_path):
    state = dict(oracle.state_dict())
    names = list(state)
    (tmp_path / "rpu_config").write_bytes(pickle.dumps(config()))
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, its in halves.items():
        torch.save({name: state[name] for name in its}, tmp_path / file)
    index = {"weight_map": {name: file for file, its in halves.items() for name in its}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(checkpoint.load(tmp_path, Net()).eval(), oracle)
    assert checkpoint.configs(tmp_path) == {"*": config_of(config())}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    assert_same(checkpoint.load(tmp_path, Net()).eval(), oracle)
    (tmp_path / "rpu_config").unlink()
    with pytest.raises(CheckpointError, match=r"ranges of 'block.up' .* pass rpu_config="):
        checkpoint.load(tmp_path, Net())
    assert_same(checkpoint.load(tmp_path, Net(), rpu_config=config()).eval(), oracle)


def test_half_precision_counts_beyond_256():
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 4)), config(init_from_data=1000)).half()
    model[0].input_range_update_idx.fill_(500)
    analog = checkpoint.load(model.state_dict(), nn.Sequential(nn.Linear(4, 4)).half())
    assert analog[0].input_range_update_idx.item() == 500
    analog[0].input_range_update_idx.fill_(1 << 31)  # calibrated
    state = checkpoint.state_dict(analog)
    assert state["0.input_range_update_idx"].dtype == torch.float16
    assert state["0.input_range_update_idx"].item() == 1000


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_ties(tmp_path):
    state = convert_to_analog(Tied(), config()).state_dict()
    assert checkpoint.load(state, Tied()).head.weight is not None
    alone = {name: value for name, value in state.items() if name != "head.weight"}
    analog = checkpoint.load(alone, Tied(), rpu_config=config())
    assert analog.head.weight is analog.embed.weight
    assert torch.equal(analog.head.weight, state["embed.weight"])
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'embed\.weight' and 'head\.weight' differ there"):
        checkpoint.load(state, Tied())
    assert checkpoint.load(state, Tied(tie=False)).head.weight[0, 0] == state["head.weight"][0, 0]


def test_another_model_is_a_named_error_and_nothing_is_left(oracle, tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(6, 4), "more": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"(?s)of another model: .*more.weight"):
        checkpoint.load(oracle.state_dict(), model, inplace=True)
    assert not isinstance(model["head"], analogfx.AnalogModule)
    with pytest.raises(CheckpointError, match="no analog layer of Sequential"):
        checkpoint.load(nn.Linear(2, 2).state_dict(), nn.Sequential())
    with pytest.raises(CheckpointError, match="'epoch' is a int; expected a state dict"):
        checkpoint.load({"epoch": 3, "state_dict": {}}, Net())
    with pytest.raises(CheckpointError, match="has neither"):
        checkpoint.load(tmp_path, Net())


def test_an_attack_in_the_metadata_does_not_run(oracle, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    state = copy.copy(oracle.state_dict())
    state._metadata["head"]["rpu_config"] = Attack()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"names 'posix\.mkdir'"):
        checkpoint.load(tmp_path / "a.pt", Net())
    assert not (tmp_path / "ran").exists()


def test_configs_are_what_set_config_takes(oracle):
    analog = analogfx.analogize(Net(), config(14))
    found = checkpoint.configs(oracle.state_dict())
    analogfx.set_config(analog, {name: found[name] for name in ("block", "head")})
    assert analog.block.down.rpu_config == config_of(config())
    assert analog.conv2.rpu_config.forward.inp_res == 14


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(4, 4, 2, groups=2), "groups in a convolution"),
        (nn.Conv1d(4, 4, 2, dilation=2), "dilation in a convolution"),
        (nn.Conv2d(4, 4, 2, padding="same"), "a padding by name"),
        (nn.Conv2d(4, 4, 2, padding_mode="circular"), "padding_mode='circular'"),
        (nn.GRU(4, 4, batch_first=True), "batch_first"),
        (nn.LSTM(4, 4, proj_size=2), "proj_size"),
        (nn.RNN(4, 4, nonlinearity="relu"), "nonlinearity='relu'"),
        (nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
    ],
)
def test_what_lightning_has_not_is_refused_by_name(layer, found):
    analog = analogfx.analogize(nn.Sequential(layer), config())
    with pytest.raises(CompatError, match=f"0: AIHWKIT-Lightning has no .*{found}"):
        checkpoint.state_dict(analog)


def test_tiles_along_the_outputs_are_refused():
    ours = config_of(config())
    ours.mapping.max_output_size = 2
    with pytest.raises(CompatError, match=r"no mapping\.max_output_size = 2"):
        checkpoint.state_dict(analogfx.analogize(nn.Linear(4, 4), ours))


def test_a_config_that_cannot_be_read_is_named(oracle):
    state = oracle.state_dict()
    state._metadata["head"]["rpu_config"] = {"forward": {"volts": 1}}
    with pytest.raises(ConfigError, match=r"forward\.volts"):
        checkpoint.load(state, Net())
