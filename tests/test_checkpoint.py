import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from samples import COARSE, CONFIGS, EVERYTHING, IDENTITY, TILES, merged, mlp
from torch import nn

import analogfx
from analogfx import checkpoint, recipes
from analogfx import files as files_module
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
    assert record["schema"] == 2 and record["modules"] == {"first": 0, "second": 1}
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
    expected = analogfx.load(mlp(), folder)
    analogfx.save(expected, folder)
    assert len(files(folder)) == 2
    again = analogfx.load(mlp(), folder)
    torch.testing.assert_close(again.state_dict(), expected.state_dict(), rtol=0, atol=0)


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


TWO_SAVERS = """
import sys, torch, analogfx
from samples import EVERYTHING, mlp
for turn in range(int(sys.argv[2])):
    analog = analogfx.analogize(mlp(0), EVERYTHING)
    with torch.no_grad():
        for value in analog.parameters():
            value.fill_(float(sys.argv[3]))
    analogfx.save(analog, sys.argv[1])
"""


def test_two_that_save_at_once_leave_one_of_both_whole(tmp_path):
    command = [sys.executable, "-c", TWO_SAVERS, str(tmp_path), "8"]
    surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    savers = [subprocess.Popen([*command, value], env=surroundings) for value in ("1", "2")]
    seen = set()
    while any(saver.poll() is None for saver in savers):
        if (tmp_path / "analogfx.json").exists():  # and from then on there is always one
            values = [p.unique().tolist() for p in analogfx.load(mlp(), tmp_path).parameters()]
            assert values in ([[1.0]] * len(values), [[2.0]] * len(values))
            seen.add(values[0][0])
    assert [saver.returncode for saver in savers] == [0, 0] and seen
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("moves", [1, 2])
def test_a_saver_between_the_steps_of_another_takes_nothing_from_it(folder, monkeypatch, moves):
    """The other one saves after the first or the second move of ours."""
    done = []

    def replace(source, target):
        os.rename(source, target)
        done.append(target)
        if len(done) == moves:
            monkeypatch.undo()
            analogfx.save(other, folder)

    ours, other = trained(seed=1), trained(seed=2)
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    analogfx.save(ours, folder)
    last = ours if moves == 1 else other
    loaded = analogfx.load(mlp(), folder)
    torch.testing.assert_close(loaded.state_dict(), last.state_dict(), rtol=0, atol=0)
    assert len(files(folder)) == 2


def test_a_reader_takes_the_new_checkpoint_where_the_old_one_goes_under_its_eyes(
    folder, monkeypatch
):
    read = files_module.read_whole
    new = trained(seed=1)

    def slow(path, limit):
        data = read(path, limit)
        if path.name == "analogfx.json":
            monkeypatch.undo()
            analogfx.save(new, folder)
        return data

    monkeypatch.setattr(files_module, "read_whole", slow)
    loaded = analogfx.load(mlp(), folder)
    torch.testing.assert_close(loaded.state_dict(), new.state_dict(), rtol=0, atol=0)


def test_every_file_is_read_once(folder, monkeypatch):
    opened = []
    real = os.open

    def counted(path, *args, **kwargs):
        if Path(str(path)).parent == folder:
            opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", counted)
    analogfx.load(mlp(), folder)
    assert sorted(opened) == files(folder)


KILLED = """
import os, signal, sys, analogfx
from analogfx import checkpoint
from samples import EVERYTHING, mlp
moves = []
real = os.replace
def replace(source, target):
    if len(moves) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    moves.append(target)
    real(source, target)
checkpoint.os.replace = replace
analogfx.save(analogfx.analogize(mlp(3), EVERYTHING), sys.argv[1])
"""


@pytest.mark.parametrize("moves", ["0", "1"])
def test_what_a_killed_saver_left_goes_with_the_next_save(folder, moves):
    expected = analogfx.load(mlp(), folder)
    surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILLED, str(folder), moves]
    assert subprocess.run(command, env=surroundings).returncode == -9
    assert len(files(folder)) == 3 + int(moves)  # a scratch folder; tensors in it or beside it
    loaded = analogfx.load(mlp(), folder)
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    analogfx.save(loaded, folder)
    assert len(files(folder)) == 2
    assert not [name for name in files(folder) if name.startswith(".")]


