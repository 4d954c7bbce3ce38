"""Layers of experts in a file: a site for every expert, run by ONNX Runtime."""

import onnxruntime
import pytest
import torch
from samples import CONFIGS, TILES, Routed, merged

import analogfx
from analogfx import export_onnx, load_onnx_sites

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {"mapping": {"experts": "own"}}


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    (name,) = (place.name for place in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("own", [{}, OWN], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("config", "level"),
    [
        ("DAC and ADC", "fused"),
        ("everything", "fused"),
        ("everything", "qdq"),
        ("dynamic", "fused"),
    ],
)
def test_a_file_computes_what_the_model_does(config, own, level, tmp_path):
    torch.manual_seed(0)
    analog = analogfx.analogize(Routed(), merged(CONFIGS[config], TILES, own))
    for _ in range(3):
        analog(torch.randn(16, 12))
    if hasattr(analog, "learnable_weight_clip"):
        analog.learnable_weight_clip.data *= torch.rand(analog.learnable_weight_clip.shape)
    x = torch.randn(9, 12)
    export_onnx(analog.eval(), (x,), tmp_path / "model.onnx", level=level)
    for rows in (x, torch.randn(4, 12), x[:1].expand(5, 12).contiguous()):
        with torch.no_grad():
            expected = analog(rows)
        found = run(tmp_path / "model.onnx", rows)
        close = (found - expected).abs() < 1e-5 * expected.abs().max()
        assert close.double().mean() > 0.97  # a sum in another order may turn a rounding

    sites = load_onnx_sites(tmp_path / "model.onnx").sites
    assert sorted(s.name for s in sites) == [f"weight.{e}" for e in range(4)]
    assert all(s.weight_shape == (7, 12) for s in sites)
