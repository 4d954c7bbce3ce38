import contextlib
import functools
import json
import math
import operator
import random
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx_cases as cases
import pytest
import torch
from onnx import TensorProto
from torch import nn

from analogfx import export_onnx, load_onnx_sites
from analogfx.errors import OnnxError
from analogfx.modules.sites import sites


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["lsq"], x)
    path = tmp_path_factory.mktemp("read") / "model.onnx"
    export_onnx(analog, (x,), path, opset=21)
    return analog, path


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    x = torch.randn(2, 64)
    analog = cases.analog(lambda: nn.Linear(64, 64), cases.CONFIGS["afm"], x)
    path = tmp_path_factory.mktemp("external") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analogfx.onnx.storage._INLINE_LIMIT", 1 << 10)
        export_onnx(analog, (x,), path)
    return path


def weights_of(path):
    """The file beside a model that holds its weights."""
    (data,) = (p for p in path.parent.iterdir() if cases.DATA.fullmatch(p.name))
    return data


def changed(path, out, change):
    """A copy of a model, with the record or the model changed."""
    model = onnx.load(path, load_external_data=False)
    (entry,) = [e for e in model.metadata_props if e.key == "ai.analogfx"]
    record = json.loads(entry.value)
    change(record, model)
    entry.value = json.dumps(record)
    out.write_bytes(model.SerializeToString())
    return out


def test_sites_come_back_as_they_were(exported):
    analog, path = exported
    found = load_onnx_sites(path)
    assert found.level == "fused"
    for site, (name, module, own) in zip(found.sites, sites(analog), strict=True):
        assert site.name == name
        assert site.weight_shape == tuple(module.weight.shape)
        assert site.tile_grid == (len(own.in_sizes), len(own.out_sizes))
        assert site.config == module._analog.config
        np.testing.assert_array_equal(site.array("input_range"), module.input_range.detach())
        held = torch.cat(
            [
                torch.ops.analogfx.clip_weight(tile, clip, 14.0)
                for tile, clip in zip(
                    module.weight.split(own.in_sizes, 1), module.learnable_weight_clip, strict=True
                )
            ],
            dim=1,
        )
        np.testing.assert_array_equal(site.weight(), held.detach())
        codes = site.codes().astype(np.int8)
        assert np.abs(codes).max() == 7
        assert site.weight_type == "int4"
    with pytest.raises(OnnxError, match="0 has no clip: it has weight, weight_scale"):
        found.sites[0].array("clip")


SCHEMA = Path(__file__).parents[2] / "docs" / "onnx" / "sites.schema.json"


def test_the_record_is_as_its_schema_says(exported):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    record = json.loads(load_onnx_sites(exported[1]).to_json())
    jsonschema.validate(record, schema)
    del record["sites"][0]["tiles"][1]["inputs"]
    with pytest.raises(jsonschema.ValidationError, match="'inputs' is a required property"):
        jsonschema.validate(record, schema)


def test_a_tile_has_what_programs_it(exported, tmp_path):
    analog, path = exported
    site = load_onnx_sites(path).sites[0]
    tiles = [[site.tile(row, column) for row in range(2)] for column in range(1)]
    whole = np.concatenate([np.concatenate([t.codes for t in rows], 1) for rows in tiles])
    np.testing.assert_array_equal(whole, site.codes())
    for tile in tiles[0]:
        np.testing.assert_array_equal(tile.weight, tile.codes * tile.scales[:, None])
        assert tile.input_range == float(analog[0].input_range[tile.row].detach())
        np.testing.assert_array_equal(tile.bias, analog[0].bias.detach())
        assert tile.bounds is None and tile.code_scale is None  # it has no ADC
    with pytest.raises(OnnxError, match=r"0 has no tile \(2, 0\): its grid is 2x1"):
        site.tile(2, 0)


def test_a_tile_has_the_bounds_of_its_adc(tmp_path):
    config = cases.config(
        forward__inp_res=254, forward__out_res=254, forward__out_bound=10, modifier__res=14,
        modifier__quantization_type="Discretize", mapping__max_input_size=7,
        mapping__max_output_size=5,
    )  # fmt: skip
    x = torch.randn(4, 12)
    analog = cases.analog(lambda: nn.Linear(12, 9), config, x)
    export_onnx(analog, (x,), tmp_path / "m", verify=False)
    (site,) = load_onnx_sites(tmp_path / "m").sites
    tile = site.tile(1, 1)
    assert (tile.inputs, tile.outputs) == ((6, 12), (5, 9))
    held, r = analog.weight.detach()[5:, 6:], analog.input_range.detach()[1]
    np.testing.assert_array_equal(tile.bounds, np.full(4, (r * 10 * held.abs().max()).numpy()))
    states = 2 * held.abs().max() / 14
    np.testing.assert_array_equal(tile.codes, (held / states).round().numpy())
    np.testing.assert_allclose(tile.code_scale, np.full(4, 2 * 254 / (254 * 14 * 10)), rtol=1e-7)


