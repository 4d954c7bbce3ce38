import json
from dataclasses import replace

import pytest
import torch
from samples import COARSE, IDENTITY, TILES, merged, mlp, ranged
from torch import nn

import analogfx
from analogfx.errors import PlacementError
from analogfx.passes.contract import SiteReport
from analogfx.report import Report, check_strict


def site(name="layer", shape=(4, 3), status="analog", reason="", asked=False):
    grid = (2, 1) if status == "analog" else (0, 0)
    return SiteReport(name, "linear", shape, grid, status, reason, "select", asked=asked)


MISSED = site("b", (2, 2), "digital", "no tile computes this product")
ASKED = site("c", (5,), "digital", "left digital by the config", asked=True)
MIXED = Report((site("a", (4, 3)), MISSED, ASKED))


def test_printing_gives_a_table():
    assert MIXED.text().splitlines() == [
        "site  kind    weight  tiles  status   reason",
        "----  ------  ------  -----  -------  -----------------------------",
        "b     linear  2x2     -      digital  no tile computes this product",
        "c     linear  5       -      digital  left digital by the config",
        "a     linear  4x3     2x1    analog",
        "1 of 3 products analog, 57.1% of the weight elements",
    ]


def test_a_verbose_table_has_every_row_in_order_and_who_decided():
    layers = Report((site("h.0.fc"), site("h.1.fc"), MISSED), kernels={"h.0.fc": ON_CPU})
    assert layers.text(verbose=True).splitlines()[2:] == [
        "h.0.fc  linear  4x3     2x1    analog   select",
        "h.1.fc  linear  4x3     2x1    analog   select",
        "b       linear  2x2     -      digital  select      no tile computes this product",
        "2 of 3 products analog, 85.7% of the weight elements",
        f"1 computed by {ON_CPU}",
    ]
    assert ON_CPU not in layers.text()


ON_CPU = "torch: the tensors are on cpu, not on a CUDA device"


def test_layers_that_repeat_are_one_row():
    layers = [site(f"h.{i}.fc") for i in range(12)]
    assert Report((*layers, site("head"))).text().splitlines()[2:4] == [
        "h.{0..11}.fc  ×12  linear  4x3     2x1    analog",
        "head               linear  4x3     2x1    analog",
    ]


def test_a_row_says_where_and_what_to_do():
    row = replace(MISSED, where="model.py:7", decided_by="capture", reason="it branches")
    assert (
        Report((row,))
        .text()
        .splitlines()[2]
        .endswith(
            'it branches (model.py:7); torch.compile(model, backend="analogfx") sees what runs'
        )
    )


def test_a_narrow_table_wraps_its_reasons():
    lines = MIXED.text(width=66).splitlines()
    assert max(map(len, lines[:-1])) <= 66
    assert lines[2].endswith("no tile computes this") and lines[3].strip() == "product"


def test_an_empty_report_prints():
    assert (
        str(Report(())).splitlines()[-1] == "0 of 0 products analog, 100.0% of the weight elements"
    )


@pytest.mark.parametrize(
    ("sites", "coverage"),
    [
        ((), 1.0),
        ((site(),), 1.0),
        ((site("a", (), "digital"),), 0.0),
        ((site("a", (4, 3)), site("b", (), "digital")), 1.0),
        ((MISSED,), 0.0),
        ((site("a", (3, 4)), site("b", (2, 2), "digital")), 0.75),
        ((site("a", (8, 1, 3)), site("b", (24,), "digital")), 0.5),
        ((site("a", (0, 4), "digital"),), 1.0),
    ],
)
def test_coverage_is_a_share_of_weight_elements(sites, coverage):
    assert Report(sites).coverage == coverage


def test_to_dict_is_plain_data():
    data = json.loads(json.dumps(MIXED.to_dict()))
    assert data["coverage"] == MIXED.coverage
    assert data["sites"][1] == {
        "name": "b", "kind": "linear", "weight_shape": [2, 2], "tile_grid": [0, 0],
        "status": "digital", "reason": "no tile computes this product", "decided_by": "select",
        "where": "", "asked": False, "parameter": "", "module": "",
    }  # fmt: skip


