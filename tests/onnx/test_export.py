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
from analogfx.modules.program import explicit_level
from analogfx.onnx import operators, runtimes, storage, verify


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    names = [place.name for place in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


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
    found = runtimes.load(path)([x.to(dtype)])[0]
    # A site rounds once, at its end: the runtimes give the same halves but at ties.
    assert verify.distance(found, analog(x.to(dtype)).detach()) < torch.finfo(dtype).eps


def test_a_file_of_bfloat16_that_onnx_runtime_loads(tmp_path):
    x = torch.randn(2, 3, 5, 5)
    analog = cases.analog(lambda: nn.Conv2d(3, 4, 3), cases.CONFIGS["int8"], x).bfloat16()
    path = tmp_path / "m"
    export_onnx(analog, (x.bfloat16(),), path)
    onnxruntime.InferenceSession(str(path))
    assert runtimes.load(path)([x.bfloat16()])[0].dtype == torch.bfloat16


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


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 6)) for _ in range(2))

    def forward(self, x):
        return nn.functional.linear(x, self.a), nn.functional.linear(x, self.b)


class Second(nn.Module):
    """Uses only the second product of a module, and calls a layer by two names."""

    def __init__(self):
        super().__init__()
        self.pair, self.once = Pair(), nn.Linear(4, 4)
        self.again = self.once

    def forward(self, x):
        return self.again(self.once(self.pair(x)[1]))


def test_a_product_whose_result_is_unused_shifts_no_other(tmp_path):
    x = torch.randn(3, 6)
    analog = cases.analog(Second, cases.CONFIGS["int4"], x)
    export_onnx(analog, (x,), tmp_path / "model.onnx")
    pair, once = load_onnx_sites(tmp_path / "model.onnx").sites
    assert (pair.name, once.name, once.nodes) == ("pair.b", "once", ("once", "once@2"))
    apart = np.abs(pair.weight() - analog.pair.b.detach().numpy())
    assert apart.max() < 0.1 * analog.pair.b.abs().max()


class Biased(nn.Module):
    """A bias that is computed from a parameter."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(9000, 4)), nn.Parameter(torch.randn(9000))

    def forward(self, x):
        return nn.functional.linear(x, self.w, 2 * self.b)


class BiasGiven(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))

    def forward(self, x, b):
        return nn.functional.linear(x, self.w, b)


class OfConstant(nn.Module):
    """A product of a constant beside one of an input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5)
        self.register_buffer("constant", torch.randn(3, 4))

    def forward(self, x):
        return self.first(x), self.second(self.constant)


def test_a_product_of_a_constant_is_checked_like_others(tmp_path):
    x = torch.randn(3, 4)
    analog = cases.analog(OfConstant, cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "m")
    assert len(load_onnx_sites(tmp_path / "m").sites) == 2


def test_a_bias_is_a_constant_if_it_can_be(tmp_path):
    x, path = torch.randn(2, 4), tmp_path / "model.onnx"
    analog = cases.analog(Biased, cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), path)
    (site,) = load_onnx_sites(path).sites
    np.testing.assert_array_equal(site.array("bias"), 2 * analog.b.detach().numpy())
    b = torch.randn(5)  # added digitally
    analog = cases.analog(BiasGiven, cases.CONFIGS["afm"], x, b)
    export_onnx(analog, (x, b), path)
    assert "bias" not in load_onnx_sites(path).sites[0].tensors


def test_a_file_tells_nothing_of_the_machine_that_made_it(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    noted = [*model.metadata_props, *(e for n in model.graph.node for e in n.metadata_props)]
    assert {e.key for e in noted} == {"ai.analogfx"}
    whole = (tmp_path / "model.onnx").read_bytes()
    assert not [text for text in (b"site-packages", b".py", b"pkg.torch") if text in whole]


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_INLINE_LIMIT", 1 << 10)
    x = torch.randn(3, 64)
    analog = cases.analog(lambda: nn.Linear(64, 64), cases.CONFIGS["afm"], x)
    path = tmp_path / "model.onnx"
    export_onnx(analog, (x,), path)
    assert [bool(cases.DATA.fullmatch(n)) for n in names(tmp_path)] == [False, True]
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
    with pytest.raises(OnnxError, match=r"disagrees with Sequential at 0: .* of its 36 outputs"):
        export_onnx(analog, (x,), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_requests_that_cannot_be_met(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match="level = 'int8': expected one of fused, explicit"):
        export_onnx(analog, (x,), tmp_path / "m", level="int8")
    for opset in (17, 26):
        with pytest.raises(OnnxError, match=f"opset = {opset}: expected 18 to 25"):
            export_onnx(analog, (x,), tmp_path / "m", opset=opset)
    for wrong, message in [
        ({"opset": "18"}, "opset = '18': expected an int"),
        ({"opset": 18.0}, "opset = 18.0: expected an int"),
        ({"seed": None}, "seed = None: expected an int"),
        ({"level": ["fused"]}, r"level = \['fused'\]: expected one of"),
        ({"kwargs": [1]}, "kwargs is a list: expected a dict"),
    ]:
        with pytest.raises(OnnxError, match=message):
            export_onnx(analog, (x,), tmp_path / "m", **wrong)
    for place in (None, b"m", "a\0b"):
        with pytest.raises(OnnxError, match=r"expected a str or a path|embedded null"):
            export_onnx(analog, (x,), place)
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


def test_what_has_no_graph_or_no_translation_is_named(tmp_path, capfd):
    x = torch.randn(4, 12)
    model = cases.analog(
        lambda: nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.ReLU(), Branches())),
        cases.CONFIGS["afm"],
        x,
    )
    with pytest.raises(OnnxError, match=r"1\.1 \(Branches\) has no single graph: .*data-dependent"):
        export_onnx(model, (x,), tmp_path / "m")
    assert capfd.readouterr().err == ""  # torch's pages of graph
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


