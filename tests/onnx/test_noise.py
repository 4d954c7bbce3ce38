"""Files with ``noise=True``: as strong, as normal and as independent as the config says.

The same statistics are asked of the model's own training noise, which they must describe, too.
Bounds are five standard errors of each statistic.
"""

import math

import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
import samples
import torch
from torch import nn

from analogfx import analogize, export_onnx
from analogfx.errors import OnnxError
from analogfx.onnx import operators
from analogfx.onnx.export import _seeds
from analogfx.onnx.noise import without_draws

RUNS = 200


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def draws(path, x, runs=RUNS):
    """Outputs of one session that runs again and again, (runs, ...)."""
    opened = session(onnx.load(path))
    feed = {opened.get_inputs()[0].name: x.numpy()}
    return np.stack([opened.run(None, feed)[0] for _ in range(runs)])


@torch.no_grad()
def of_eager(analog, x, runs=RUNS):
    analog.train()
    made = np.stack([analog(x).numpy() for _ in range(runs)])
    analog.eval()
    return made


def assert_standard_normal(z):
    """Draws (runs, positions): every position standard normal, and independent of the others."""
    runs, positions = z.shape
    n = z.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert np.abs(z.mean(0)).max() < 5 / math.sqrt(runs)
    # A variance of few runs is skewed to the right, hence six.
    assert np.abs(z.var(0) - 1).max() < 6 * math.sqrt(2 / runs)
    together = np.corrcoef(z.T)[np.triu_indices(positions, 1)]
    assert np.abs(together).max() < 5.5 / math.sqrt(runs)  # of thousands of pairs
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)  # from run to run


def spread(peaks, site):
    """A number for each row of each tile, (k, O), as the largest of its tile."""
    parts = peaks.split(list(site.out_sizes), dim=1)
    return torch.cat([p.amax(1, keepdim=True).expand_as(p) for p in parts], 1)


def peaks_of(module, site):
    """Largest weight of every row of every tile, (k, O)."""
    tiles = module.weight.detach().flatten(1).split(list(site.in_sizes), dim=1)
    return torch.stack([tile.abs().amax(1) for tile in tiles])


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), torch.eye(12), {}),
    "linear, tiles": (lambda: nn.Linear(12, 7), torch.eye(12), samples.TILES),
    "conv": (lambda: nn.Conv2d(2, 7, (3, 2)), torch.eye(12).reshape(12, 2, 3, 2), {}),
}
"""Makes the layer; an input that shows the weights themselves; its tiles."""


@pytest.mark.parametrize("name", ["weight noise", "weight noise by row"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_noise(layer, name, tmp_path):
    make, x, tiles = LAYERS[layer]
    torch.manual_seed(0)
    analog = analogize(make(), samples.merged(samples.CONFIGS[name], tiles)).eval()
    (site,) = analog._analog.sites
    peaks = peaks_of(analog, site)
    sigma = 0.1 * (peaks if "row" in name else spread(peaks, site))
    sigma = sigma.repeat_interleave(torch.tensor(site.in_sizes), 0).numpy()  # (inputs, outputs)
    exact = analog(x).detach().numpy().reshape(sigma.shape)
    export_onnx(analog, (x,), tmp_path / "model.onnx", noise=True)
    for noisy in (draws(tmp_path / "model.onnx", x), of_eager(analog, x)):
        z = (noisy.reshape(RUNS, *sigma.shape) - exact) / sigma
        assert_standard_normal(z.reshape(RUNS, -1))


@pytest.mark.parametrize("name", ["output noise", "output noise by row"])
@pytest.mark.parametrize("layer", LAYERS)
def test_output_noise(layer, name, tmp_path):
    make, x, tiles = LAYERS[layer]
    torch.manual_seed(0)
    analog = analogize(make(), samples.merged(samples.CONFIGS[name], tiles))
    with torch.no_grad():
        for _ in range(3):  # the batches that set the ranges
            analog.train()(x)
    (site,) = analog.eval()._analog.sites
    peaks = peaks_of(analog, site)
    a = peaks if "row" in name else spread(peaks, site)
    each = 0.05 / math.sqrt(len(a)) * analog.input_range.detach().unsqueeze(1) * a
    sigma = each.square().sum(0).sqrt().numpy()
    exact = analog(x).detach().numpy().reshape(12, 7)
    export_onnx(analog, (x,), tmp_path / "model.onnx", noise=True)
    for noisy in (draws(tmp_path / "model.onnx", x), of_eager(analog, x)):
        z = (noisy.reshape(RUNS, 12, 7) - exact) / sigma
        assert_standard_normal(z.reshape(RUNS, -1))


class TwoOfAKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(6, 4, bias=False) for _ in range(2))

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], -1)


