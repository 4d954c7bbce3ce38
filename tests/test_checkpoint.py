import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from samples import COARSE, CONFIGS, EVERYTHING, IDENTITY, TILES, merged, mlp
from torch import nn

import analogfx
from analogfx import checkpoint
from analogfx.errors import CheckpointError
from analogfx.modules.analog_module import AnalogModule

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = {"first": merged(EVERYTHING, TILES), "second": CONFIGS["fast"]}


def trained(config=MIXED, seed=0):
    analog = analogfx.analogize(mlp(seed), config)
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.01)
    for _ in range(2):
        analog(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    return analog


@pytest.fixture
def folder(tmp_path):
    analogfx.save(trained(), tmp_path / "model")
    return tmp_path / "model"


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def tensor_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("config", [MIXED, IDENTITY, EVERYTHING], ids=["mixed", "identity", "all"])
def test_a_round_trip_gives_the_model_back(tmp_path, config, inplace):
    analog = trained(config)
    analogfx.save(analog, tmp_path)
    digital = mlp(seed=9)
    loaded = analogfx.load(digital, tmp_path, inplace=inplace)
    assert (loaded is digital) is inplace
    torch.testing.assert_close(loaded.state_dict(), analog.state_dict(), rtol=0, atol=0)
    assert str(analogfx.report(loaded)) == str(analogfx.report(analog))
    x = torch.randn(3, 8)
    for training in (True, False):
        outputs = []
        for model in (analog, loaded):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x))
        assert torch.equal(*outputs)


def test_every_sites_own_config_is_loaded(folder):
    loaded = analogfx.load(mlp(), folder)
    expected = analogfx.analogize(mlp(), MIXED)
    for name in ("first", "second"):
        config = getattr(loaded, name)._analog.config
        assert config.to_dict() == getattr(expected, name)._analog.config.to_dict()


def test_layers_that_were_digital_stay_digital(tmp_path):
    analogfx.save(trained({"second": EVERYTHING}), tmp_path)
    loaded = analogfx.load(mlp(), tmp_path)
    assert not isinstance(loaded.first, AnalogModule) and isinstance(loaded.second, AnalogModule)


def test_quantized_weights_stay_quantized(tmp_path):
    analog = analogfx.analogize(mlp(), CONFIGS["discrete"]).eval()
    analogfx.quantize_weights(analog)
    analogfx.save(analog, tmp_path)
    loaded = analogfx.load(mlp().eval(), tmp_path)
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), analog(x))


def tied_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    analog = analogfx.analogize(tied_model(), EVERYTHING)
    analogfx.save(analog, tmp_path)
    with safe_open(str(tensor_file(tmp_path)), framework="pt") as file:
        names = set(file.keys())
    assert len({"0.weight", "1.weight"} & names) == 1
    loaded = analogfx.load(tied_model(seed=1), tmp_path)
    assert loaded[0].weight is loaded[1].weight
    assert torch.equal(loaded[0].weight, analog[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    analog = analogfx.analogize(mlp().to(dtype), EVERYTHING)
    analogfx.save(analog, tmp_path)
    loaded = analogfx.load(mlp(seed=2).to(dtype), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), analog.state_dict(), rtol=0, atol=0)


def test_the_given_model_keeps_its_modes_and_frozen_parameters(folder):
    digital = mlp(seed=3).eval()
    digital.first.weight.requires_grad_(False)
    before = copy.deepcopy(digital.state_dict())
    loaded = analogfx.load(digital, folder)
    assert not loaded.training and not loaded.first.weight.requires_grad
    torch.testing.assert_close(digital.state_dict(), before, rtol=0, atol=0)


# ----------------------------------------------------------------------------------- the files


def test_the_folder_holds_json_and_safetensors_and_no_pickle(folder):
    names = files(folder)
    assert len(names) == 2 and names[0] == "analogfx.json"
    assert names[1].startswith("model-") and names[1].endswith(".safetensors")
    record = json.loads((folder / "analogfx.json").read_text())
    assert record["schema"] == 1 and record["modules"] == {"first": 0, "second": 1}
    assert record["tensors"]["file"] == names[1]
    header = tensor_file(folder).read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert "first.weight" in json.loads(header[8 : 8 + size])


def test_nothing_is_unpickled(folder, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    analogfx.load(mlp(), folder)


def test_saving_again_replaces_the_files(folder):
    old = files(folder)
    analogfx.save(trained(seed=1), folder)
    new = files(folder)
    assert len(new) == 2 and new != old
    analogfx.save(analogfx.load(mlp(), folder), folder)
    assert files(folder) == new  # the same tensors


def test_other_files_in_the_folder_are_left_alone(folder):
    (folder / "model.safetensors").write_text("somebody else's")
    analogfx.save(trained(seed=1), folder)
    assert (folder / "model.safetensors").read_text() == "somebody else's"


@pytest.mark.parametrize("survivors", [0, 1])
def test_an_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch, survivors):
    expected = analogfx.load(mlp(), folder).state_dict()
    moves = []

    def replace(source, target):
        if len(moves) == survivors:
            raise KeyboardInterrupt
        moves.append(target)
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        analogfx.save(trained(seed=1), folder)
    loaded = analogfx.load(mlp(), folder)
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)
    assert not [name for name in files(folder) if name.startswith(".")]


