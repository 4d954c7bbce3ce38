import itertools
import json

import numpy as np
import onnx
import onnx_backend
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from torch import nn

import analogfx
from analogfx import analogize, export_onnx, load_onnx_sites
from analogfx.errors import OnnxError
from analogfx.onnx import operators, verify

LEVELS = ("fused", "explicit", "standard", "qdq")


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    names = [place.name for place in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def op_types(path):
    return {(n.domain, n.op_type) for n in onnx.load(path).graph.node}


# ------------------------------------------------------------------------- agrees with eager


@pytest.mark.parametrize("config", cases.CONFIGS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_a_file_computes_what_the_model_computes(model, config, tmp_path):
    factory, shape = cases.MODELS[model]
    x = torch.randn(shape)
    analog = cases.analog(factory, cases.CONFIGS[config], x)
    level = LEVELS[sum(map(ord, model + config)) % 4]  # every level meets every kind of config
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level=level, opset=(18, 21)[len(config) % 2], verify=False)
    for batch in (x, torch.cat([x, 2 * x, x]), x[:1]):
        assert verify.distance(run(path, batch)[0], analog(batch).detach()) < 0.02


@pytest.mark.parametrize(
    ("config", "level"),
    [
        *itertools.product(["afm", "dynamic", "int4", "int8", "lsq"], ["fused", "qdq"]),
        *itertools.product(["afm"], ["explicit", "standard"]),
    ],
)
def test_outputs_differ_from_eager_at_rounding_ties_alone(config, level, tmp_path):
    x = torch.randn(200, 24)
    analog = cases.analog(lambda: nn.Linear(24, 20), cases.CONFIGS[config], x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level=level, verify=False)
    found = run(path, x)[0].numpy()
    expected = analog(x).detach().numpy()
    (site,) = load_onnx_sites(path).sites
    oracle, distance, step = onnx_backend.linear(site, x.numpy())
    rounding = 1e-5 * np.abs(oracle).max()
    clear = distance > 1e-4  # steps; float32 sums of 24 products are far better than that
    assert clear.mean() > 0.99
    np.testing.assert_allclose(found[clear], oracle[clear], rtol=0, atol=rounding)
    np.testing.assert_allclose(expected[clear], oracle[clear], rtol=0, atol=rounding)
    assert (np.abs(found - expected) <= step + rounding).all()  # at a tie: one step


@pytest.mark.parametrize("level", ["fused", "qdq"])
def test_exact_arithmetic_gives_equal_bits(level, tmp_path):
    # Steps are powers of two, so every product and every sum is exact in float32.
    config = cases.config(
        forward__inp_res=254, modifier__quantization_type="Discretize", modifier__res=14
    )
    x = torch.randn(64, 16)
    analog = analogize(nn.Linear(16, 8, bias=False), config).eval()
    with torch.no_grad():
        analog.input_range.fill_(127 / 64)
        analog.weight.copy_(torch.randint(-7, 8, (8, 16)) / 8)
        analog.weight[0, 0] = 7 / 8
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level=level)
    assert torch.equal(run(path, x)[0], analog(x))


def test_an_integer_convolution_is_off_by_one_step_at_ties_alone(tmp_path):
    config = cases.config(
        forward__inp_res=254, forward__out_res=254, forward__out_bound=8,
        modifier__quantization_type="DiscretizePerChannel", modifier__res=254,
    )  # fmt: skip
    x = torch.randn(2, 6, 12, 12)
    analog = cases.analog(lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), config, x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level="qdq")
    assert ("", "QLinearConv") in op_types(path)
    off = (run(path, x)[0] - analog(x).detach()).abs()
    peak = analog.weight.detach().abs().flatten(1).amax()
    step = 2 * 8 * analog.input_range.item() * peak / 254
    assert (off <= 1.001 * step).all()
    assert (off > 1e-3 * step).float().mean() < 1 / 254


def test_onnx_reference_evaluator_agrees(tmp_path):
    x = torch.randn(3, 12)
    for config in ("afm", "int4"):
        analog = cases.analog(cases.mlp, cases.CONFIGS[config], x)
        path = tmp_path / f"{config}.onnx"
        export_onnx(analog, (x,), path, opset=21)
        second = verify.reference(path)([x])[0]
        assert verify.distance(second, analog(x).detach()) < 1e-6


