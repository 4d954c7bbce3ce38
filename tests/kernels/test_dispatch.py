import subprocess
import sys

import pytest
import torch
from samples import CONFIGS, LAYERS, TILES, layer_and_input, merged
from torch import nn
from triton_cases import DEVICE, philox_normal

import analogfx
from analogfx import kernels
from analogfx.errors import KernelError
from analogfx.kernels import dispatch, noise
from analogfx.kernels.spec import MVMSpec, encode

pytestmark = [
    pytest.mark.usefixtures("one_thread", "triton", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


def steps(layer, x, config):
    """Two training steps and an eval forward: everything that they show, by name."""
    torch.manual_seed(0)
    analog = analogfx.analogize(layer, config).to(DEVICE)
    seen = {}
    for step in range(2):
        inputs = (x * (step + 1)).to(DEVICE).requires_grad_()
        torch.manual_seed(step)
        y = analog(inputs)
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y))
        seen |= {f"output {step}": y.detach(), f"gradient of x {step}": inputs.grad}
    seen |= {f"gradient of {name}": p.grad for name, p in analog.named_parameters()}
    seen |= dict(analog.state_dict())
    seen["at inference"] = analog.eval()(x.to(DEVICE)).detach()
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_served(monkeypatch, name):
    monkeypatch.setattr(noise, "normal", philox_normal)
    config = merged(CONFIGS[name], TILES)
    layer, x = layer_and_input("linear", torch.float32)
    found = steps(layer, x, config)
    kernels.use("reference")
    layer, x = layer_and_input("linear", torch.float32)
    expected = steps(layer, x, config)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        floating = value is not None and value.is_floating_point()
        largest = float(value.abs().max()) if floating else 0.0
        torch.testing.assert_close(found[key], value, rtol=0, atol=4e-6 * largest, msg=key)


@pytest.mark.parametrize("config", ["DAC and ADC", "fast", "everything"])
@pytest.mark.parametrize("name", [n for n in LAYERS if "linear" not in n])
def test_every_convolution_is_served(monkeypatch, name, config):
    monkeypatch.setattr(noise, "normal", philox_normal)
    layer, x = layer_and_input(name, torch.float32)
    found = steps(layer, x, CONFIGS[config])
    kernels.use("reference")
    layer, x = layer_and_input(name, torch.float32)
    expected = steps(layer, x, CONFIGS[config])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        floating = value is not None and value.is_floating_point()
        largest = float(value.abs().max()) if floating else 0.0
        torch.testing.assert_close(found[key], value, rtol=0, atol=4e-6 * largest, msg=key)


def spec(**fields):
    return MVMSpec(**{"in_sizes": [4, 4], "out_sizes": [8], **fields})


def operands(dtype=torch.float32, device=DEVICE):
    return torch.randn(3, 8).to(device, dtype), torch.randn(8, 8).to(device, dtype)


@pytest.mark.parametrize(
    ("reason", "of_spec", "x", "w"),
    [
        ("not torch.float64", spec(), torch.float64, torch.float64),
        (
            "the input is torch.float16, the weight torch.float32",
            spec(),
            torch.float16,
            torch.float32,
        ),
        ("2 groups", spec(groups=2, in_sizes=[4]), torch.float32, torch.float32),
        ("not with relu", spec(activation="relu"), torch.float32, torch.float32),
        ("even split", spec(in_sizes=[3, 5]), torch.float32, torch.float32),
        ("even split", spec(in_sizes=[2, 4, 2]), torch.float32, torch.float32),
    ],
)
def test_refusals_have_a_name(reason, of_spec, x, w):
    found = dispatch.refusal("linear", operands(x)[0], operands(w)[1], of_spec)
    assert reason in found
    with pytest.raises(KernelError, match=reason):
        dispatch.serves(found)
    if x == w:
        assert dispatch.chosen(operands(w)[1], of_spec) == f"torch: {found}"


def test_auto_leaves_the_cpu_to_torch():
    w = operands(device="cpu")[1]
    for how, fields in {
        "fused": {"range_mode": "static", "out_bound": 1.0},
        "prepared operands, torch.mm": {"noise_std": 0.1},
        "int8": {"range_mode": "static", "inp_res": 254.0, "weight_states": 254.0},
    }.items():
        assert dispatch.chosen(w.to(DEVICE), spec(**fields)) == f"triton: {how}"
    kernels.use("auto")
    assert dispatch.chosen(w, spec()) == "torch: the tensors are on cpu, not on a CUDA device"
    kernels.use("reference")
    assert dispatch.chosen(w, spec()) == "torch: it was asked for"


