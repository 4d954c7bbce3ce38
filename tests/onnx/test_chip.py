"""Files that are written inside of a chip: the weights as read, and the factors for their drift."""

import numpy as np
import onnx
import pytest
import torch
from samples import Routed
from torch import nn

import analogfx
from analogfx import chip
from analogfx.errors import OnnxError
from analogfx.onnx.runtimes import load
from analogfx.onnx.verify import _Inexact, distance

export_onnx = analogfx.export_onnx


def config(**mapping):
    made = analogfx.TorchInferenceRPUConfig(
        forward=analogfx.IOParameters(inp_res=254, out_res=254, out_bound=10),
        mapping=analogfx.MappingParameter(**mapping),
    )
    made.pre_post.input_range.enable = True
    made.modifier.quantization_type, made.modifier.res = "DISCRETIZE_PER_CHANNEL", 14
    return made


MODELS = {
    "linear": (lambda: nn.Linear(24, 12), (4, 24), {"max_input_size": 7, "max_output_size": 5}),
    "image": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), {}),
    "patches": (lambda: nn.Conv1d(8, 6, 3, groups=2), (2, 8, 5), {"max_input_size": 5}),
    "experts": (Routed, (9, 12), {"max_input_size": 7}),
    "recurrent": (lambda: nn.LSTM(6, 5), (3, 2, 6), {}),
}


def made(name, compensation=None):
    make, shape, mapping = MODELS[name]
    torch.manual_seed(0)
    analog = analogfx.analogize(make(), config(**mapping)).eval()
    noise = chip.PCMLikeNoiseModel()
    compensation = compensation or chip.PerColumnDriftCompensation()
    return analog, torch.randn(shape), analogfx.program(analog, noise, compensation)


def compare(file, analog, x):
    with torch.no_grad():
        expected = analog(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert distance(load(file)([x])[0], expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_the_chip_does(name, tmp_path):
    analog, x, device = made(name)
    file = tmp_path / "m.onnx"
    with device.at(1e7, read=0):
        export_onnx(analog, (x,), file, dynamic_shapes=False)
        compare(file, analog, x)
        with torch.no_grad():
            exact = analog._analog.sites[0].weight(analog).flatten(1)
    read = device.weights(1e7)
    written = sorted(analogfx.load_onnx_sites(file).sites, key=lambda site: site.name)
    key = next(iter(read))
    mine = [site.weight() for site in written if site.name.partition(".")[0] == key]
    weights = np.concatenate([w.reshape(len(w), -1) for w in mine])
    found = torch.from_numpy(weights)
    assert torch.equal(found, read[key]) and not torch.equal(found, exact)
    assert all((s.array("gain") > 1.2).all() for s in written)  # after 115 days
    assert all("weight_scale" not in s.tensors for s in written)


@pytest.mark.parametrize("level", ["explicit", "standard", "qdq"])
@pytest.mark.parametrize("name", ["linear", "image"])
@pytest.mark.filterwarnings('ignore:level="qdq", but no site .* a chip holds no codes:UserWarning')
def test_every_level_has_the_factors_behind_the_adc(name, level, tmp_path):
    analog, x, device = made(name)
    file = tmp_path / "m.onnx"
    with device.at(1e7, read=0):
        export_onnx(analog, (x,), file, level=level)
        compare(file, analog, x)


def test_without_compensation_a_file_has_no_factors(tmp_path):
    analog, x, _ = made("linear")
    device = analogfx.program(analog, chip.PCMLikeNoiseModel())
    with device.at(60.0):
        export_onnx(analog, (x,), tmp_path / "m.onnx")
    (function,) = [f for f in onnx.load(tmp_path / "m.onnx").functions if f.name == "AnalogLinear"]
    assert "gain" not in function.input


def test_the_exact_model_is_written_outside(tmp_path):
    analog, x, device = made("linear")
    with device.at(60.0):
        pass
    export_onnx(analog, (x,), tmp_path / "m.onnx")
    compare(tmp_path / "m.onnx", analog, x)


def test_rounding_is_measured_on_the_chip():
    analog, x, device = made("linear", chip.GlobalDriftCompensation())
    with device.at(60.0, read=0), torch.no_grad():
        expected = analog(x)
        with _Inexact(0):
            assert 0 < distance(analog(x), expected) < 0.1


def test_noise_that_a_file_cannot_have_is_refused(tmp_path):
    analog, x, device = made("linear")
    with device.at(60.0, read_noise="product"), pytest.raises(OnnxError, match="products draw"):
        export_onnx(analog, (x,), tmp_path / "m.onnx")
    with device.at(60.0), pytest.raises(OnnxError, match=r"noise=True inside of device\.at"):
        export_onnx(analog, (x,), tmp_path / "m.onnx", noise=True)
    assert not list(tmp_path.iterdir())