def test_strict_names_what_was_missed_and_not_what_was_asked_for():
    with pytest.raises(PlacementError) as caught:
        check_strict(MIXED)
    assert str(caught.value).splitlines()[1:] == [
        "site  kind    weight  reason",
        "----  ------  ------  -----------------------------",
        "b     linear  2x2     no tile computes this product",
    ]
    check_strict(Report((site(), ASKED)))


def test_the_report_of_an_analog_model():
    placed = analogfx.report(analogfx.analogize(mlp(), TILES))
    assert [(s.name, s.kind, s.weight_shape, s.tile_grid, s.status) for s in placed.sites] == [
        ("first", "linear", (12, 8), (2, 4), "analog"),
        ("second", "linear", (4, 12), (3, 2), "analog"),
    ]
    assert {s.decided_by for s in placed.sites} == {"select"} and placed.coverage == 1.0


def layers():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def test_the_table_says_which_config_and_what_set_the_ranges():
    chip = {**ranged(), "noise_model": {"name": "PCMLikeNoiseModel"}}
    analog = analogfx.analogize(
        layers(), {"3": None, "2": merged(chip, {"forward": {"inp_res": 30}}), "*": ranged()}
    )
    analog[0:2](torch.randn(2, 4))
    analogfx.calibrate(analog[2], [torch.randn(2, 4)], progress=False)
    text = analogfx.report(analog).text().splitlines()
    assert [" ".join(line.split()) for line in text[2:5]] == [
        "3 linear 4x4 - - - digital left digital by the pattern '3'",
        "{0..1} ×2 linear 4x4 1x1 1 1 of 3 batches analog",
        "2 linear 4x4 1x1 2 set analog",
    ]
    assert text[6:] == [
        "config 1: pre_post.input_range.enable True, pre_post.input_range.init_from_data 3",
        "config 2: as 1, but forward.inp_res 30, noise_model PCMLikeNoiseModel",
    ]


def test_one_config_is_told_where_more_is_asked_for():
    analog = analogfx.analogize(layers(), COARSE)
    assert "config" not in analogfx.report(analog).text()
    verbose = analogfx.report(analog).text(verbose=True)
    assert "config: forward.inp_res 6, pre_post.input_range.enable True" in verbose
    plain = analogfx.report(analogfx.analogize(layers(), IDENTITY))
    assert "config: the default" in plain.text(verbose=True)
    assert "range" not in plain.text()


def test_values_of_ranges_are_told_where_more_is_asked_for():
    analog = analogfx.analogize(
        layers(), merged(ranged(), TILES, {"mapping": {"max_input_size": 2}})
    )
    with torch.no_grad():
        analog[1].input_range.copy_(torch.tensor([1.5, 2.25]))
    rows = analogfx.report(analog).text(verbose=True).splitlines()[2:6]
    assert "0 of 3 batches: 3  " in rows[0] and "0 of 3 batches: 1.5 to 2.25  " in rows[1]


def test_configs_and_ranges_are_plain_data():
    analog = analogfx.analogize(layers(), {"0": IDENTITY, "*": ranged()})
    data = json.loads(json.dumps(analogfx.report(analog).to_dict()))
    assert data["configs"] == {"0": 1, "1": 2, "2": 2, "3": 2}
    assert data["ranges"]["0"]["mode"] == "none"
    assert data["ranges"]["1"] == {
        "name": "1", "mode": "static", "seen": 0, "wanted": 3, "smallest": 3.0, "largest": 3.0
    }  # fmt: skip


def test_a_model_on_meta_has_a_report():
    analog = analogfx.analogize(layers().to("meta"), ranged())
    assert [s.status for s in analogfx.report(analog).sites] == ["analog"] * 4


@pytest.mark.parametrize("model", [nn.Linear(2, 2), analogfx.analogize(mlp(), IDENTITY).first])
def test_a_model_that_was_not_analogized_as_a_whole_has_none(model):
    with pytest.raises(PlacementError, match="carries no placement: pass what analogize"):
        analogfx.report(model)


def test_a_wrapped_model_has_its_models_report():
    analog = analogfx.analogize(mlp(), IDENTITY)
    assert analogfx.report(nn.DataParallel(analog)) == analogfx.report(analog)