def even_lengths(y):
    return y * 2 if y.shape[1] % 2 == 0 else y


def test_a_branch_on_the_sequence_is_refused(tmp_path):
    x = torch.randn(2, 6, 12)
    analog = cases.analog(lambda: After(even_lengths), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"output 0 for inputs of \[\(2, 7, 12\)\]"):
        export_onnx(analog, (x,), tmp_path / "m")


def test_a_sequence_may_end_where_the_model_ends(tmp_path):
    def short(y):
        if y.shape[1] > 6:
            raise IndexError("no more positions")
        return y

    x = torch.randn(2, 6, 12)
    analog = cases.analog(lambda: After(short), cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "m")


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_fixed_axis_of_a_sequence_is_told_and_one_of_channels_is_not(tmp_path):
    x = torch.randn(2, 5, 12)
    analog = cases.analog(lambda: After(lambda y: y.reshape(-1, 60)), cases.CONFIGS["afm"], x)
    with pytest.warns(UserWarning, match=r"takes one size alone of x axis 1 \(5\)"):
        export_onnx(analog, (x,), tmp_path / "m", verify=False)
    for config in ("afm", "dynamic"):  # a convolution, and one on patches
        analog = cases.analog(lambda: nn.Conv1d(5, 4, 3), cases.CONFIGS[config], x)
        export_onnx(analog, (x,), tmp_path / "m", verify=False)


def test_shapes_that_do_not_fit_are_told_from_models_that_do_not(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"with these dynamic_shapes: .*Constraints violated"):
        export_onnx(analog, (x,), tmp_path / "m", dynamic_shapes=({1: torch.export.Dim("d")},))
    analog = cases.analog(Branches, cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match="Branches has no single graph"):
        export_onnx(analog, (x,), tmp_path / "m", dynamic_shapes=({0: torch.export.Dim("d")},))


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(lambda: After(lambda y: (y, 3.0)), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"After: output 1 is 3\.0, which is no tensor"):
        export_onnx(analog, (x,), tmp_path / "m")


def test_what_no_runtime_here_runs_is_told(tmp_path):
    x = cases.example("conv2d")
    analog = cases.analog(cases.conv2d, cases.CONFIGS["int4"], x).to(torch.bfloat16)
    with pytest.raises(OnnxError, match=r"neither .* runs the exported model: .*DequantizeLinear"):
        export_onnx(analog, (x.bfloat16(),), tmp_path / "m", level="qdq")


def shapes(values):
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_outputs_and_free_axes_have_the_models_names(tmp_path):
    x = cases.example("llama")
    analog = cases.analog(cases.TRANSFORMERS["llama"], cases.CONFIGS["afm"], x)
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    export_onnx(analog, (), tmp_path / "model.onnx", kwargs=inputs)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert shapes(graph.input) == {name: ["batch", "sequence"] for name in inputs}
    assert shapes(graph.output) == {"logits": ["batch", "sequence", 50]}


