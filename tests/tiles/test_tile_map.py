import csv
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from samples import IDENTITY, Deep, mlp
from torch import nn

import analogfx
from analogfx.errors import ConfigError

SCHEMA = Path(__file__).parents[2] / "docs" / "tile-map.schema.json"


def analog_linear(outputs, inputs, **mapping):
    return analogfx.analogize(nn.Linear(inputs, outputs, bias=False), {"mapping": mapping})


def conv(groups, **fields):
    torch.manual_seed(0)
    return analogfx.analogize(nn.Conv2d(8, 12, 3, groups=groups, **fields), IDENTITY)


def sizes(mapped):
    return [(t.rows, t.columns) for t in mapped.tiles]


def covered(mapped, site):
    """How often every weight of a site's block-diagonal matrix is held, (inputs, outputs)."""
    row = next(s for s in mapped.sites if s.name == site)
    held = torch.zeros(row.inputs, row.outputs, dtype=torch.int64)
    for tile in mapped.tiles:
        if tile.site == site:
            held[slice(*tile.inputs), slice(*tile.outputs)] += 1
    return held


def overlapping(mapped):
    """Pairs of parts that share a cell."""
    cells = {}
    for number, t in enumerate(mapped.tiles):
        for r in range(t.row, t.row + t.rows):
            for c in range(t.column, t.column + t.columns):
                cells.setdefault((t.crossbar, r, c), []).append(number)
    return [numbers for numbers in cells.values() if len(numbers) > 1]


def test_a_matrix_that_fits_takes_one_crossbar():
    mapped = analogfx.tile_map(analog_linear(10, 20), (32, 16))
    (tile,) = mapped.tiles
    assert (tile.rows, tile.columns, tile.cells, tile.devices) == (20, 10, 200, 400)
    assert (mapped.crossbars, mapped.utilisation, mapped.macs) == (1, 200 / 512, None)


@pytest.mark.parametrize(
    ("fill", "along", "across"),
    [("even", [7, 7, 6], [5, 5]), ("first", [8, 8, 4], [6, 4])],
)
def test_how_parts_are_filled(fill, along, across):
    mapped = analogfx.tile_map(analog_linear(10, 20), (8, 6), fill=fill)
    assert [t.rows for t in mapped.tiles if t.tile_column == 0] == along
    assert [t.columns for t in mapped.tiles if t.tile_row == 0] == across
    assert covered(mapped, "weight").unique().tolist() == [1] and mapped.finer == ("weight",)


def test_a_sites_own_tiles_are_respected():
    analog = analog_linear(10, 20, max_input_size=8, max_output_size=4)
    mapped = analogfx.tile_map(analog, (512, 512))
    assert mapped.sites[0].grid == (3, 3) and not mapped.finer
    assert [t.input_tile for t in mapped.tiles if t.tile_column == 0] == [0, 1, 2]
    cut = analogfx.tile_map(analog, (4, 512))  # 20 inputs in tiles of 7, 7, 6
    assert [t.rows for t in cut.tiles if t.tile_column == 0] == [4, 3, 4, 3, 3, 3]
    assert [t.input_tile for t in cut.tiles if t.tile_column == 0] == [0, 0, 1, 1, 2, 2]
    assert cut.finer


def test_slices_and_pairs_multiply_devices():
    analog = analog_linear(10, 20)
    single = analogfx.tile_map(analog, (32, 16), differential=False, slices=3)
    assert single.devices == 600 and single.crossbars == 3
    assert [t.slice for t in single.tiles] == [0, 1, 2] and single.sites[0].cells == 200
    assert analogfx.tile_map(analog, (32, 16), slices=3).devices == 1200


def test_groups_on_the_diagonal_and_one_by_one():
    # 4 groups of 3 outputs and 2 * 9 inputs
    mapped = analogfx.tile_map(conv(4), (40, 7))
    assert sizes(mapped) == [(36, 6), (36, 6)] and [t.groups for t in mapped.tiles] == [2, 2]
    assert {t.cells for t in mapped.tiles} == {2 * 18 * 3}
    assert covered(mapped, "weight").unique().tolist() == [1]
    apart = analogfx.tile_map(conv(4), (40, 7), grouping="separate")
    assert sizes(apart) == [(18, 3)] * 4 and apart.devices == mapped.devices == 2 * 12 * 18
    assert not mapped.finer and not apart.finer


def test_groups_that_are_cut_stay_apart():
    mapped = analogfx.tile_map(conv(2), (20, 4))  # 2 groups of 6 outputs and 36 inputs
    assert sizes(mapped) == [(18, 3)] * 8 and {t.groups for t in mapped.tiles} == {1}
    assert covered(mapped, "weight").unique().tolist() == [1] and mapped.finer


def test_a_forward_counts_positions_calls_and_conversions():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Flatten(), nn.Linear(12 * 30, 4))
    analog = analogfx.analogize(model, IDENTITY)
    mapped = analogfx.tile_map(analog, (64, 8), inputs=torch.ones(2, 8, 5, 6))
    assert mapped.vectors == {"0": 2 * 30, "2": 2}
    assert mapped.macs == 2 * 30 * 12 * 72 + 2 * 4 * 360
    # The first is cut into 2 x 2 parts, the second into 6 x 1.
    assert mapped.dac_conversions == 60 * 2 * 72 + 2 * 360
    assert mapped.adc_conversions == 60 * 2 * 12 + 2 * 6 * 4
    assert mapped.reads == 60 * 4 + 2 * 6