@pytest.mark.parametrize(
    ("name", "config", "level"),
    [
        ("gpt2", "int4", "fused"),
        ("llama", "afm", "standard"),
        ("vit", "lsq", "qdq"),
        ("resnet", "afm", "explicit"),
    ],
)
def test_transformers_export_with_free_batch_and_sequence(name, config, level, tmp_path):
    x = cases.example(name)
    analog = cases.analog(cases.TRANSFORMERS[name], cases.CONFIGS[config], x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level=level, verify=False)
    longer = cases.example(name, batch=3, length=9)
    with torch.no_grad():
        expected = analog(longer).logits
    assert run(path, longer)[0].shape == expected.shape
    assert verify.distance(run(path, longer)[0], expected) < 0.02
    assert len(load_onnx_sites(path).sites) == sum(
        s.status == "analog" for s in analogfx.report(analog).sites
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    x = torch.randn(3, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["int4"], x).to(dtype)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x.to(dtype),), path)
    found = verify.load(path)([x.to(dtype)])[0]
    # A site rounds once, at its end: the runtimes give the same halves but at ties.
    assert verify.distance(found, analog(x.to(dtype)).detach()) < torch.finfo(dtype).eps


# ----------------------------------------------------------------------------- what it holds


def test_levels_show_the_structure_that_they_name(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["int4"], x)
    found = {}
    for level in LEVELS:
        export_onnx(analog, (x,), tmp_path / level, level=level, verify=False)
        found[level] = {name for domain, name in op_types(tmp_path / level)}
    assert "AnalogLinear" in found["fused"]
    assert {"DAC", "ADC", "MatMul"} <= found["explicit"]
    assert not {"DAC", "ADC", "AnalogLinear"} & found["standard"]
    assert {"QuantizeLinear", "MatMulInteger"} <= found["qdq"]
    assert {domain for domain, _ in op_types(tmp_path / "standard")} == {""}
    assert [d.domain for d in onnx.load(tmp_path / "standard").opset_import] == [""]


def test_nodes_carry_their_module_and_the_metadata_the_tiles(tmp_path):
    x = torch.randn(4, 12)
    config = cases.CONFIGS["dynamic"]
    analog = cases.analog(cases.mlp, config, x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path)
    model = onnx.load(path)
    assert [n.name for n in model.graph.node if n.domain == "ai.analogfx"] == ["0", "2"]
    (text,) = [entry.value for entry in model.metadata_props if entry.key == "ai.analogfx"]
    record = json.loads(text)
    assert record["analogfx"] == analogfx.__version__
    assert record["configs"] == [config.to_dict()]
    tiles = record["sites"][1]["tiles"]
    assert tiles[-1] == {"row": 1, "column": 1, "inputs": [5, 9], "outputs": [3, 5]}


@pytest.mark.parametrize(("config", "opset", "kind"), [
    ("int8", 18, "int8"), ("int4", 18, "int8"), ("int4", 21, "int4"), ("afm", 21, "float"),
])  # fmt: skip
def test_quantized_weights_are_stored_as_codes(config, opset, kind, tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS[config], x)
    export_onnx(analog, (x,), tmp_path / "model.onnx", opset=opset)
    assert {s.weight_type for s in load_onnx_sites(tmp_path / "model.onnx").sites} == {kind}