def test_everything_is_on_the_disk_before_the_record_is_replaced(folder, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        fsync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def replaced(source, target):
        replace(source, target)
        events.append(f"-> {Path(target).name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    analogfx.save(trained(seed=1), folder)
    assert events == [
        "model.safetensors",
        "analogfx.json",
        f"-> {tensor_file(folder).name}",
        folder.name,
        "-> analogfx.json",
        folder.name,
    ]


# ---------------------------------------------------------------------------- shared memory, names


class Shared(nn.Module):
    """Parameters and buffers that share memory in all ways but that of being one object."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = nn.Parameter(self.embedding.weight.detach())
        both = torch.randn(8, 4)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.up.weight, self.down.weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])
        self.turned = nn.Linear(4, 4)
        self.turned.weight = nn.Parameter(torch.randn(4, 4).t())
        self.register_buffer("expanded", torch.randn(1).expand(5))
        self.register_buffer("part", both[1:3, 1:3])
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, tokens):
        return self.head(self.turned(self.down(self.up(self.embedding(tokens)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_tensors_that_share_memory_are_loaded_again(tmp_path, inplace):
    analog = analogfx.analogize(Shared(), COARSE, inplace=True)
    expected = {name: value.clone() for name, value in analog.state_dict().items()}
    analogfx.save(analog, tmp_path)
    loaded = analogfx.load(Shared(seed=1), tmp_path, inplace=inplace)
    torch.testing.assert_close(dict(loaded.state_dict()), expected, rtol=0, atol=0)
    tokens = torch.tensor([0, 3, 5])
    assert torch.equal(loaded.eval()(tokens), analog.eval()(tokens))


def test_two_tensors_are_not_loaded_into_one(tmp_path):
    model = tied_model()
    model[1].weight = nn.Parameter(torch.randn(5, 6))
    analogfx.save(analogfx.analogize(model, COARSE), tmp_path)
    with pytest.raises(CheckpointError, match=r"'0.weight' and '1.weight' differ there"):
        analogfx.load(tied_model(), tmp_path)


def on_meta():
    return analogfx.analogize(mlp().to("meta"), COARSE)


def sparse():
    model = mlp()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    return analogfx.analogize(model, COARSE)


def doubly_complex():
    model = mlp()
    model.register_buffer("phases", torch.ones(3, dtype=torch.complex128))
    return analogfx.analogize(model, COARSE)


class Talkative(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.first(x)


UNSAVABLE = {
    "on meta": (on_meta, "'first.weight' is on the meta device"),
    "sparse": (sparse, "'mask' is a tensor of layout torch.sparse_coo"),
    "complex128": (doubly_complex, "'phases' is of dtype torch.complex128"),
    "no tensor": (lambda: analogfx.analogize(Talkative(), COARSE), "'_extra_state' is a dict"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_no_file_can_hold_is_refused_by_name(folder, name):
    make, message = UNSAVABLE[name]
    before = files(folder)
    with pytest.raises(CheckpointError, match=message):
        analogfx.save(make(), folder)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("saved", "given"),
    [(torch.int8, torch.float32), (torch.complex64, torch.float32), (torch.float32, torch.int64)],
    ids=str,
)
def test_no_other_kind_of_number_is_cast(tmp_path, saved, given):
    def make(dtype):
        model = mlp()
        model.register_buffer("extra", torch.ones(3, dtype=dtype))
        return model

    analogfx.save(analogfx.analogize(make(saved), COARSE), tmp_path)
    model = make(given)
    with pytest.raises(CheckpointError, match=f"'extra' is {saved} there and {given} in"):
        analogfx.load(model, tmp_path, inplace=True)
    assert not isinstance(model.first, AnalogModule)


def test_a_model_of_another_precision_is_loaded(tmp_path):
    analog = trained(EVERYTHING)
    analogfx.save(analog, tmp_path)
    loaded = analogfx.load(mlp().to(torch.bfloat16), tmp_path)
    assert torch.equal(loaded.first.weight, analog.first.weight.to(torch.bfloat16))
    assert torch.equal(loaded.first.input_range, analog.first.input_range)  # single precision


def test_wrappers_inside_a_model_leave_no_name(tmp_path):
    analog = analogfx.analogize(mlp(), MIXED)
    expected = list(analog.state_dict())
    analog.first = torch.compile(analog.first)
    analog.second = nn.DataParallel(analog.second)
    analogfx.save(analog, tmp_path)
    with safe_open(str(tensor_file(tmp_path)), framework="pt") as file:
        assert set(file.keys()) == set(expected)
    assert json.loads((tmp_path / "analogfx.json").read_text())["modules"].keys() == MIXED.keys()
    loaded = analogfx.load(mlp(seed=1), tmp_path)
    assert list(loaded.state_dict()) == expected
    assert torch.equal(loaded.second.weight, analog.second.module.weight)


class Versioned(nn.Module):
    _version = 2

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.loaded_as = None

    def forward(self, x):
        return self.first(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.loaded_as = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_are_told_the_version_of_what_they_load(tmp_path, monkeypatch):
    analogfx.save(analogfx.analogize(Versioned(), COARSE), tmp_path)
    monkeypatch.setattr(Versioned, "_version", 3)
    assert analogfx.load(Versioned(), tmp_path).loaded_as == 2


def test_a_model_without_analog_layers_is_saved_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="has no analog layer"):
        analogfx.save(mlp(), tmp_path)
    with pytest.warns(UserWarning, match="no layer of the checkpoint is analog"):
        loaded = analogfx.load(mlp(seed=1), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), mlp().state_dict(), rtol=0, atol=0)


def test_the_digital_state_dict_is_that_of_the_digital_model():
    analog = trained()
    weights = analogfx.digital_state_dict(torch.compile(nn.DataParallel(analog)))
    digital = mlp(seed=5)
    assert list(weights) == list(digital.state_dict())
    digital.load_state_dict(weights)  # strict
    x = torch.randn(3, 8)
    assert torch.equal(digital(x), analogfx.to_digital(analog)(x))
    assert weights["first.weight"].data_ptr() == analog.first.weight.data_ptr()


# ------------------------------------------------------------------------------------- damage


def edit(folder, change):
    """Another record under a checksum of its own."""
    record = json.loads((folder / "analogfx.json").read_text())
    del record["sha256"]
    change(record)
    (folder / "analogfx.json").write_bytes(files_module.sealed(record))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def entry_of(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rewrite(folder, change):
    """Other tensors under a checksum of their own."""
    from safetensors.torch import load_file, save_file

    path = tensor_file(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda r: r["tensors"].update(entry_of(path)))


def range_of(config):
    return config["pre_post"]["input_range"]


DAMAGE = {
    "truncated tensors": (lambda f: os.truncate(tensor_file(f), 100), "checksum"),
    "empty tensors": (lambda f: os.truncate(tensor_file(f), 0), "checksum"),
    "a longer file of tensors": (
        lambda f: tensor_file(f).write_bytes(tensor_file(f).read_bytes() + b" "),
        "expected at most"),
    "a flipped bit": (lambda f: flip_a_bit(tensor_file(f)), "checksum"),
    "no tensors": (lambda f: tensor_file(f).unlink(), "no model-"),
    "no record": (lambda f: (f / "analogfx.json").unlink(), r"no analogfx.json; expected a folder"),
    "broken JSON": (lambda f: os.truncate(f / "analogfx.json", 50), "is damaged"),
    "binary JSON": (lambda f: (f / "analogfx.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "a JSON list": (lambda f: (f / "analogfx.json").write_text("[]"), "is damaged"),
    "another schema": (
        lambda f: edit(f, lambda r: r.update(schema=99)),
        "has schema 99; this version reads 1 and 2"),
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
        edit(f, lambda r: r["tensors"].update(entry_of(tensor_file(f)))),
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


def test_a_block_in_an_activation_checkpoint_is_saved_as_itself(tmp_path):
    wrapping = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    digital = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    analog = analogfx.analogize(digital, {"pre_post": {"input_range": {"enable": True}}})
    kept = {name: value.clone() for name, value in analog.state_dict().items()}
    analog[1] = wrapping.checkpoint_wrapper(analog[1])
    analogfx.save(analog, tmp_path)
    loaded = analogfx.load(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), kept, rtol=0, atol=0)


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    model = mlp()
    analog = analogfx.analogize(model, COARSE)
    analogfx.save(torch.compile(nn.DataParallel(analog)), tmp_path)
    again = analogfx.load(mlp(seed=1), tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(analog.parameters(), again.parameters(), strict=True)
    )


# ----------------------------------------------------------------------- sources not to be trusted


def test_any_flipped_bit_of_the_record_is_found(tmp_path):
    torch.manual_seed(0)
    analogfx.save(analogfx.analogize(nn.Sequential(nn.Linear(2, 2)), recipes.afm()), tmp_path)
    text = (tmp_path / "analogfx.json").read_bytes()
    silent = []
    for position in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            try:
                checkpoint._checked(tmp_path, flipped)
                silent.append((position, bit))
            except CheckpointError:
                pass
    assert silent == []
    checkpoint._checked(tmp_path, bytearray(text))


RECORDS = {
    "5,000 digits": (b'{"schema": ' + b"2" * 5000 + b"}", "a number has 5000 characters"),
    "an infinite number": (b'{"schema": 1e999}', "1e999 is no number"),
    "no number": (b'{"schema": NaN}', "NaN is no number"),
    "lists in lists": (b'{"schema":' + b"[" * 1_000_000, "nested more than 12 deep"),
    "objects in objects": (b'{"schema":' * 1_000_000, "nested more than 12 deep"),
    "nothing": (b"", "is damaged"),
    "no checksum": (b'{"schema": 2}', "its checksum does not match"),
    "a schema that is true": (b'{"schema": true}', "has schema True"),
    "a schema of 10 MB": (b'{"schema": "' + b"x" * 10_000_000 + b'"}', "has schema 'xxx"),
    "40 MB": (b" " * 40_000_000, "expected at most 33554432"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_refused_by_a_short_message(folder, name):
    text, message = RECORDS[name]
    (folder / "analogfx.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        analogfx.load(mlp(), folder)
    assert len(str(caught.value)) < 1000 + len(str(folder))


@pytest.mark.parametrize("number", [-1, 2, 1.0, True, "0", None])
def test_a_module_has_the_number_of_a_config(folder, number):
    edit(folder, lambda r: r["modules"].update(first=number))
    with pytest.raises(CheckpointError, match="is damaged"):
        analogfx.load(mlp(), folder)


@pytest.mark.parametrize("which", ["analogfx.json", "tensors"])
def test_a_fifo_is_not_waited_for(folder, which):
    path = folder / which if which == "analogfx.json" else tensor_file(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="it is no regular file"):
        analogfx.load(mlp(), folder)


def test_a_device_is_not_read(folder):
    (folder / "analogfx.json").unlink()
    (folder / "analogfx.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        analogfx.load(mlp(), folder)


def test_the_systems_reason_is_told(folder, monkeypatch):
    (folder / "analogfx.json").unlink()
    (folder / "analogfx.json").mkdir()
    with pytest.raises(CheckpointError, match=r"analogfx\.json cannot be read: Is a directory"):
        analogfx.load(mlp(), folder)

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files_module, "read_whole", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        analogfx.load(mlp(), folder)


def test_a_folder_that_cannot_be_written_is_told_and_as_it_was(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        analogfx.save(trained(), tmp_path / "file")

    def full(*args):
        raise OSError(28, "No space left on device")

    before = files(folder)
    monkeypatch.setattr(checkpoint.files, "write_synced", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        analogfx.save(trained(seed=1), folder)
    assert files(folder) == before


def test_an_interrupt_while_tensors_are_copied_leaves_no_analog_layer(folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    model = mlp()
    monkeypatch.setattr(checkpoint, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analogfx.load(model, folder, inplace=True)
    assert not any(isinstance(m, AnalogModule) for m in model.modules())


# ---------------------------------------------------------------------------------------- schema 1


@pytest.fixture
def old_folder(tmp_path):
    """What version 1 of the layout was: safetensors' own ``save_model``, a record without ties."""
    from safetensors.torch import save_model

    analog = analogfx.analogize(tied_model(), EVERYTHING)
    tensors = tmp_path / "model-01234567.safetensors"
    save_model(analog, str(tensors), metadata={"format": "pt"})
    record = {
        "schema": 1,
        "tensors": {"file": tensors.name, "sha256": entry_of(tensors)["sha256"]},
        "configs": [analog[1]._analog.config.to_dict()],
        "modules": {"1": 0},
    }
    (tmp_path / "analogfx.json").write_text(json.dumps(record, indent=2) + "\n")
    return tmp_path, analog


def test_schema_1_is_read(old_folder):
    folder, analog = old_folder
    loaded = analogfx.load(tied_model(seed=1), folder)
    torch.testing.assert_close(loaded.state_dict(), analog.state_dict(), rtol=0, atol=0)
    assert loaded[0].weight is loaded[1].weight


def test_schema_1_is_replaced_by_the_next_save(old_folder):
    folder, analog = old_folder
    analogfx.save(analog, folder)
    assert len(files(folder)) == 2 and "model-01234567.safetensors" not in files(folder)


def test_an_average_is_saved_as_the_model_inside(tmp_path):
    digital = nn.Linear(4, 3)
    analog = analogfx.analogize(digital, {"pre_post": {"input_range": {"enable": True}}})
    average = torch.optim.swa_utils.AveragedModel(analog)
    average.update_parameters(analog)
    analogfx.save(average, tmp_path)
    loaded = analogfx.load(nn.Linear(4, 3), tmp_path)
    assert torch.equal(loaded.weight, digital.weight)
