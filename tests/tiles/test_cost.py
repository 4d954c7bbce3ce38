import csv
import dataclasses
import json

import pytest
import torch
from samples import IDENTITY
from torch import nn

import analogfx
from analogfx import hardware
from analogfx.errors import ConfigError
from analogfx.hardware import Hardware

# Round numbers, so that every expected value below can be followed by hand.
CHIP = Hardware(
    "round", 8, 4, phases=2, read_energy_pj=10.0, cell_energy_pj=0.5, dac_energy_pj=1.0,
    adc_energy_pj=3.0, digital_op_energy_pj=0.25, byte_energy_pj=2.0, input_bytes=1.0,
    output_bytes=4.0, read_time_ns=5.0, adc_time_ns=2.0, adcs_per_crossbar=2,
    crossbar_area_mm2=0.5,
)  # fmt: skip


def linear(outputs, inputs):
    return analogfx.analogize(nn.Linear(inputs, outputs, bias=False), IDENTITY)


def of_linear(chip=CHIP, rows=3, **options):
    """6 outputs of 12 inputs: parts of 6 x 3, two along the inputs and two along the outputs."""
    mapped = analogfx.tile_map(linear(6, 12), (8, 4), inputs=torch.ones(rows, 12), **options)
    return analogfx.cost(mapped, chip)


def test_energy_by_hand():
    # 3 vectors, 2 phases: 6 reads of each of 4 parts of 6 rows, 3 columns, 18 cells
    found = of_linear()
    assert found.energy_pj == {
        "array": 6 * 4 * (10.0 + 18 * 0.5),  # 456
        "DAC": 6 * 4 * 6 * 1.0,  # 144
        "ADC": 6 * 4 * 3 * 3.0,  # 216
        "additions": (6 * 12 - 3 * 6) * 0.25,  # 72 results of ADCs make 18 outputs: 13.5
        "data": 3 * (4 * 6 * 1.0 + 4 * 3 * 4.0) * 2.0,  # 432
    }
    assert found.total_pj == found.known_pj == 456 + 144 + 216 + 13.5 + 432
    assert found.macs == 3 * 72 and found.tops_per_watt == 432 / 1261.5
    assert found.digital_pj == pytest.approx(216 * 0.3)


def test_time_by_hand():
    # A read takes 5 ns, ceil(3 / 2) conversions take 4 ns and overlap with the next read.
    found = of_linear()
    assert found.latency_ns == 5 + 4 + 5 * 5
    assert found.interval_ns == 6 * 5 and found.tops == pytest.approx(432 / 30 / 1e3)
    assert found.area_mm2 == 4 * 0.5
    slow = of_linear(dataclasses.replace(CHIP, adc_time_ns=7.0))  # conversions are in the way
    assert slow.latency_ns == 5 + 14 + 5 * 14 and slow.interval_ns == 6 * 14
    turns = of_linear(dataclasses.replace(CHIP, parallel_crossbars=3))  # 4 crossbars: two rounds
    assert turns.latency_ns == 5 + 4 + 11 * 5 and turns.interval_ns == 4 * 30 / 3


def test_slices_and_shared_crossbars_by_hand():
    found = of_linear(slices=3)
    assert found.energy_pj["additions"] == (6 * 36 - 18) * 0.25
    assert found.energy_pj["data"] == 3 * (12 * 6 * 1.0 + 4 * 3 * 4.0) * 2.0
    mapped = analogfx.tile_map(linear(2, 16), (8, 4), inputs=torch.ones(1, 16), pack=True)
    assert mapped.crossbars == 1  # two parts of 8 x 2, read in turns
    packed = analogfx.cost(mapped, CHIP)
    assert packed.latency_ns == 5 + 2 + 3 * 5 and packed.interval_ns == 4 * 5


def test_sites_add_up_and_the_busiest_decides():
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(16, 2))
    analog = analogfx.analogize(model, IDENTITY)
    found = analogfx.cost(analogfx.tile_map(analog, (8, 4), inputs=torch.ones(1, 1, 3, 3)), CHIP)
    conv, head = found.sites
    assert conv.busy_ns == found.interval_ns == 4 * 2 * 5  # four positions
    assert found.latency_ns == conv.time_ns + head.time_ns == (5 + 4 + 7 * 5) + (5 + 2 + 5)
    assert found.total_pj == conv.total_pj + head.total_pj


@pytest.mark.parametrize(
    ("unknown", "absent"),
    [
        ("read_energy_pj", {"array"}),
        ("dac_energy_pj", {"DAC"}),
        ("adc_energy_pj", {"ADC"}),
        ("digital_op_energy_pj", {"additions"}),
        ("byte_energy_pj", {"data"}),
    ],
)
def test_what_is_not_known_is_absent_and_not_zero(unknown, absent):
    found = of_linear(dataclasses.replace(CHIP, **{unknown: None}))
    assert {cause for cause, value in found.energy_pj.items() if value is None} == absent
    assert found.total_pj is found.tops_per_watt is found.power_w is None
    full = of_linear()
    (cause,) = absent
    assert found.known_pj == pytest.approx(full.total_pj - full.energy_pj[cause])
    assert f"not known: the energy of {cause}" in str(found)


