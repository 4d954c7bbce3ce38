import argparse
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_cases as cases
import pytest
import torch
import transformers
from safetensors import safe_open

import analogfx
from analogfx import cli
from analogfx.errors import OnnxError
from analogfx.onnx import commands


def call(*arguments):
    parser = argparse.ArgumentParser()
    commands.add(parser.add_subparsers())
    parsed = parser.parse_args([str(a) for a in arguments])
    parsed.run(parsed)


def test_the_shell_command_has_both(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    assert cli.main(["inspect", str(path)]) == 2
    assert "analogfx: error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "--checkpoint" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path):
    analog = cases.analog(cases.mlp, cases.CONFIGS["int4"], torch.randn(4, 12))
    analogfx.save(analog, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_export_and_inspect(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "factory", cases)
    out = tmp_path / "model.onnx"
    call("export", "--model", "factory:mlp", "--checkpoint", checkpoint, "--input", "1,12",
         "--out", out, "--level", "explicit", "--opset", 21)  # fmt: skip
    written = capsys.readouterr().out
    assert "2 sites on 2 tiles, level explicit" in written
    call("inspect", out)
    assert capsys.readouterr().out.strip() in written
    shape = onnx.load(out).graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert shape[1].dim_value == 12


def test_a_transformers_folder_needs_no_factory(tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    analog = analogfx.analogize(transformers.LlamaForCausalLM(config), analogfx.recipes.afm())
    folder = tmp_path / "llama"
    analogfx.save(analog, folder)
    config.save_pretrained(folder)
    call("export", "--checkpoint", folder, "--input", "i:1,6", "--input", "m:1,6",
         "--out", tmp_path / "m.onnx")  # fmt: skip
    assert [i.name for i in onnx.load(tmp_path / "m.onnx").graph.input] == [
        "input_ids",
        "attention_mask",
    ]
    assert "8 sites on 8 tiles" in capsys.readouterr().out


def llama_folder(tmp_path):
    """A checkpoint of a Llama whose converters and weights are quantized, with its config.json."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    analog = analogfx.analogize(model, cases.CONFIGS["int4"])
    analogfx.save(analog, tmp_path / "llama")
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_golden_writes_so_many_calls_that_the_reader_finds(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "factory", cases)
    out = tmp_path / "model.onnx"
    given = ("export", "--model", "factory:mlp", "--checkpoint", checkpoint, "--input", "3,12")
    call(*given, "--out", out, "--golden", 4)
    with safe_open(f"{out}.golden.safetensors", "np") as golden:
        shapes = {name: golden.get_slice(name).get_shape() for name in golden.keys()}  # noqa: SIM118
    assert {shape[0] for shape in shapes.values()} == {4}
    assert next(shape for name, shape in shapes.items() if "input/" in name) == [4, 3, 12]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "examples"))
    import golden as reader

    assert reader.check(str(out)) == 4 * 3 * (9 + 5)
    call(*given, "--out", tmp_path / "plain.onnx")
    assert not list(tmp_path.glob("plain.onnx.golden*"))


def test_a_number_of_golden_calls_that_is_none(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "factory", cases)
    with pytest.raises(OnnxError, match="golden"):
        call("export", "--model", "factory:mlp", "--checkpoint", checkpoint, "--input", "3,12",
             "--out", tmp_path / "m.onnx", "--golden", -1)  # fmt: skip
    assert not list(tmp_path.glob("m.onnx*"))


def test_cache_brings_keys_and_values_in_and_out(tmp_path):
    out = tmp_path / "model.onnx"
    call("export", "--checkpoint", llama_folder(tmp_path), "--input", "i:2,5", "--out", out,
         "--cache", "--opset", 21)  # fmt: skip
    graph = onnx.load(out).graph
    names = ["past_key_values.0.key", "past_key_values.0.value"]
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", *names]
    assert [o.name for o in graph.output] == ["logits", "present.0.key", "present.0.value"]


def test_a_model_without_a_cache_is_told(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "factory", cases)
    with pytest.raises(OnnxError, match="cache"):
        call("export", "--model", "factory:mlp", "--checkpoint", checkpoint, "--input", "1,12",
             "--out", tmp_path / "m.onnx", "--cache")  # fmt: skip


def test_models_that_cannot_be_made(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "factory", cases)
    rest = ("--checkpoint", checkpoint, "--input", "1,12", "--out", tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match="name the model with --model"):
        call("export", *rest)
    with pytest.raises(OnnxError, match="No module named 'absent'"):
        call("export", "--model", "absent:make", *rest)
    with pytest.raises(OnnxError, match=r"returned a TorchInferenceRPUConfig, not an nn\.Module"):
        call("export", "--model", "factory:config", *rest)
    with pytest.raises(OnnxError, match="factory:Case failed: TypeError"):
        call("export", "--model", "factory:Case", *rest)


def test_a_module_in_the_current_folder_is_found(checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5, bias=False))\n"
    )
    subprocess.run(
        [Path(sys.executable).parent / "analogfx", "export", "--model", "mine:make",
         "--checkpoint", checkpoint, "--input", "1,12", "--out", "m.onnx", "--no-verify"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    assert (tmp_path / "m.onnx").is_file()


@pytest.mark.parametrize(("text", "error"), [("def make(:", "SyntaxError"), ("1 / 0", "Zero")])
def test_a_module_that_cannot_be_imported(text, error, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    (tmp_path / f"broken{error}.py").write_text(text)
    with pytest.raises(OnnxError, match=rf"--model broken\w+:make: importing .* failed: {error}"):
        call("export", "--model", f"broken{error}:make", "--checkpoint", checkpoint, "--input",
             "1,12", "--out", tmp_path / "m.onnx")  # fmt: skip
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid JSON"),
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ('{"model_type": "llama", "architectures": ["Nope"]}', "transformers has no 'Nope'"),
        ('{"model_type": "llama"}', "names no architecture"),
    ],
)
def test_transformers_configs_that_are_none(text, message, checkpoint, tmp_path):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(OnnxError, match=rf"config\.json: .*{message}"):
        call("export", "--checkpoint", checkpoint, "--input", "1,6", "--out", tmp_path / "m.onnx")


@pytest.mark.parametrize("shape", ["", "1,x", "0,3", "f:1,3"])
def test_shapes_that_are_none(shape, capsys):
    with pytest.raises(SystemExit):
        call("export", "--checkpoint", "c", "--out", "m", "--input", shape)
    assert "expected sizes such as 1,3,32,32" in capsys.readouterr().err
