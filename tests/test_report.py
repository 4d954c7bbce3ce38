import json

import pytest
from samples import IDENTITY, TILES, mlp
from torch import nn

import analogfx
from analogfx.errors import PlacementError
from analogfx.passes.contract import SiteReport
from analogfx.report import Report, check_strict


def site(name="layer", shape=(4, 3), status="analog", reason="", asked=False):
    grid = (2, 1) if status == "analog" else (0, 0)
    return SiteReport(name, "linear", shape, grid, status, reason, "select", asked)


MISSED = site("b", (2, 2), "digital", "no tile computes this product")
ASKED = site("c", (5,), "digital", "left digital by the config", asked=True)
MIXED = Report((site("a", (4, 3)), MISSED, ASKED))


def test_printing_gives_a_table():
    assert str(MIXED).splitlines() == [
        "site  kind    weight  tiles  status   decided by  reason",
        "----  ------  ------  -----  -------  ----------  -----------------------------",
        "a     linear  4x3     2x1    analog   select",
        "b     linear  2x2     -      digital  select      no tile computes this product",
        "c     linear  5       -      digital  select      left digital by the config",
        "1 of 3 products analog, 57.1% of the weight elements",
    ]


def test_an_empty_report_prints():
    assert (
        str(Report(())).splitlines()[-1] == "0 of 0 products analog, 100.0% of the weight elements"
    )


@pytest.mark.parametrize(
    ("sites", "coverage"),
    [
        ((), 1.0),
        ((site(),), 1.0),
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
        "asked": False,
    }  # fmt: skip


def test_strict_names_what_was_missed_and_not_what_was_asked_for():
    with pytest.raises(PlacementError) as caught:
        check_strict(MIXED)
    assert str(caught.value).splitlines()[1:] == [
        "  b (linear, [2, 2]): no tile computes this product"
    ]
    check_strict(Report((site(), ASKED)))


def test_the_report_of_an_analog_model():
    placed = analogfx.report(analogfx.analogize(mlp(), TILES))
    assert [(s.name, s.kind, s.weight_shape, s.tile_grid, s.status) for s in placed.sites] == [
        ("first", "linear", (12, 8), (2, 4), "analog"),
        ("second", "linear", (4, 12), (3, 2), "analog"),
    ]
    assert {s.decided_by for s in placed.sites} == {"select"} and placed.coverage == 1.0


@pytest.mark.parametrize("model", [nn.Linear(2, 2), analogfx.analogize(mlp(), IDENTITY).first])
def test_a_model_that_was_not_analogized_as_a_whole_has_none(model):
    with pytest.raises(PlacementError, match="carries no placement: pass what analogize"):
        analogfx.report(model)


def test_a_wrapped_model_has_its_models_report():
    analog = analogfx.analogize(mlp(), IDENTITY)
    assert analogfx.report(nn.DataParallel(analog)) == analogfx.report(analog)