def test_constants_bear_their_module_s_name(exported):
    names = {t.name for t in onnx.load(exported[1]).graph.initializer}
    assert {"0.input_range", "0.analog_weight", "0.weight_scale", "0.bias"} <= names
    assert all("." in name for name in names)
    grids = [n.doc_string for n in onnx.load(exported[1]).graph.node if n.domain]
    assert grids[0] == "2 x 1 tiles of 6 inputs x 9 outputs at most"


def test_the_table_lists_every_site(exported):
    text = str(load_onnx_sites(exported[1]))
    assert "0     AnalogLinear  9x12    int4  2x1    static  62   -    -" in text
    assert text.endswith("2 sites on 4 tiles, level fused, analogfx 0.1.0")


def test_flipped_bits_give_a_file_or_an_error(exported, tmp_path):
    whole = bytearray(exported[1].read_bytes())
    draw, path, refused = random.Random(0), tmp_path / "flipped.onnx", 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 8))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.1:
            damaged = damaged[: draw.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            use(path)
        except OnnxError:
            refused += 1
    assert refused > 100  # most of the bytes are the record, and most of its bytes matter


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no analog sites"),
        (b"\x08", "no ONNX model"),
        (b"PK\x03\x04 zip", "no ONNX model"),
    ],
)
def test_foreign_files(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match=message):
        load_onnx_sites(path)
    with pytest.raises(OnnxError, match="cannot be read"):
        load_onnx_sites(tmp_path)


def attribute(model, name, value):
    """Give the first site's node another attribute."""
    node = next(n for n in model.graph.node if n.domain)
    (held,) = [a for a in node.attribute if a.name == name]
    held.f = value