class Functional(nn.Module):
    """A layer called twice, a parameter read by two products, and one seen through views."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.tied = nn.Parameter(torch.randn(4, 6))
        self.both = nn.Parameter(torch.randn(12, 6))

    def forward(self, x):
        h = self.layer(self.layer(x))
        first, second = self.both.chunk(2)
        y = nn.functional.linear(h, self.tied) @ self.tied
        return y + torch.einsum("bi,oi->bo", h, first) + h @ second


def test_every_product_of_a_module_finds_its_own_weight(tmp_path):
    x = torch.randn(3, 6)
    analog = cases.analog(Functional, cases.CONFIGS["int4"], x)
    export_onnx(analog, (x,), tmp_path / "model.onnx", level="explicit")
    sites = {s.name: s for s in load_onnx_sites(tmp_path / "model.onnx").sites}
    assert list(sites) == ["layer", "tied.0", "tied.1", "both.0", "both.1"]
    assert sites["layer"].nodes == ("layer", "layer@2")
    assert sites["tied.0"].weight_shape == (4, 6)
    assert sites["tied.1"].weight_shape == (6, 4)


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("analogfx.onnx.export._INLINE_LIMIT", 1 << 10)
    x = torch.randn(3, 64)
    analog = cases.analog(lambda: nn.Linear(64, 64), cases.CONFIGS["afm"], x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert verify.distance(run(path, x)[0], analog(x).detach()) < 0.02
    (site,) = load_onnx_sites(path).sites
    np.testing.assert_array_equal(site.weight(), analog.weight.detach().numpy())


def test_noise_is_drawn_in_every_run_and_as_strong_as_in_training(tmp_path):
    config = cases.config(
        modifier__noise_type="AddNormalPerChannel", modifier__std_dev=0.1, forward__out_noise=0.2
    )
    x = torch.randn(4000, 12).clamp(-1, 1)
    analog = cases.analog(lambda: nn.Linear(12, 3), config, x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, noise=True, seed=7)
    exact, noisy = analog(x).detach(), run(path, x)[0]
    assert torch.equal(noisy, run(path, x)[0])  # a fresh session starts from the seed
    weight = analog.weight.detach()
    of_output = 0.2 * analog.input_range.item() * weight.abs().max()
    of_weight = 0.1 * weight.abs().amax(1) * x.square().sum(1).mean().sqrt()
    # The weight noise is one draw for all rows: its part is known to a factor of about two.
    assert (noisy - exact).std(0).min() > 0.95 * of_output
    assert ((noisy - exact).std(0) < (of_output**2 + 4 * of_weight**2).sqrt()).all()
    export_onnx(analog, (x,), path, noise=True, seed=8)
    assert not torch.equal(noisy, run(path, x)[0])


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["lsq"], x).train()
    analog[1].eval()
    before = {k: v.clone() for k, v in analog.state_dict().items()}
    export_onnx(analog, (x,), tmp_path / "model.onnx")
    assert [m.training for m in analog] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in analog.state_dict().items())


# ---------------------------------------------------------------------------------- refusals


def test_a_file_that_disagrees_is_refused_and_the_old_one_stays(tmp_path, monkeypatch):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    path = tmp_path / "model.onnx"
    path.write_text("before")
    right = operators._step
    monkeypatch.setattr(
        operators, "_step", lambda w, bound, res, dtype: right(w, bound, res / 2, dtype)
    )
    with pytest.raises(OnnxError, match="disagrees with Sequential: output 0 of batch 4"):
        export_onnx(analog, (x,), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_requests_that_cannot_be_met(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match="level = 'int8': expected one of fused, explicit"):
        export_onnx(analog, (x,), tmp_path / "m", level="int8")
    with pytest.raises(OnnxError, match="opset = 17: expected 18 to"):
        export_onnx(analog, (x,), tmp_path / "m", opset=17)
    with pytest.raises(OnnxError, match="has no analog site"):
        export_onnx(cases.mlp(), (x,), tmp_path / "m")
    with pytest.raises(OnnxError, match="is no folder"):
        export_onnx(analog, (x,), tmp_path / "absent" / "m")
    with pytest.raises(OnnxError, match=r"0\.weight is on the meta device"):
        export_onnx(analog.to("meta"), (x,), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Untranslated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x):
        return torch.linalg.eigvals(self.layer(x)[:, :4].reshape(-1, 2, 2)).real


def test_what_has_no_graph_or_no_translation_is_named(tmp_path):
    x = torch.randn(4, 12)
    model = cases.analog(lambda: nn.Sequential(Branches()), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"Sequential has no single graph: .*data-dependent"):
        export_onnx(model, (x,), tmp_path / "m")
    model = cases.analog(lambda: nn.Sequential(Untranslated()), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"0: aten\.\S*eig\S* cannot be exported"):
        export_onnx(model, (x,), tmp_path / "m")


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("analogfx.onnx.find_spec", lambda name: None)
    with pytest.raises(
        OnnxError, match=r"onnx, onnxscript, onnxruntime: pip install 'analogfx\[onnx"
    ):
        export_onnx(cases.mlp(), (torch.randn(1, 12),), tmp_path / "m")