def test_outputs_without_names_are_numbered(tmp_path):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            y = self.layer(x)
            return y, {"more": y + 1}

    x = torch.randn(2, 4)
    analog = cases.analog(Several, cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert shapes(graph.output) == {"output_0": ["batch", 3], "output_1_more": ["batch", 3]}


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (lambda y: (y, None), ["output_0"]),
        (lambda y: (None, {"logits": y, "cache": None, "state": 2 * y}),
         ["output_1_logits", "output_1_state"]),
    ],
)  # fmt: skip
def test_none_beside_tensors_has_no_output(returned, named, tmp_path):
    x = torch.randn(3, 12)
    analog = cases.analog(lambda: After(returned), cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), tmp_path / "m")
    assert [o.name for o in onnx.load(tmp_path / "m").graph.output] == named


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Tanh])
def test_a_runtime_may_leave_out_a_rounding_to_float16_before_a_dac(tmp_path, activation):
    # ONNX Runtime computes these in float32, and in front of a site drops the cast to float16.
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), activation(), nn.Linear(32, 8))
        x = torch.randn(8, 16)
        analog = analogfx.analogize(model, cases.CONFIGS["afm"])
        analog(x)
        export_onnx(analog.half().eval(), (x.half(),), tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_site_that_is_slightly_off_is_refused(dtype, tmp_path, monkeypatch):
    right = operators._step
    x = torch.randn(20, 12).to(dtype)
    analog = cases.analog(cases.mlp, cases.CONFIGS["int4"], x.float()).to(dtype)
    factor = 1.02 if dtype == torch.bfloat16 else 1.0001
    monkeypatch.setattr(
        operators, "_step", lambda w, bound, res, kind: right(w, bound, res * factor, kind)
    )
    with pytest.raises(OnnxError, match="disagrees with Sequential at 0"):
        export_onnx(analog, (x,), tmp_path / "m")


def test_a_branch_on_the_batch_is_refused(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(lambda: After(even_batches), cases.CONFIGS["afm"], x)
    with pytest.raises(OnnxError, match=r"with After: output 0 for inputs of \[\(1, 12\)\]"):
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


class Order(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a, b=0, *, c=0):
        return self.layer(a) - 2 * b + 3 * c


def test_keyword_arguments_may_come_in_any_order(tmp_path):
    a, b, c = torch.randn(3, 2, 4)
    analog = cases.analog(Order, cases.CONFIGS["afm"], a, b)
    export_onnx(analog, (a,), tmp_path / "m", kwargs={"c": c, "b": b})
    inputs = onnx.load(tmp_path / "m").graph.input
    assert [i.name for i in inputs] == ["a", "b", "c"]
    assert len({i.type.tensor_type.shape.dim[0].dim_param for i in inputs}) == 1


def test_a_transformer_takes_its_mask(tmp_path):
    tokens = torch.randint(0, 50, (1, 5))
    analog = cases.analog(cases.TRANSFORMERS["llama"], cases.CONFIGS["afm"], tokens)
    mask = torch.ones_like(tokens)
    export_onnx(analog, (), tmp_path / "m", kwargs={"attention_mask": mask, "input_ids": tokens})
    inputs = onnx.load(tmp_path / "m").graph.input
    assert [i.name for i in inputs] == ["input_ids", "attention_mask"]
    first, second = ([d.dim_param for d in i.type.tensor_type.shape.dim] for i in inputs)
    assert first[0] == second[0] != ""


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


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A model with its weights beside it, and a function that exports there again."""
    monkeypatch.setattr(storage, "_INLINE_LIMIT", 1 << 10)
    x, path = torch.randn(3, 64), tmp_path / "model.onnx"
    analog = cases.analog(lambda: nn.Linear(64, 64), cases.CONFIGS["afm"], x)
    export_onnx(analog, (x,), path)
    return path, lambda: export_onnx(analog, (x,), path, verify=False)


def test_an_export_in_another_s_place_leaves_only_its_own_weights(large, monkeypatch):
    path, export = large
    (path.parent / "model.onnx.notes.data").write_text("mine")
    before = names(path.parent)
    export()
    after = names(path.parent)
    assert len(after) == 3 and before != after
    load_onnx_sites(path).sites[0].weight()
    monkeypatch.setattr(storage, "_INLINE_LIMIT", 1 << 20)
    export()
    assert names(path.parent) == ["model.onnx", "model.onnx.notes.data"]


def test_an_export_that_fails_at_the_last_step_changes_nothing(large, monkeypatch):
    path, export = large
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    real = os.replace

    def fails(source, target):
        if target == path:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", fails)
    with pytest.raises(OnnxError, match="cannot be written: No space left"):
        export()
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_link_stays_a_link(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/model.onnx")
    export_onnx(analog, (x,), tmp_path / "link", verify=False)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "folder") == ["model.onnx"]


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("analogfx.onnx.find_spec", lambda name: None)
    with pytest.raises(
        OnnxError, match=r"onnx, onnx_ir, onnxscript, onnxruntime: pip install 'analogfx\[onnx"
    ):
        export_onnx(cases.mlp(), (torch.randn(1, 12),), tmp_path / "m")


def test_a_chain_that_is_not_fused_is_named(tmp_path):
    x = torch.randn(4, 12)
    analog = cases.analog(cases.mlp, cases.CONFIGS["afm"], x)
    with explicit_level(), pytest.raises(OnnxError, match=r"0: 0 of its 1 analog products are fus"):
        export_onnx(analog, (x,), tmp_path / "m")