def test_counting_agrees_with_torchs_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 6, 1), nn.Linear(10, 5))
    x = torch.randn(3, 4, 12)
    with FlopCounterMode(display=False) as counter:
        encoder(x)
    mapped = analogfx.tile_map(analogfx.analogize(encoder, IDENTITY), inputs=x)
    assert 2 * mapped.macs == counter.get_total_flops()


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    analog = analogfx.analogize(model, analogfx.recipes.afm()).train()
    analog[2].eval()
    before = {k: v.clone() for k, v in analog.state_dict().items()}
    analogfx.tile_map(analog, inputs=(torch.randn(8, 6), torch.ones(8)))
    assert all(torch.equal(before[k], v) for k, v in analog.state_dict().items())
    assert [m.training for m in analog] == [True, True, False, True]


def test_packing_shares_crossbars_and_no_cell():
    analog = analogfx.analogize(Deep(depth=5, width=7), IDENTITY)
    apart, packed = (analogfx.tile_map(analog, (16, 15), pack=p) for p in (False, True))
    assert (apart.crossbars, packed.crossbars) == (11, 3)  # 2 x 2 on each
    assert not overlapping(packed) and packed.utilisation == pytest.approx(11 * 49 / (3 * 240))
    assert max(t.row + t.rows for t in packed.tiles) <= 16
    assert max(t.column + t.columns for t in packed.tiles) <= 15


def test_packing_parts_of_many_sizes():
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in torch.randint(1, 40, (60, 2)).tolist()]
    analog = analogfx.analogize(nn.ModuleList(layers), IDENTITY)
    packed = analogfx.tile_map(analog, (32, 24), pack=True)
    assert not overlapping(packed)
    assert packed.crossbars < analogfx.tile_map(analog, (32, 24)).crossbars / 1.5
    assert sorted({t.crossbar for t in packed.tiles}) == list(range(packed.crossbars))


def test_repeated_layers_are_one_row():
    mapped = analogfx.tile_map(analogfx.analogize(Deep(depth=4), IDENTITY), (8, 8))
    lines = str(mapped).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [
        "layers.{0..3}.up",
        "layers.{0..3}.down",
        "head",
    ]
    assert lines[5] == "9 crossbars of 8x8 cells, 25.0% used, 288 devices"


def test_a_tile_larger_than_a_crossbar_is_told():
    assert "set mapping.max_input_size = 8" in str(analogfx.tile_map(analog_linear(4, 9), (8, 8)))
    assert "max_input_size" not in str(analogfx.tile_map(analog_linear(4, 8), (8, 8)))


@pytest.mark.parametrize("inputs", [None, torch.ones(1, 8)])
def test_json_is_what_the_schema_says(inputs, tmp_path):
    mapped = analogfx.tile_map(analogfx.analogize(mlp(), IDENTITY), (8, 8), inputs=inputs)
    mapped.to_json(tmp_path / "map.json")
    record = json.loads((tmp_path / "map.json").read_text())
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(record, schema)
    record["tiles"][0].pop("row")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, schema)
    assert record["totals"]["macs"] == (None if inputs is None else 8 * 12 + 12 * 4)


def test_csv_and_picture(tmp_path):
    mapped = analogfx.tile_map(conv(4), (40, 7))
    mapped.to_csv(tmp_path / "map.csv")
    with (tmp_path / "map.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["rows"], r["columns"], r["outputs"]) for r in rows] == [
        ("36", "6", "0-6"),
        ("36", "6", "6-12"),
    ]
    mapped.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_repeated_layers_have_one_colour_on_the_page(tmp_path):
    mapped = analogfx.tile_map(analogfx.analogize(Deep(depth=4), IDENTITY), (8, 8))
    mapped.to_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page)[1]
    assert re.findall(r"</i>(.*?)</li>", legend) == [
        "layers.{0..3}.up",
        "layers.{0..3}.down",
        "head",
    ]
    assert len(re.findall("<title>layers", page)) == 8  # pointing tells them apart
    assert len(set(re.findall('fill="(.*?)"><title>', page))) == 3


def test_two_columns_of_a_large_crossbar_can_be_seen(tmp_path):
    analogfx.tile_map(analog_linear(2, 300), (512, 512)).to_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    (wide,) = re.findall(r'width="([\d.]+)" height="[\d.]+" fill=', page)
    assert float(wide) == 1.5


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"crossbar": (0, 8)}, "crossbar"),
        ({"crossbar": 512}, "crossbar"),
        ({"slices": 0}, "slices"),
        ({"fill": "full"}, "fill"),
        ({"grouping": "none"}, "grouping"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        analogfx.tile_map(analog_linear(2, 2), **arguments)


def test_a_digital_model_is_refused():
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.tile_map(nn.Linear(2, 2))


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Linear(4096, 4096)
    assert analogfx.tile_map(analogfx.analogize(model, IDENTITY)).crossbars == 64
