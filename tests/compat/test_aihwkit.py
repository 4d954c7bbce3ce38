import sys

import pytest
import torch
from samples import CONFIGS, TILES, clip, merged, mlp, ranged
from torch import nn

import analogfx
from analogfx.errors import CompatError

pytest.importorskip("aihwkit")
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.nn import AnalogLinear, AnalogWrapper

from analogfx.compat import aihwkit
from analogfx.compat.lightning import export_to_aihwkit

IO = {"forward": {"inp_res": 254, "out_res": 254, "out_bound": 2.0}}
"""Both clamps act: some inputs and some outputs are beyond."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(36, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.head(self.fc(self.conv(x).relu().flatten(1)).relu())


def made(config):
    torch.manual_seed(0)
    analog = analogfx.analogize(Net(), config).eval()
    for name, parameter in analog.named_parameters():
        if "input_range" in name:
            parameter.data.uniform_(0.4, 0.9)
        if "clip" in name:
            parameter.data.mul_(0.7)
    return analog, torch.randn(5, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def assert_equal(analog, x):
    theirs = aihwkit.export(analog)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), analog(x), rtol=1e-6, atol=1e-6)
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_aihwkit(name):
    tiles = {} if name in ("DAC and ADC", "everything") else TILES
    analog, x = made(merged(CONFIGS[name], tiles))
    assert isinstance(assert_equal(analog, x), AnalogWrapper)
    assert isinstance(analog.fc, analogfx.AnalogModule)


@pytest.mark.parametrize("kind", ["LayerGaussian", "LayerGaussianPerChannel"])
def test_the_adcs_bound_follows_tile_or_channel(kind):
    analog, x = made(merged(ranged(), IO, clip(kind, sigma=2.0), TILES))
    assert_equal(analog, x)
    wide = merged(ranged(), IO, clip(kind, sigma=2.0), TILES, {"forward": {"out_bound": 200.0}})
    assert not torch.equal(analog(x), made(wide)[0](x))


def test_each_layer_has_its_own_config():
    analog, x = made({"fc": merged(ranged(), IO), "head": CONFIGS["dynamic"], "*": None})
    model = assert_equal(analog, x)
    assert type(model.conv) is nn.Conv2d
    tiles = dict(model.named_analog_tiles())
    found = {name.partition(".")[0]: tile.rpu_config for name, tile in tiles.items()}
    assert found["fc"].forward.out_bound == 2 and found["fc"].pre_post.input_range.enable
    assert found["head"].forward.out_bound == 1.5
    assert not found["head"].pre_post.input_range.enable


def test_a_row_of_zeros():
    analog, x = made(merged(ranged(), IO, clip("LayerGaussianPerChannel", sigma=2.0)))
    with torch.no_grad():
        analog.fc.weight[3] = 0
    assert_equal(analog, x)


def test_a_layer_by_itself_and_its_life_there():
    analog = analogfx.analogize(nn.Linear(8, 4), merged(ranged(), IO)).eval()
    x = torch.randn(3, 8)
    model = assert_equal(analog, x)
    assert isinstance(model, AnalogLinear)
    for tile in model.analog_tiles():
        tile.rpu_config.noise_model = PCMLikeNoiseModel(g_max=25.0)
    exact = model(x)
    for tile in model.analog_tiles():
        tile.program_weights()
        tile.drift_weights(86400.0)
    assert not torch.equal(model(x), exact) and (model(x) - exact).norm() < exact.norm()


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv1d(4, 4, 2), "no Conv1d"),
        (nn.Conv2d(4, 4, 2, groups=2), "no groups = 2 in a convolution"),
        (nn.Conv2d(4, 4, 2, padding="same"), "no padding by name"),
        (nn.LSTM(4, 4), "no LSTM"),
        (nn.MultiheadAttention(4, 2), "no MultiheadAttention"),
        (nn.Linear(4, 4).double(), "no torch.float64 weight"),
    ],
)
def test_what_aihwkit_has_not_is_refused_by_name(layer, found):
    analog = analogfx.analogize(nn.Sequential(layer), ranged())
    with pytest.raises(CompatError, match=f"0[^:]*: AIHWKIT has {found}"):
        aihwkit.export(analog)


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match="no analog layer"):
        aihwkit.export(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "aihwkit.nn", None)
    with pytest.raises(CompatError, match="install aihwkit"):
        aihwkit.export(analogfx.analogize(mlp(), ranged()))


def test_under_lightnings_name_with_tiles_along_the_outputs():
    analog, x = made(merged(ranged(), IO, clip("LayerGaussian", sigma=2.0)))
    theirs = export_to_aihwkit(model=analog, max_output_size=2)
    assert len(list(theirs.fc.analog_tiles())) == 4
    assert analog.fc.rpu_config.mapping.max_output_size == -1
    tiled, _ = made(
        merged(ranged(), IO, clip("LayerGaussian", sigma=2.0), {"mapping": {"max_output_size": 2}})
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), tiled(x), rtol=1e-6, atol=1e-6)