def retyped(model, name, kind):
    """Give a tensor another type, and as many elements of it."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    dims = list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, kind
    tensor.dims.extend(dims)
    if kind == TensorProto.STRING:
        tensor.string_data.extend([b"x"] * math.prod(dims))
    else:
        tensor.raw_data = bytes(math.prod(dims))


def use(path):
    """All that a reader may ask of a file."""
    found = load_onnx_sites(path)
    for site in found.sites:
        site.weight(), site.codes(), site.tile_grid, repr(site)
        for name in site.tensors:
            site.array(name)
    return str(found)


def places(node, path=()):
    """Every place in nested lists and dicts."""
    yield path
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield from places(node[key], (*path, key))


ODD = [None, "x", "\x1b[2J", -1, 0, 10**9, 2**70, 1.5, float("nan"), True, [], {}, [[1]]]


def test_a_record_with_any_odd_value_is_read_or_refused(exported, tmp_path):
    model = onnx.load(exported[1])
    (entry,) = [e for e in model.metadata_props if e.key == "ai.analogfx"]
    whole, path, refused = entry.value, tmp_path / "odd.onnx", 0
    for place in places(json.loads(whole)):
        for value in ODD if place else ():
            record = json.loads(whole)
            *outer, last = place
            functools.reduce(operator.getitem, outer, record)[last] = value
            entry.value = json.dumps(record)
            path.write_bytes(model.SerializeToString())
            try:
                said = use(path)
            except OnnxError as error:
                said, refused = str(error), refused + 1
            assert "\x1b" not in said
    assert refused > 1000


def test_a_name_cannot_command_a_terminal(exported, tmp_path):
    def rename(record, model):
        record["sites"][0]["name"] = name = "\x1b[2Jä"
        for entry in (e for n in model.graph.node for e in n.metadata_props):
            entry.value = name if entry.value == "0" else entry.value

    text = str(load_onnx_sites(changed(exported[1], tmp_path / "model.onnx", rename)))
    assert "\x1b" not in text and r"\x1b[2Jä" in text


def test_the_table_counts_integer_sites(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["int8"], x)
    export_onnx(analog, (x,), tmp_path / "m", level="qdq")
    found = load_onnx_sites(tmp_path / "m")
    assert all(site.integer for site in found.sites)
    assert str(found).endswith("2 of 2 sites multiply integers")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r, m: r.update(schema=1),
            "has schema 1; this version reads 2: export the model anew",
        ),
        (lambda r, m: r.update(level="secret"), "level is 'secret'"),
        (lambda r, m: r.update(sites=7), "is damaged"),
        (lambda r, m: r["configs"][0]["forward"].update(inp=1), "is damaged: forward.inp"),
        (lambda r, m: r["sites"][0]["initializers"].pop("weight"), "is damaged: 'weight'"),
        (
            lambda r, m: r["sites"][0]["spec"].update(in_sizes=[5, 6]),
            "tiles is no map of the 2 tiles",
        ),
        (lambda r, m: r["sites"][0].update(op="Gemm"), "op is 'Gemm', not one of"),
        (lambda r, m: r["sites"][0].update(weight_shape=[9, 13]), "do not cover its weight"),
        (lambda r, m: r["sites"][0].update(op="AnalogConv"), "0 is a 'AnalogConv'"),
        (lambda r, m: r["sites"][0]["spec"].update(inp_res="x"), "inp_res is 'x', not a number"),
        (lambda r, m: r["sites"][0]["spec"].update(range_mode=None), "range_mode is None"),
        (lambda r, m: r["sites"][0]["spec"].update(in_sizes=[18, -6]), "in_sizes is -6"),
        (lambda r, m: r["sites"][0]["spec"].pop("groups"), "spec has"),
        (lambda r, m: r["sites"][0]["tiles"][0].update(inputs=[0, 10**9]), "tiles is no map"),
        (lambda r, m: r["sites"][0].update(nodes=["absent"]), "0 has no node absent"),
        (lambda r, m: r["sites"][0].update(nodes=["2"]), r"node 2 belongs to \['2'\], not to 0"),
        (lambda r, m: r["sites"].append(r["sites"][0]), "two sites have the same name"),
        (lambda r, m: r.update(sites=100 * r["sites"]), "200 sites in a graph of"),
        (lambda r, m: r["modules"].update({"0": 1}), "index out of range"),
        (lambda r, m: attribute(m, "inp_res", 3.0), "has inp_res 3.0, its record 62.0"),
        (lambda r, m: retyped(m, "0.analog_weight", TensorProto.BOOL), "is bool, not int8 or int4"),
        (lambda r, m: retyped(m, "0.weight_scale", TensorProto.STRING), "is string, not float"),
        (
            lambda r, m: r["sites"][0]["initializers"].update(bias="0.weight_scale"),
            r"bias of 0 is \(2, 9\), not \(9,\)",
        ),
    ],
)
def test_records_that_do_not_fit_the_file(change, message, exported, tmp_path):
    path = changed(exported[1], tmp_path / "model.onnx", change)
    with pytest.raises(OnnxError, match=message):
        load_onnx_sites(path)


def relocate(location, **entries):
    def change(record, model):
        (tensor,) = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        known = {e.key: e.value for e in tensor.external_data} | {"location": location, **entries}
        del tensor.external_data[:]
        for key, value in known.items():
            tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("../model.onnx.data", {}, "outside of the folder"),
        ("/etc/hostname", {}, "outside of the folder"),
        ("link.data", {}, "no plain file"),
        ("folder/model.onnx.data", {}, "outside of the folder"),
        ("absent.data", {}, "no plain file"),
        ("model.onnx.data", {"length": "99999999"}, "its file says 99999999 bytes"),
        ("model.onnx.data", {"offset": "-8"}, "its file says"),
        ("model.onnx.data", {"offset": "16384"}, "its file says"),
        ("model.onnx.data", {"offset": "x"}, "invalid literal"),
    ],
)
def test_weights_stay_in_the_folder(location, entries, message, external, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    for folder in (inside, tmp_path):
        shutil.copy(weights_of(external), folder / "model.onnx.data")
    (inside / "link.data").symlink_to(tmp_path / "model.onnx.data")
    (inside / "folder").symlink_to(tmp_path)
    path = changed(external, inside / "model.onnx", relocate(location, **entries))
    with pytest.raises(OnnxError, match=message):
        load_onnx_sites(path)


def test_flipped_bits_of_a_file_with_weights_beside_it(external, tmp_path):
    shutil.copy(weights_of(external), tmp_path)
    whole, draw, path = external.read_bytes(), random.Random(0), tmp_path / "flipped.onnx"
    at = whole.index(b"location")  # there, and in what follows it
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[at + draw.randrange(-40, 120)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(OnnxError):
            use(path)


def test_weights_beside_the_file_are_read_when_asked_for(external):
    (site,) = load_onnx_sites(external).sites
    assert site.weight().shape == (64, 64)
    weights_of(external).write_bytes(b"short")
    with pytest.raises(OnnxError, match="cannot be read"):
        site.weight()
