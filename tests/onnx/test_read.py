import json
import random
import shutil

import numpy as np
import onnx
import onnx_cases as cases
import pytest
import torch
from onnx import TensorProto
from torch import nn

from analogfx import export_onnx, load_onnx_sites
from analogfx.errors import OnnxError
from analogfx.module import sites as analog_sites


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
    for site, (name, module, own) in zip(found.sites, analog_sites(analog), strict=True):
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
            for site in load_onnx_sites(path).sites:
                site.weight()
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, m: r.update(schema=2), "has schema 2; this version reads 1"),
        (lambda r, m: r.update(level="secret"), "level is 'secret'"),
        (lambda r, m: r.update(sites=7), "is damaged"),
        (lambda r, m: r["configs"][0]["forward"].update(inp=1), "is damaged: forward.inp"),
        (lambda r, m: r["sites"][0]["initializers"].pop("weight"), "is damaged: 'weight'"),
        (lambda r, m: r["sites"][0]["spec"].update(in_sizes=[5, 6]), "do not cover its weight"),
        (lambda r, m: r["sites"][0].update(op="Gemm"), "0 is a 'Gemm'"),
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


def test_weights_beside_the_file_are_read_when_asked_for(external):
    (site,) = load_onnx_sites(external).sites
    assert site.weight().shape == (64, 64)
    weights_of(external).write_bytes(b"short")
    with pytest.raises(OnnxError, match="cannot be read"):
        site.weight()
