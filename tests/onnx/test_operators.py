"""Every op by itself in ONNX Runtime, against the kernels; and its page against the op."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import analogfx.ops  # noqa: F401 (registers what the ops are compared with)
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.onnx.operators import ADC, DAC, AnalogConv, AnalogLinear, DynamicRange, Seeds
from analogfx.onnx.writer import DOMAIN, VERSION, Writer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "onnx"
FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE


def run(operator, *inputs):
    """The op as a function call in a model of its own; inputs by position, or as one dict."""
    given = (
        inputs[0]
        if isinstance(inputs[0], dict)
        else dict(zip(operator.inputs, inputs, strict=False))  # optional ones may be left out
    )
    given = {name: np.asarray(t) for name, t in given.items()}
    values = {
        name: ir.Value(name=name, type=ir.TensorType(ir.tensor(t).dtype), shape=ir.Shape(t.shape))
        for name, t in given.items()
    }
    functions = {}
    writer = Writer(18, {type(operator).__name__}, functions)
    y = writer.call(operator, *map(values.get, operator.inputs))
    y.name, y.type = "out", values[operator.inputs[0]].type
    graph = ir.Graph(
        list(values.values()),
        [y],
        nodes=writer.tape.nodes,
        opset_imports={"": 18, DOMAIN: VERSION},
        name="g",
    )
    model = ir.Model(graph, ir_version=10, functions=list(functions.values()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return torch.from_numpy(session.run(None, given)[0])


@pytest.mark.parametrize("inp_res", [0.0, 1.0, 1 / 62, 4.0, 254.0])
@pytest.mark.parametrize("r", [0.0, 1e-40, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dac_is_bit_equal(inp_res, r, dtype):
    x = torch.linspace(-2, 2, 1001, dtype=dtype)
    r = torch.tensor(r, dtype=dtype)
    kind = FLOAT if dtype == torch.float32 else DOUBLE
    expected = ref.dac(x, r, inp_res, "static")
    assert torch.equal(run(DAC(inp_res, True, kind), x, r), expected)


def test_dynamic_dac_is_bit_equal():
    x = torch.randn(5, 9)
    x[0] = 0
    r = run(DynamicRange(), x)
    assert torch.equal(r, torch.ops.analogfx.dynamic_range(x))
    expected = ref.dac(x, r, 254.0, "dynamic")
    assert torch.equal(run(DAC(254.0, False, FLOAT), x, r), expected)


@pytest.mark.parametrize("out_res", [0.0, 1 / 62, 4.0, 254.0])
def test_adc_is_bit_equal(out_res):
    y, a, r = 3 * torch.randn(50, 6), torch.rand(6), torch.tensor(0.7)
    a[0] = 0
    expected = ref.clamp_to(*ref.adc_(y.clone(), a, r, 3.0, out_res))
    assert torch.equal(run(ADC(3.0, out_res, False, FLOAT), y, r, a), expected)


def test_the_examples_of_the_pages():
    one = torch.tensor(1.0)
    dac = run(DAC(4.0, True, FLOAT), torch.tensor([0.25, 0.75, -3]), one)
    assert dac.tolist() == [0, 1, -1]
    adc = ADC(10.0, 4.0, True, FLOAT)
    assert run(adc, torch.tensor([0.5, 1.5, 9]), one, torch.tensor(0.2)).tolist() == [0, 2, 2]
    assert run(DynamicRange(), torch.tensor([[1.0, -3], [0, 0]])).tolist() == [[3], [0]]
    linear = AnalogLinear(SPEC._replace(inp_res=254.0, weight_states=254.0), FLOAT, True)
    constants = {
        "weight": np.array([[127, -64]], np.int8),
        "weight_scale": torch.tensor([[0.01]]),
        "input_range": torch.tensor([0.5]),
    }
    y = run(linear, {"x": torch.tensor([0.9, -0.1]), **constants})
    assert y.item() == pytest.approx(0.697992, abs=1e-6)
    window = Window((1,), (1,), (0,), (1,))
    spec = SPEC._replace(in_sizes=(1,), out_bound=1.0, out_res=4.0)
    ones = {"weight": torch.ones(1, 1, 1), "weight_max": torch.ones(1, 1)}
    image = {"x": torch.tensor([[[0.5, 2]]]), "input_range": torch.ones(1), **ones}
    assert run(AnalogConv(spec, FLOAT, False, window=window), image).tolist() == [[[0.5, 1]]]


SPEC = MVMSpec((2,), (1,), range_mode="static")
PAGES = {
    "dac": DAC(4.0, True, FLOAT),
    "adc": ADC(10.0, 4.0, True, FLOAT),
    "dynamic_range": DynamicRange(),
    "analog_linear": AnalogLinear(SPEC, FLOAT, False, seeds=Seeds(0.0, 1.0), compensated=True),
    "analog_conv": AnalogConv(
        SPEC, FLOAT, False, compensated=True, window=Window((1,), (1,), (0,), (1,))
    ),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_every_input_and_attribute(page):
    operator, text = PAGES[page], (DOCS / f"{page}.md").read_text()
    assert text.startswith(f"# {type(operator).__name__}\n")
    table = text[text.index("## Inputs") : text.index("## Output")]
    assert tuple(re.findall(r"^\| \d \| `(\w+)`", table, re.M)) == operator.inputs
    named = set(re.findall(r"`(\w+)`", text[text.index("## Attributes") :]))
    if page == "analog_conv":
        named |= set(re.findall(r"`(\w+)`", (DOCS / "analog_linear.md").read_text()))
    assert set(operator.attributes()) <= named


def test_ops_with_equal_scalars_share_a_function():
    functions = {}
    writer = Writer(18, {"DAC"}, functions)
    x, r = ir.Value(name="x"), ir.Value(name="r")
    for res in (4.0, 4.0, 8.0):
        writer.call(DAC(res, True, FLOAT), x, r)
    assert [f.overload for f in functions.values()] == ["0", "1"]
    assert [n.overload for n in writer.tape.nodes] == ["0", "0", "1"]