def test_a_report_says_what_computes_each_site():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)).to(DEVICE)
    analog = analogfx.analogize(model, CONFIGS["DAC and ADC"])
    placed = analogfx.report(analog)
    assert placed.kernels == {
        "0": "triton: weights; torch.convolution",
        "2": "triton: fused",
    }
    assert str(placed).splitlines()[-2:] == [
        "1 computed by triton: weights; torch.convolution",
        "1 computed by triton: fused",
    ]
    kernels.use("reference")
    assert analogfx.report(analog).to_dict()["kernels"]["2"] == "torch: it was asked for"


def test_triton_needs_the_interpreter_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = operands(device="cpu")
    with pytest.raises(KernelError, match="on cpu"):
        dispatch.forward("linear", x, w, None, None, None, None, spec())


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert dispatch.refusal("linear", *operands(), spec()) == "triton is not installed"


def test_use_returns_the_choice_before_and_knows_three():
    assert kernels.use("auto") == "triton"
    assert kernels.use("reference") == "auto"
    with pytest.raises(ValueError, match="auto, triton, reference"):
        kernels.use("cuda")
    assert kernels.use("triton") == "reference"
    assert not hasattr(kernels, "used")


def test_another_choice_in_the_backward_computes_the_bits_again():
    config = CONFIGS["DAC and ADC"]
    layer, x = layer_and_input("linear", torch.float32)
    found = {}
    for first, second in (("triton", "triton"), ("triton", "reference"), ("reference", "triton")):
        analog = analogfx.analogize(nn.Linear(12, 7), config).to(DEVICE)
        analog.load_state_dict({**analog.state_dict(), **layer.state_dict()})
        kernels.use(first)
        y = analog(x.to(DEVICE))
        kernels.use(second)
        y.sum().backward()
        found[first, second] = analog.weight.grad
    expected, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("name", ["everything", "dynamic"])
def test_fakes_are_as_what_they_stand_for(monkeypatch, name):
    layer, x = layer_and_input("linear", torch.float32)
    analog = analogfx.analogize(layer, merged(CONFIGS[name], TILES)).to(DEVICE)
    calls, of_op = [], dispatch.forward
    monkeypatch.setattr(dispatch, "forward", lambda *args: calls.append(args) or of_op(*args))
    analog(x.to(DEVICE))
    ((op, *tensors, site),) = calls
    assert op == "linear"
    assert dispatch.clipped_shape("linear", *tensors[:2], site) == (len(site.in_sizes), 1, 1)
    op = torch.ops.analogfx.analog_linear.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*tensors, encode(site)), test_utils=checks)


@pytest.mark.parametrize("config", ["identity", "weight noise", "DAC and ADC", "dynamic"])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
def test_what_follows_may_write_to_the_output(config, shape):
    layer = nn.Linear(8, 8)
    analog = analogfx.analogize(layer, CONFIGS[config]).to(DEVICE)
    x = torch.randn(shape, device=DEVICE)
    for training in (True, False):
        seen = []
        for in_place in (True, False):
            inputs = x.clone().requires_grad_()
            torch.manual_seed(0)
            y = analog.train(training)(inputs)
            y = y.add_(inputs) if in_place else y + inputs
            y = torch.relu_(y) if in_place else torch.relu(y)
            y.sum().backward()
            seen.append((y, inputs.grad))
            analog.load_state_dict(analogfx.analogize(layer, CONFIGS[config]).state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_compiled_site_is_the_eager_one():
    layer, x = layer_and_input("linear", torch.float32)
    config = merged(CONFIGS["DAC and ADC"], TILES)
    seen = []
    for compiled in (False, True):
        analog = analogfx.analogize(layer, config).to(DEVICE)
        run = torch.compile(analog, backend="aot_eager", fullgraph=True) if compiled else analog
        y = run(x.to(DEVICE))
        y.sum().backward()
        seen.append((y, analog.weight.grad, analog.input_range.grad, analog.input_range))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


COLD = """
import sys, torch, analogfx, analogfx.kernels
analogfx.kernels.use("auto")
layer = analogfx.analogize(torch.nn.Linear(4, 4), {"forward": {}})
layer(torch.randn(2, 4)).sum().backward()
print("triton.language" in sys.modules, "analogfx.kernels.triton" in sys.modules)
"""


def test_torch_alone_imports_no_triton():
    out = subprocess.run([sys.executable, "-c", COLD], check=True, capture_output=True, text=True)
    assert out.stdout.split() == ["False", "False"]
