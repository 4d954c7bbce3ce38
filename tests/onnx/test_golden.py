"""Golden vectors, and the reader of docs/examples that checks itself against them."""

import importlib.util
from pathlib import Path

import onnx_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from analogfx import export_onnx
from analogfx.errors import OnnxError

READER = Path(__file__).parents[2] / "docs" / "examples" / "golden.py"
_found = importlib.util.spec_from_file_location("golden", READER)
reader = importlib.util.module_from_spec(_found)
_found.loader.exec_module(reader)


def config(**fields):
    return cases.config(
        **{
            "forward__inp_res": 254,
            "forward__out_res": 254,
            "forward__out_bound": 3,
            "modifier__quantization_type": "DiscretizePerChannel",
            "modifier__res": 14,
            "mapping__max_input_size": 40,
            "mapping__max_output_size": 5,
        }
        | fields
    )


class Both(nn.Module):
    """Convolutions (plain, in groups, cut into tiles), and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, (3, 1), groups=2, dilation=(2, 1), padding=(2, 0))
        self.cut = nn.Conv2d(4, 8, 4, bias=False)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.cut(self.grouped(self.first(x))).mean((2, 3))
        return self.head(self.head(x).relu())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    x = torch.randn(2, 3, 12, 12)
    analog = cases.analog(Both, config(), x)
    path = tmp_path_factory.mktemp("golden") / "m.onnx"
    export_onnx(analog, (x,), path, golden=3, verify=False)
    return analog, x, path


def beside(path):
    return path.with_name(f"{path.name}.golden.safetensors")


def test_the_reader_finds_every_code(exported):
    _, _, path = exported
    held = load_file(beside(path))
    labels = {name.split("/")[1] for name in held if name.startswith("site/")}
    assert labels == {"first", "grouped", "cut", "head", "head@2"}
    assert reader.check(path) == sum(held[f"site/{label}/adc"].numel() for label in labels)
    assert max(int(held[f"site/{label}/adc"].max()) for label in labels) == 127  # clamped


def test_calls_are_the_example_and_its_rolls(exported):
    analog, x, path = exported
    held = load_file(beside(path))
    for n in range(3):
        assert torch.equal(held["input/x"][n], x.roll(n, -1))
        assert torch.equal(held["output/output"][n], analog(x.roll(n, -1)))


@pytest.mark.parametrize("key", ["dac", "adc", "y"])
def test_the_reader_sees_a_wrong_value(exported, key, tmp_path):
    _, _, path = exported
    (tmp_path / "m.onnx").write_bytes(path.read_bytes())
    held = load_file(beside(path))
    held[f"site/cut/{key}"].view(-1)[7] += 1
    with reader.safe_open(beside(path), "np") as given:
        save_file(held, beside(tmp_path / "m.onnx"), given.metadata())
    with pytest.raises(AssertionError, match="cut"):
        reader.check(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "fields",
    [
        {"modifier__quantization_type": "Discretize", "modifier__res": 254},
        {"pre_post__input_range__dynamic": True},
        {"clip__type": "LearnablePerChannel", "forward__inp_res": 1 / 62},
    ],
)
def test_other_configs(fields, tmp_path):
    x = torch.randn(3, 64)
    analog = cases.analog(lambda: nn.Linear(64, 8), config(**fields), x)
    export_onnx(analog, (x,), tmp_path / "m", golden=2, verify=False)
    assert reader.check(tmp_path / "m") == 2 * 2 * 3 * 8


def test_sites_of_floats_have_no_codes(tmp_path):
    x = torch.randn(3, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "m", golden=1, verify=False)
    assert {n.rpartition("/")[2] for n in load_file(beside(tmp_path / "m")) if "site" in n} == {
        "x", "y",
    }  # fmt: skip


def test_requests_that_cannot_be_met(tmp_path):
    x = torch.randn(3, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    for given, message in (
        ({"golden": -1}, "golden = -1: expected a number of calls"),
        ({"golden": True}, "golden = True: expected an int"),
        ({"golden": 1, "noise": True}, "without noise"),
    ):
        with pytest.raises(OnnxError, match=message):
            export_onnx(analog, (x,), tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())
