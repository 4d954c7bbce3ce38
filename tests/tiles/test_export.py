import json
import os

import pytest
import torch
from safetensors.torch import load_file
from samples import CONFIGS, IDENTITY, clip, merged, mlp, modifier, ranged
from torch import nn

import analogfx
from analogfx.chip import DualPairConductanceConverter, PCMLikeNoiseModel
from analogfx.errors import CaptureError, ConfigError

ROWS = modifier(quantization_type="DiscretizePerChannel", res=14)
WHOLE = modifier(quantization_type="Discretize", res=1022)


def made(layer, *configs, seed=0):
    torch.manual_seed(seed)
    analog = analogfx.analogize(layer(), merged(*configs))
    x = torch.randn(16, next(p for p in analog.parameters() if p.dim() == 2).shape[1])
    if any(m._analog.resolved.has_state for m in analog.modules() if hasattr(m, "_analog")):
        analogfx.calibrate(analog, [x], progress=False)
    return analog.eval()


def read(folder):
    record = json.loads((folder / "tiles.json").read_text())
    return record, load_file(folder / record["tensors"]["file"])


def assembled(record, tensors, name, kind, site):
    """A site's (..., O, I) matrix from the parts that hold it, groups included."""
    whole = None
    for tile in record["tiles"]:
        if tile["site"] != name:
            continue
        held = tensors[f"{tile['number']}:{kind}"]
        assert held.shape[-2:] == (tile["rows"], tile["columns"])
        if whole is None:
            whole = held.new_zeros((*held.shape[:-2], site["outputs"], site["inputs"]))
        high, wide = tile["rows"] // tile["groups"], tile["columns"] // tile["groups"]
        for g in range(tile["groups"]):
            block = held[..., g * high : (g + 1) * high, g * wide : (g + 1) * wide]
            start = tile["outputs"][0] + g * wide
            whole[..., start : start + wide, slice(*tile["inputs"])] = block.mT
    return whole


@pytest.mark.parametrize("crossbar", [(512, 512), (5, 3)])
def test_weights_as_they_are(tmp_path, crossbar):
    analog = made(lambda: nn.Linear(12, 7), CONFIGS["static range"])
    mapped = analogfx.tile_map(analog, crossbar)
    assert analogfx.export_tiles(analog, tmp_path, mapped=mapped) == tmp_path / "tiles.json"
    record, tensors = read(tmp_path)
    held = assembled(record, tensors, "weight", "weights", record["sites"]["weight"])
    assert torch.equal(held, analog.weight)
    assert torch.equal(tensors["weight:input_range"], analog.input_range)


@pytest.mark.parametrize("config", [ROWS, WHOLE, merged(ROWS, clip("LearnablePerChannel"))])
def test_codes_times_steps_are_the_quantised_weights(tmp_path, config):
    tiled = {"mapping": {"max_input_size": 5, "max_output_size": 4}}
    analog = made(lambda: nn.Linear(12, 7, bias=False), config, tiled)
    analogfx.export_tiles(analog, tmp_path)
    record, tensors = read(tmp_path)
    site = record["sites"]["weight"]
    codes = assembled(record, tensors, "weight", "codes", site)
    assert codes.dtype == (torch.int16 if config is WHOLE else torch.int8)
    assert codes.abs().max() == site["weight_states"] / 2
    steps = torch.cat(
        [
            s[:, None].expand(-1, n)
            for s, n in zip(tensors["weight:step"], site["in_sizes"], strict=True)
        ],
        dim=1,
    )
    # without a range the product multiplies by nothing but the weights that its tiles hold
    held = analog(torch.eye(12)).detach().T
    torch.testing.assert_close(codes * steps, held, rtol=0, atol=1e-6)


def test_groups_lie_on_the_diagonal(tmp_path):
    torch.manual_seed(0)
    analog = analogfx.analogize(nn.Conv2d(8, 12, 3, groups=4), IDENTITY)
    mapped = analogfx.tile_map(analog, (40, 7))
    analogfx.export_tiles(analog, tmp_path, mapped=mapped)
    record, tensors = read(tmp_path)
    held = assembled(record, tensors, "weight", "weights", record["sites"]["weight"])
    assert torch.equal(held, analog.weight.flatten(1))
    first = tensors["0:weights"]
    assert not first[:18, 3:].any() and not first[18:, :3].any()


def test_what_a_chip_holds(tmp_path):
    analog = made(mlp, ranged(), {"forward": {"inp_res": 30}})
    model = PCMLikeNoiseModel(g_converter=DualPairConductanceConverter())
    device = analogfx.program(analog, model, seed=3)
    analogfx.export_tiles(analog, tmp_path, device=device, seconds=60.0)
    record, tensors = read(tmp_path)
    site = record["sites"]["first"]
    weights = assembled(record, tensors, "first", "weights", site)
    assert torch.equal(weights, device.weights(60.0)["first.weight"])
    g = assembled(record, tensors, "first", "conductances", site)
    back = model.g_converter.to_weights(g, tensors["first:conductance_scale.0"])
    torch.testing.assert_close(back, weights)
    assert len(g) == site["devices"] == 4 and record["seconds"] == 60.0


def test_what_a_chip_is_asked_to_hold(tmp_path):
    analog = made(mlp, IDENTITY)
    device = analogfx.program(analog, PCMLikeNoiseModel(), seed=3)
    analogfx.export_tiles(analog, tmp_path, device=device, seconds=None)
    record, tensors = read(tmp_path)
    g = assembled(record, tensors, "second", "conductances", record["sites"]["second"])
    weight = analog.second.weight.detach()
    expected = 25.0 * weight / weight.abs().max()
    torch.testing.assert_close(g[0] - g[1], expected)
    assert not torch.minimum(g[0], g[1]).any()


def test_a_second_export_takes_the_place_of_the_first(tmp_path):
    for seed in (0, 1):
        analog = made(mlp, IDENTITY, seed=seed)
        analogfx.export_tiles(analog, tmp_path)
    record, tensors = read(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["tiles.json", record["tensors"]["file"]]
    )
    assert torch.equal(tensors["0:weights"].mT, analog.first.weight)


def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch):
    analog = made(mlp, IDENTITY)
    analogfx.export_tiles(analog, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with torch.no_grad():
        analog.first.weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        analogfx.export_tiles(analog, tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before


def test_what_cannot_be_is_refused(tmp_path):
    analog = made(mlp, IDENTITY)
    with pytest.raises(ConfigError, match=r"mapped\.slices = 2"):
        analogfx.export_tiles(analog, tmp_path, mapped=analogfx.tile_map(analog, slices=2))
    other = analogfx.tile_map(made(lambda: mlp(hidden=9), IDENTITY))
    with pytest.raises(ConfigError, match="the map of this model"):
        analogfx.export_tiles(analog, tmp_path, mapped=other)
    chip = analogfx.program(made(lambda: nn.Linear(3, 3), IDENTITY), PCMLikeNoiseModel())
    with pytest.raises(ConfigError, match=r"a chip of this model, with first\.weight"):
        analogfx.export_tiles(analog, tmp_path, device=chip)
    with pytest.raises(CaptureError, match="first has no weights"):
        analogfx.export_tiles(analog.to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())
