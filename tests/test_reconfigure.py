import copy
import logging

import pytest
import torch
from samples import CONFIGS, EVERYTHING, IDENTITY, clip, merged, mlp, ranged

import analogfx
from analogfx.errors import CheckpointError, ConfigError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
FINE = merged(ranged(init_from_data=0), {"forward": {"inp_res": 254}})
COARSE = merged(ranged(init_from_data=0), {"forward": {"inp_res": 6}})


def made(config, **options):
    return analogfx.analogize(mlp(), config, **options).eval()


def test_the_model_computes_as_one_of_the_new_config():
    analog, other = made(FINE), made(COARSE)
    with torch.no_grad():
        for model in (analog, other):
            model.first.input_range.fill_(1.7)
            model.second.weight.mul_(0.5)
    expected = other(X)
    assert not torch.equal(analog(X), expected)
    analogfx.set_config(analog, COARSE)
    assert torch.equal(analog(X), expected) and analog.first.input_range.item() == pytest.approx(
        1.7
    )
    analog.train(), other.train()
    torch.manual_seed(0)
    first = analog(X)
    torch.manual_seed(0)
    assert torch.equal(first, other(X))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("start", ["identity", "everything"])
def test_from_any_config_to_any_other(start, name):
    analog = made(CONFIGS[start])
    analogfx.set_config(analog, CONFIGS[name])
    fresh = made(CONFIGS[name])
    assert set(analog.state_dict()) == set(fresh.state_dict())
    trained = {n: p.requires_grad for n, p in fresh.named_parameters()}
    assert {n: p.requires_grad for n, p in analog.named_parameters()} == trained
    assert torch.equal(analog(X), fresh(X))


def test_the_parameters_stay_the_same_objects():
    analog = made(FINE)
    kept = [analog.first.weight, analog.first.input_range]
    analogfx.set_config(analog, COARSE)
    assert analog.first.weight is kept[0] and analog.first.input_range is kept[1]


def test_a_frozen_range_stays_frozen():
    analog = made(FINE)
    analog.first.input_range.requires_grad_(False)
    analogfx.set_config(analog, COARSE)
    assert not analog.first.input_range.requires_grad and analog.second.input_range.requires_grad


def test_other_tiles_start_their_ranges_anew():
    analog = made(FINE)
    with torch.no_grad():
        analog.first.input_range.fill_(0.5)
    analogfx.set_config(analog, merged(FINE, {"mapping": {"max_input_size": 4}}))
    assert analog.first.input_range.tolist() == [3.0, 3.0]
    assert analogfx.report(analog).sites[0].tile_grid == (2, 1)


def test_a_mapping_changes_what_it_names():
    analog = made(FINE)
    analogfx.set_config(analog, {"first": COARSE})
    assert analog.first._analog.resolved.inp_res == 6
    assert analog.second._analog.resolved.inp_res == 254
    torch.testing.assert_close(analog(X), made({"first": COARSE, "*": FINE})(X), rtol=0, atol=0)


def test_a_digital_layer_stays_digital():
    analog = made({"first": FINE})
    analogfx.set_config(analog, COARSE)
    assert analogfx.report(analog).sites[1].status == "digital"
    assert analog.first._analog.resolved.inp_res == 6


def test_what_was_set_is_saved(tmp_path):
    analog = made(FINE)
    analogfx.set_config(analog, {"second": EVERYTHING})
    analogfx.save(analog, tmp_path)
    assert torch.equal(analogfx.load(mlp(), tmp_path).eval()(X), analog(X))
    with pytest.raises(CheckpointError):
        analogfx.load(torch.nn.Linear(8, 4), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"second": None, "*": COARSE}, "second: rpu_config = None: expected a config; to make"),
        (None, "expected a config; to make a layer digital"),
        ({"*": {"forward": {"inp_res": 6}}}, "forward.inp_res = 6"),
        ({"first": COARSE, "second": merged(FINE, {"clip": {"type": "None"}},
          {"forward": {"out_res": 6}})}, "forward.out_res"),
        (analogfx.recipes.afm, r"afm\(\), with parentheses"),
        ({"*": analogfx.recipes.afm}, r"afm\(\), with parentheses"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_changes_nothing(config, message):
    analog = made(merged(FINE, clip("LearnablePerChannel")))
    before, text = copy.deepcopy(analog.state_dict()), analog.first._analog.config.to_json()
    with pytest.raises(ConfigError, match=message):
        analogfx.set_config(analog, config)
    assert analog.first._analog.config.to_json() == text
    assert all(torch.equal(before[k], v) for k, v in analog.state_dict().items())


def test_a_digital_model_is_refused():
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.set_config(mlp(), IDENTITY)


def test_what_was_done_is_logged(caplog):
    with caplog.at_level(logging.INFO, "analogfx"):
        analog = made(FINE)
        analogfx.set_config(analog, {"first": COARSE})
        analogfx.program(analog, analogfx.chip.PCMLikeNoiseModel(), seed=7)
    assert [record.getMessage() for record in caplog.records] == [
        "analogize: 2 of 2 products analog",
        "set_config: 1 of 2 analog layers",
        "program: 2 products, chip 7",
    ]
