import json
import os
import resource

import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from torch import nn

import analogfx
from analogfx import analogize, export_onnx, load_onnx_sites
from analogfx.errors import OnnxError
from analogfx.onnx import operators, verify


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    names = [place.name for place in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def op_types(path):
    return {(n.domain, n.op_type) for n in onnx.load(path).graph.node}


@pytest.mark.parametrize("level", cases.LEVELS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_exact_arithmetic_gives_equal_bits(layer, level, tmp_path):
    # Steps are powers of two, so every product and every sum is exact in float32, ties included.
    config = cases.config(
        forward__inp_res=254, forward__out_res=254, forward__out_bound=16,
        modifier__quantization_type="Discretize", modifier__res=16,
    )  # fmt: skip
    make, shape = {
        "linear": (lambda: nn.Linear(18, 8, bias=False), (64, 18)),
        "conv": (lambda: nn.Conv2d(2, 8, 3, bias=False), (8, 2, 6, 6)),
    }[layer]
    x = torch.randn(shape)
    analog = analogize(make(), config).eval()
    with torch.no_grad():
        analog.input_range.fill_(127 / 64)
        analog.weight.copy_(torch.randint(-8, 9, analog.weight.shape) / 8)
        analog.weight.view(-1)[0] = 1
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path, level=level)
    integers = {"linear": "MatMulInteger", "conv": "QLinearConv"}[layer]
    assert (("", integers) in op_types(path)) == (level == "qdq")
    steps = 4 * analog(x)
    assert torch.equal(steps, steps.round()) and steps.abs().max() > 20
    assert torch.equal(run(path, x)[0], analog(x))


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
    for level in cases.LEVELS:
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


class After(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def loop(y):
    return torch.stack([row * 2 for row in y])


def plain_sizes(y):
    if type(y.shape[0]) is not int:
        raise TypeError("sizes must be plain")
    return y


def even_batches(y):
    return y * 2 if y.shape[0] % 2 == 0 else y


@pytest.mark.parametrize(
    ("function", "reason"),
    [(loop, "takes a size as a number"), (plain_sizes, "has no single graph: .*must be plain")],
)
def test_an_axis_that_cannot_be_free_is_told(function, reason, tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(lambda: After(function), cases.CONFIGS["afm"], x)
    path = tmp_path / "model.onnx"
    with pytest.warns(
        UserWarning, match=rf"file of After .* of \w+ axis 0 \(4\): .*{reason}"
    ) as told:
        export_onnx(analog, (x,), path)
    assert told[0].filename == __file__
    (place,) = onnx.load(path).graph.input
    assert [d.dim_value for d in place.type.tensor_type.shape.dim] == [4, 12]
    export_onnx(analog, (x,), path, dynamic_shapes=False)  # without a warning


def test_a_branch_on_the_batch_is_refused(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(lambda: After(even_batches), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match="disagrees with After: output 0 of batch 1"):
        export_onnx(analog, (x,), tmp_path / "m")


@pytest.mark.parametrize(
    "function", [torch.tanh, torch.sigmoid, nn.functional.softplus, torch.sum,
                 lambda y: y.log_softmax(-1), lambda y: y.cumsum(-1), nn.functional.gelu],
)  # fmt: skip
def test_digital_functions_of_an_adc_may_round(function):
    # Behind an ADC nothing is left of a product's rounding; these round by themselves.
    x = torch.randn(40, 12)
    analog = cases.analog(lambda: After(function), cases.CONFIGS["afm"], x)
    with torch.no_grad():
        exact = analog(x)
        off_by_a_bit = exact * (1 + 2 * torch.finfo(torch.float32).eps)
    verify._compare(lambda _: [off_by_a_bit], analog, (x,), {})
    with pytest.raises(OnnxError, match="disagrees"):
        verify._compare(lambda _: [exact * 1.1], analog, (x,), {})


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs, *, mask=None, scale=1.0):
        h = self.first(inputs["x"]) + inputs["y"][0]
        h = h * scale if mask is None else h * mask
        return {"h": h, "rest": (self.second(h), h.sum())}


@pytest.mark.parametrize("kwargs", [{}, {"mask": torch.ones(1, 4)}, {"scale": 2.0}], ids=str)
def test_nested_inputs_and_outputs(kwargs, tmp_path):
    inputs = {"x": torch.randn(2, 4), "y": (torch.randn(2, 4),)}
    analog = cases.analog(Nested, cases.CONFIGS["afm"], inputs)
    export_onnx(analog, (inputs,), tmp_path / "m", kwargs=kwargs)
    graph = onnx.load(tmp_path / "m").graph
    assert len(graph.output) == 3
    batches = [i.type.tensor_type.shape.dim[0] for i in graph.input]
    assert all(b.dim_param for b in batches[:2])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_tied_weights_are_stored_once(tmp_path):
    tokens = torch.randint(0, 50, (2, 5))
    analog = cases.analog(Tied, cases.CONFIGS["afm"], tokens)
    export_onnx(analog, (tokens,), tmp_path / "m")
    shapes = [tuple(t.dims) for t in onnx.load(tmp_path / "m").graph.initializer]
    assert shapes.count((50, 8)) == 1


def test_calls_that_do_not_fit_the_model(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    for args, message in [
        (x, "args is a Tensor: expected a tuple"),
        ((x, x), r"Sequential\.forward: too many positional arguments"),
        ((x[:, 1:],), r"Sequential does not run on these inputs: .*0: expected an input"),
    ]:
        with pytest.raises(OnnxError, match=message):
            export_onnx(analog, args, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("pipe", "no plain file"), ("folder", "no plain file"), ("x" * 300, "cannot be written"),
    ]:  # fmt: skip
        with pytest.raises(OnnxError, match=message):
            export_onnx(analog, (x,), tmp_path / name)
    (tmp_path / "old").write_text("before")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, free[1]))
    try:  # as on a full disk
        with pytest.raises(OnnxError, match=r"old cannot be written: File too large"):
            export_onnx(analog, (x,), tmp_path / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert (tmp_path / "old").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "old", "pipe"]


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("analogfx.onnx.find_spec", lambda name: None)
    with pytest.raises(
        OnnxError, match=r"onnx, onnxscript, onnxruntime: pip install 'analogfx\[onnx"
    ):
        export_onnx(cases.mlp(), (torch.randn(1, 12),), tmp_path / "m")