def test_sites_draw_independently(tmp_path):
    x = torch.eye(6)
    analog = analogize(TwoOfAKind(), samples.CONFIGS["weight noise"]).eval()
    export_onnx(analog, (x,), tmp_path / "model.onnx", noise=True)
    z = (draws(tmp_path / "model.onnx", x) - analog(x).detach().numpy()).reshape(RUNS, 6, 2, 4)
    sigma = [0.1 * layer.weight.abs().max().item() for layer in (analog.first, analog.second)]
    assert_standard_normal((z / np.array(sigma)[:, None]).reshape(RUNS, -1))


def test_the_first_draws_of_seeds_are_independent():
    """A runtime's generator may give nearly the same first number for seeds side by side."""
    node = onnx.helper.make_node("RandomNormalLike", ["x"], ["y"], seed=0.0)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    first = []
    for seed in range(RUNS):
        for seeds in _seeds(seed, 2):
            for number in (seeds.weight, seeds.output):
                del model.graph.node[0].attribute[:]
                model.graph.node[0].attribute.append(onnx.helper.make_attribute("seed", number))
                first.append(session(model).run(None, {"x": np.zeros(2, np.float32)})[0])
    assert_standard_normal(np.stack(first).reshape(RUNS, -1))


@pytest.mark.parametrize(
    ("model", "config", "level"),
    [
        ("linear", "everything", "explicit"),
        ("linear", "everything, dynamic", "fused"),
        ("conv2d", "everything", "fused"),
        ("conv2d", "everything", "qdq"),
    ],
)
@pytest.mark.filterwarnings('ignore:level="qdq", but no site')  # noise is drawn in floats
def test_a_file_is_the_noiseless_one_without_its_draws(model, config, level, tmp_path):
    x = cases.example(model)
    tiles = samples.TILES if model == "linear" else {}
    analog = cases.analog(cases.MODELS[model][0], samples.merged(samples.CONFIGS[config], tiles), x)
    outputs = []
    for noise in (False, True):
        path = tmp_path / f"{noise}.onnx"
        # Level qdq keeps integers for noiseless sites; with noise it is what standard is.
        of = "standard" if level == "qdq" and not noise else level
        export_onnx(analog, (x,), path, level=of, noise=noise, verify=False)
        assert (b"RandomNormalLike" in path.read_bytes()) == noise
        opened = session(onnx.load(without_draws(path)))
        outputs.append(opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0])
    np.testing.assert_array_equal(*outputs)


def test_noise_repeats_with_its_seed(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, samples.EVERYTHING, x)
    runs = []
    for name, seed in (("a", 7), ("again", 7), ("other", 8)):
        export_onnx(analog, (x,), tmp_path / name, noise=True, seed=seed)
        runs.append(draws(tmp_path / name, x, runs=2))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not (runs[0] == runs[2]).all()
    assert not (runs[0][0] == runs[0][1]).all()


@pytest.mark.parametrize(("dtype", "states", "opset"), [
    (torch.float32, 14, 21), (torch.bfloat16, 0, 18), (torch.float16, 254, 18),
    (torch.float64, 0, 21),
], ids=str)  # fmt: skip
def test_noise_of_every_kind_of_weight_runs(dtype, states, opset, tmp_path):
    config = cases.config(modifier__noise_type="AddNormal", modifier__std_dev=0.1)
    if states:
        config.modifier.quantization_type, config.modifier.res = "Discretize", states
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, config, x).to(dtype)
    export_onnx(analog, (x.to(dtype),), tmp_path / "m", noise=True, opset=opset)


def test_a_noisy_file_that_disagrees_is_refused(tmp_path, monkeypatch):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, samples.EVERYTHING, x)
    right = operators._step
    monkeypatch.setattr(
        operators, "_step", lambda w, bound, res, dtype: right(w, bound, res / 2, dtype)
    )
    with pytest.raises(OnnxError, match="disagrees with Sequential at 0"):
        export_onnx(analog, (x,), tmp_path / "m", noise=True)


def test_noise_that_cannot_be(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, samples.EVERYTHING, x)
    with pytest.raises(OnnxError, match="opset = 22: with noise=True expected 18 to 21"):
        export_onnx(analog, (x,), tmp_path / "m", noise=True, opset=22)
    analog = cases.analog(cases.mlp, cases.CONFIGS["int8"], x)
    with pytest.warns(UserWarning, match="Sequential has no noise: the file is deterministic"):
        export_onnx(analog, (x,), tmp_path / "m", noise=True)