def test_times_that_are_not_known_are_absent():
    found = of_linear(dataclasses.replace(CHIP, adcs_per_crossbar=None))
    assert found.latency_ns is found.interval_ns is found.tops is None and found.total_pj
    found = of_linear(dataclasses.replace(CHIP, adcs_per_crossbar=None, adc_time_ns=0.0))
    assert found.latency_ns == 6 * 5
    assert of_linear(dataclasses.replace(CHIP, crossbar_area_mm2=None)).area_mm2 is None


def test_a_map_without_inputs_knows_the_area_alone():
    found = analogfx.cost(analogfx.tile_map(linear(6, 12), (8, 4)), CHIP)
    assert found.total_pj is found.latency_ns is found.digital_pj is None and found.area_mm2 == 2


def test_another_size_is_refused():
    with pytest.raises(
        ConfigError, match=r"\(512, 512\): expected \(8, 4\), the crossbar of round"
    ):
        analogfx.cost(analogfx.tile_map(linear(6, 12)), CHIP)


def test_what_is_no_map_and_no_hardware_is_refused():
    mapped = analogfx.tile_map(linear(6, 12), (8, 4))
    with pytest.raises(TypeError, match="expected a Hardware, found 'isaac'"):
        analogfx.cost(mapped, "isaac")
    with pytest.raises(TypeError, match="expected a TileMap, found Linear"):
        analogfx.cost(nn.Linear(2, 2), CHIP)


@pytest.mark.parametrize(
    ("name", "value"),
    [("read_energy_pj", -1.0), ("adc_time_ns", float("nan")), ("phases", 0), ("input_bytes", True)],
)
def test_a_description_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"Hardware 'round': {name} = "):
        dataclasses.replace(CHIP, **{name: value})


@pytest.mark.parametrize("preset", hardware.PRESETS.values(), ids=lambda p: p.name)
def test_every_number_of_a_preset_has_its_source(preset):
    given = {
        item.name
        for item in dataclasses.fields(preset)
        if getattr(preset, item.name) != item.default and item.name not in ("name", "sources")
    }
    assert given - {"parallel_crossbars"} <= set(preset.sources)


def isaac_tile():
    """128 inputs and 1536 outputs of 16 bits: what one tile of 96 crossbars holds."""
    mapped = analogfx.tile_map(
        linear(1536, 128), (128, 128), differential=False, slices=8, inputs=torch.ones(1, 128)
    )
    return analogfx.cost(mapped, hardware.ISAAC)


def test_isaacs_tile():
    found = isaac_tile()
    assert found.crossbars == 96 and found.interval_ns == 1600.0
    watts = {cause: pj / found.interval_ns * 1e-3 for cause, pj in found.energy_pj.items()}
    assert watts["ADC"] == pytest.approx(12 * 16e-3)  # Table I, milliwatts
    assert watts["DAC"] == pytest.approx(12 * 4e-3)
    assert watts["array"] == pytest.approx(12 * 2.4e-3)
    assert found.power_w == pytest.approx(0.330, rel=0.005)  # the published tile
    assert found.area_mm2 == pytest.approx(0.372)
    # Published for the chip: 168 tiles, 65.8 W and 85.4 mm2 with its links, 479 GOPS/mm2.
    assert 168 * found.tops * 1e3 / 85.4 == pytest.approx(479, rel=0.01)
    assert 168 * found.power_w == pytest.approx(55.4, rel=0.005)


def test_hermes_full_core():
    mapped = analogfx.tile_map(linear(256, 256), (256, 256), inputs=torch.ones(1, 256))
    one = analogfx.cost(mapped, hardware.HERMES_ONE_PHASE)
    assert one.total_pj is None  # data movement is not published
    assert 2 * one.macs / one.known_pj == pytest.approx(9.76)
    assert 64 * one.tops == pytest.approx(63.1)
    four = analogfx.cost(mapped, hardware.HERMES_FOUR_PHASE)
    assert 2 * four.macs / four.known_pj == pytest.approx(2.48)
    assert 64 * four.tops == pytest.approx(16.1)


def test_files(tmp_path):
    found = of_linear(dataclasses.replace(CHIP, byte_energy_pj=None))
    found.to_json(tmp_path / "cost.json")
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["totals"]["total_pj"] is None and record["totals"]["energy_pj"]["DAC"] == 144
    assert record["hardware"]["adcs_per_crossbar"] == 2
    found.to_csv(tmp_path / "cost.csv")
    with (tmp_path / "cost.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["site"], row["ADC_pj"], row["data_pj"]) == ("weight", "216.0", "")