# ------------------------------------------------------------------------------------- damage


def edit(folder, change):
    record = json.loads((folder / "analogfx.json").read_text())
    change(record)
    (folder / "analogfx.json").write_text(json.dumps(record))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def rewrite(folder, change):
    """Other tensors under a checksum of their own."""
    from safetensors.torch import load_file, save_file

    path = tensor_file(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda r: r["tensors"].update(sha256=checkpoint._sha256(path)))


def range_of(config):
    return config["pre_post"]["input_range"]


DAMAGE = {
    "truncated tensors": (lambda f: os.truncate(tensor_file(f), 100), "checksum"),
    "empty tensors": (lambda f: os.truncate(tensor_file(f), 0), "checksum"),
    "a flipped bit": (lambda f: flip_a_bit(tensor_file(f)), "checksum"),
    "no tensors": (lambda f: tensor_file(f).unlink(), "no model-"),
    "no record": (lambda f: (f / "analogfx.json").unlink(), r"no analogfx.json; expected a folder"),
    "broken JSON": (lambda f: os.truncate(f / "analogfx.json", 50), "is damaged"),
    "binary JSON": (lambda f: (f / "analogfx.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "a JSON list": (lambda f: (f / "analogfx.json").write_text("[]"), "is damaged"),
    "another schema": (
        lambda f: edit(f, lambda r: r.update(schema=99)), "has schema 99; this version reads 1"),
    "no schema": (lambda f: edit(f, lambda r: r.pop("schema")), "is damaged"),
    "no checksum": (lambda f: edit(f, lambda r: r["tensors"].pop("sha256")), "is damaged"),
    "a path": (
        lambda f: edit(f, lambda r: r["tensors"].update(file="../model-00000000.safetensors")),
        "is damaged"),
    "no modules": (lambda f: edit(f, lambda r: r.pop("modules")), "is damaged"),
    "modules in a list": (lambda f: edit(f, lambda r: r.update(modules=["first"])), "is damaged"),
    "a config too few": (lambda f: edit(f, lambda r: r["configs"].pop()), "is damaged"),
    "an unknown field": (
        lambda f: edit(f, lambda r: r["configs"][0]["forward"].update(inp_ress=1)), "inp_ress"),
    "a wrong type": (
        lambda f: edit(f, lambda r: r["configs"][0]["forward"].update(inp_res="many")), "inp_res"),
    "a config that cannot run": (
        lambda f: edit(f, lambda r: range_of(r["configs"][0]).update(enable=False)),
        "forward.inp_res"),
    "not safetensors": (lambda f: (
        tensor_file(f).write_bytes(b"nonsense" * 9),
        edit(f, lambda r: r["tensors"].update(sha256=checkpoint._sha256(tensor_file(f)))),
    ), "is damaged"),
    "an unknown module": (
        lambda f: edit(f, lambda r: r["modules"].update(third=0)),
        "made for a model with the module 'third'"),
    "a tensor too few": (lambda f: rewrite(f, lambda t: t.pop("first.bias")), "lacks 'first.bias'"),
    "a range too few": (
        lambda f: rewrite(f, lambda t: t.pop("first.input_range")), "lacks 'first.input_range'"),
    "a tensor too many": (
        lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(1))), "has unknown 'extra'"),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({"second.bias": torch.ones(5)})),
        r"'second.bias' is \[5\] there and \[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_the_model_is_as_it_was(folder, name, inplace):
    damage, message = DAMAGE[name]
    damage(folder)
    model = mlp(seed=7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        analogfx.load(model, folder, inplace=inplace)
    assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 12)


OTHERS = {
    "other names": (Renamed, "made for a model with the module 'first'"),
    "other sizes": (lambda: mlp(hidden=10), r"is \[12(, 8)?\] there and \[10(, 8)?\]"),
    "another kind": (
        lambda: nn.ModuleDict({"first": nn.Conv2d(1, 1, 1), "second": nn.Linear(12, 4)}),
        "is .* there"),
    "no weights": (
        lambda: nn.ModuleDict({"first": nn.ReLU(), "second": nn.Linear(12, 4)}), "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_and_is_as_it_was(folder, name, inplace):
    make, message = OTHERS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        analogfx.load(model, folder, inplace=inplace)
    assert not any(isinstance(m, AnalogModule) for m in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["nothing", "a file", "a foreign folder"])
def test_what_is_no_checkpoint_says_what_was_expected(tmp_path, what):
    path = tmp_path / "there"
    if what == "a file":
        path.write_text("hello")
    elif what == "a foreign folder":
        path.mkdir()
        (path / "model.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match=r"expected a folder that analogfx\.save\(\) wrote"):
        analogfx.load(mlp(), path)


def test_an_analog_model_is_no_model_to_load_into(folder):
    with pytest.raises(analogfx.errors.CaptureError, match="analog already"):
        analogfx.load(analogfx.analogize(mlp(), MIXED), folder)


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    model = mlp()
    analog = analogfx.analogize(model, COARSE)
    analogfx.save(torch.compile(nn.DataParallel(analog)), tmp_path)
    again = analogfx.load(mlp(seed=1), tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(analog.parameters(), again.parameters(), strict=True)
    )
