import importlib.util
import json

import pytest
import torch

import analogfx
from analogfx import cli, demo

SETTINGS = demo.Settings(epochs=1, draws=2, strengths=(0.0, 0.1), times=(1.0, 86400.0))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The folder and the summary of ``analogfx demo --quick``."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert cli.main(["demo", "--out", str(out), "--quick"]) == 0
    return out, json.loads((out / demo.SUMMARY).read_text())


def test_hardware_aware_training_beats_direct_mapping(quick_run):
    _, summary = quick_run
    strongest = summary["noise"][-1]
    assert summary["digital"] > 0.9
    assert strongest["hardware_aware"]["mean"] > strongest["mapped"]["mean"] + 0.02


def test_summary_holds_what_reproduces_it(quick_run):
    _, summary = quick_run
    assert summary["settings"]["seed"] == 0
    assert summary["images"] == {"train": 1257, "test": 540}
    assert summary["versions"].keys() >= {"analogfx", "torch", "scikit-learn", "python"}
    config = analogfx.TorchInferenceRPUConfig.from_dict(summary["config"])
    assert config.forward.inp_res == 254
    rows = summary["noise"]
    assert [row["std_dev"] for row in rows] == summary["settings"]["strengths"]
    assert [row["first_seed"] for row in rows] == [0, 5, 10, 15, 20]
    assert rows[0]["mapped"]["std"] == 0


def test_a_trained_and_compensated_model_outlives_a_mapped_one(quick_run):
    _, summary = quick_run
    rows = summary["lifetime"]
    assert [row["seconds"] for row in rows] == summary["settings"]["times"]
    first, last = rows[0], rows[-1]
    best = last["hardware_aware_compensated"]
    assert best["mean"] > first["hardware_aware_compensated"]["mean"] - 0.02
    assert best["mean"] > last["mapped"]["mean"] + 0.05
    assert last["mapped_compensated"]["mean"] > last["mapped"]["mean"]
    for row in rows:
        for arm in row.keys() - {"seconds"}:
            assert 0 <= row[arm]["low"] <= row[arm]["mean"] <= row[arm]["high"] <= 1


def test_the_table_shows_the_lifetime(quick_run):
    _, summary = quick_run
    mean = summary["lifetime"][-1]["hardware_aware_compensated"]["mean"]
    line = next(line for line in demo.table(summary).splitlines() if line.startswith("  10 y"))
    assert line.split("±")[3].split()[-1] == f"{100 * mean:.1f}"


@pytest.mark.parametrize("name", [demo.FIGURE, demo.LIFETIME])
def test_figures_are_pictures(quick_run, name):
    out, _ = quick_run
    assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_placement_is_the_report(quick_run):
    out, _ = quick_run
    text = (out / demo.PLACEMENT).read_text()
    assert "conv1" in text and "classifier" in text and "100.0%" in text


def test_checkpoint_gives_the_hardware_aware_model_back(quick_run):
    out, summary = quick_run
    loaded = analogfx.load(demo.build_model(), out / demo.CHECKPOINT).eval()
    _, test = demo.load_digits(demo.Settings())
    assert demo.accuracy(loaded, test) == summary["noise"][0]["hardware_aware"]["mean"]


def test_onnx_file_is_as_accurate_as_the_model(quick_run):
    out, summary = quick_run
    _, test = demo.load_digits(demo.Settings())
    eager = summary["noise"][0]["hardware_aware"]["mean"]
    assert summary["deployed"] == {"eager": eager, "onnx": eager}
    assert demo.onnx_accuracy(out / demo.ONNX, test) == eager
    sites = analogfx.load_onnx_sites(out / demo.ONNX).sites
    assert [site.name for site in sites] == ["conv1", "conv2", "conv3", "classifier"]
    wrong = test._replace(labels=(test.labels + 1) % 10)
    assert demo.onnx_accuracy(out / demo.ONNX, wrong) < 0.1


def test_second_run_replaces_the_first_and_equals_it(tmp_path):
    first = demo.run(tmp_path, SETTINGS)
    second = demo.run(tmp_path, SETTINGS)
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_progress_is_shown_on_stderr(tmp_path, capsys):
    demo.run(tmp_path, SETTINGS)
    captured = capsys.readouterr()
    stages = ["digital training", "goes on", "hardware-aware training", "programming noise"]
    stages.append("chips over time")
    assert all(stage in captured.err for stage in stages)
    assert captured.out == ""


def test_split_is_stratified_and_complete():
    train, test = demo.load_digits(demo.Settings())
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.shape[1:] == (1, 8, 8) and train.images.dtype == torch.float32
    assert train.images.min() == 0 and train.images.max() == 1
    shares = [part.labels.bincount() / len(part.labels) for part in (train, test)]
    assert torch.allclose(*shares, atol=0.002)


def test_settling_sets_ranges_and_no_weight():
    settings = demo.Settings(batch_size=256)
    train, _ = demo.load_digits(settings)
    model = demo.build_model()
    analog = analogfx.analogize(model, demo.hardware(settings, batches=5))
    demo.settle_ranges(analog, train, settings)
    for name, parameter in model.named_parameters():
        assert torch.equal(analog.get_parameter(name), parameter)
    for layer in (analog.conv1, analog.conv3, analog.classifier):
        assert (layer.input_range != 3.0).all()
        assert (layer.input_range_update_idx == 5).all()
    assert not analog.training


@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_unwritable_folder_is_refused(tmp_path, below, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / below)]) == 2
    assert capsys.readouterr().err.startswith("analogfx: error: cannot write to ")


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("onnxruntime", "onnxruntime")]
)
def test_missing_extras_are_named(module, package, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else found(name)
    )
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f'analogfx: error: the demo needs {package}: pip install "analogfx[demo]"\n'
