"""A layer of experts by kernels beside the torch implementation, which has tests of its own."""

import pytest
import torch
from samples import CONFIGS, TILES, merged
from torch import nn
from triton_cases import DEVICE, philox_normal

import analogfx
from analogfx import kernels, ops
from analogfx.errors import KernelError
from analogfx.kernels import dispatch, noise, plan
from analogfx.kernels.operands import Operands
from analogfx.kernels.spec import MVMSpec, encode
from analogfx.kernels.triton import eight_bit

pytestmark = [
    pytest.mark.usefixtures("one_thread", "triton", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]

EXPERTS, OUTPUTS, INPUTS = 4, 7, 12
ENDS = torch.tensor([19, 19, 20, 37])
"""The second expert has no row, the third has one; two patches of marks hold rows of two."""
BEHIND = 3
"""Rows that belong to no expert."""


class Bank(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, INPUTS))
        self.bias = nn.Parameter(torch.randn(EXPERTS, OUTPUTS)) if bias else None

    def forward(self, x, offsets):
        return ops.experts.grouped_linear(x, self.weight, self.bias, offsets)


def steps(config, bias=True, dtype=torch.float32):
    """Two training steps and an inference: everything that they show, by name."""
    torch.manual_seed(0)
    analog = analogfx.analogize(Bank(bias), config, strict=True).to(DEVICE, dtype)
    if hasattr(analog, "learnable_weight_clip"):
        analog.learnable_weight_clip.data *= 0.7
    offsets, seen = ENDS.to(DEVICE), {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(int(ENDS[-1]) + BEHIND, INPUTS, generator=generator).mul_(step + 1)
        x = x.to(DEVICE, dtype).requires_grad_()
        torch.manual_seed(step)
        y = analog(x, offsets)
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view_as(y))
        seen |= {f"output {step}": y.detach(), f"gradient of x {step}": x.grad}
    seen |= {f"gradient of {name}": p.grad for name, p in analog.named_parameters()}
    seen |= dict(analog.state_dict())
    seen["at inference"] = analog.eval()(x.detach(), offsets).detach()
    return seen


def compared(config, monkeypatch, tolerance, **case):
    monkeypatch.setattr(noise, "normal", philox_normal)
    found = steps(config, **case)
    kernels.use("reference")
    expected = steps(config, **case)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None
            continue
        largest = float(value.abs().max()) if value.is_floating_point() else 0.0
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance * largest, msg=key)
    return found


@pytest.mark.parametrize("ranges", ["shared", "own"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_served(name, ranges, monkeypatch):
    config = merged(CONFIGS[name], TILES, {"mapping": {"experts": ranges}})
    found = compared(config, monkeypatch, 4e-6)
    assert not found["output 0"][ENDS[-1] :].any() and found["output 0"].any()
    assert not found["gradient of x 0"][ENDS[-1] :].any()
    assert not found["gradient of weight"][1].any()


def test_experts_without_a_bias(monkeypatch):
    compared(CONFIGS["everything"], monkeypatch, 4e-6, bias=False)


def test_bfloat16(monkeypatch):
    compared(merged(CONFIGS["fast"], TILES), monkeypatch, 2e-2, dtype=torch.bfloat16)


def test_a_bias_whose_values_do_not_lie_side_by_side(monkeypatch):
    """As the transpose of a parameter has them."""
    torch.manual_seed(0)
    bank = Bank(bias=False)
    bank.turned = nn.Parameter(torch.randn(OUTPUTS, EXPERTS))

    def with_bias(self, x, offsets):
        return ops.experts.grouped_linear(x, self.weight, self.turned.T, offsets)

    monkeypatch.setattr(Bank, "forward", with_bias)
    analog = analogfx.analogize(bank, CONFIGS["DAC and ADC"]).eval().to(DEVICE)
    x, offsets = torch.randn(37, INPUTS, device=DEVICE), ENDS.to(DEVICE)
    found = analog(x, offsets)
    kernels.use("reference")
    torch.testing.assert_close(found, analog(x, offsets), rtol=1e-5, atol=1e-5)


def test_codes_are_kept_from_call_to_call(monkeypatch):
    config = merged(CONFIGS["DAC and ADC"], {"clip": {"type": "LearnablePerChannel"}})
    config = merged(config, {"forward": {"inp_res": 254}})
    config = merged(config, {"modifier": {"res": 254, "quantization_type": "DiscretizePerChannel"}})
    analog = analogfx.analogize(Bank(True), config).eval().to(DEVICE)
    made, quantised = [], eight_bit._quantised
    monkeypatch.setattr(eight_bit, "_quantised", lambda *args: made.append(1) or quantised(*args))
    x, offsets = torch.randn(37, INPUTS, device=DEVICE), ENDS.to(DEVICE)
    with torch.no_grad():
        first = analog(x, offsets)
        assert torch.equal(analog(x, offsets), first) and len(made) == 3
        analog.learnable_weight_clip *= 0.5
        assert not torch.equal(analog(x, offsets), first) and len(made) == 6


def test_no_rows_at_all():
    analog = analogfx.analogize(Bank(True), CONFIGS["DAC and ADC"]).to(DEVICE)
    x = torch.randn(2, INPUTS, device=DEVICE, requires_grad=True)
    y = analog(x, torch.zeros(EXPERTS, dtype=torch.int64, device=DEVICE))
    y.sum().backward()
    assert not y.any() and not x.grad.any() and not analog.weight.grad.any()
    assert not analog.input_range.grad.any()


def test_marks_of_experts_do_not_overlap():
    spec = MVMSpec([6, 6], [OUTPUTS] * EXPERTS, range_mode="static", out_bound=1.0, keep=True)
    weight = torch.empty(EXPERTS, OUTPUTS, INPUTS)
    for ends in ([1, 2, 3, 40], [16, 32, 48, 64], [17, 17, 17, 17], [0, 0, 0, 33]):
        room, _ = plan.expert_marks_shape(torch.empty(ends[-1], INPUTS), weight, spec)
        taken, start = 0, 0
        for e, end in enumerate(ends):
            if end > start:
                first = -(-start // plan.PATCH[0]) + e
                assert first >= taken
                taken = first + -(-(end - start) // plan.PATCH[0])
            start = end
        assert taken <= room


def test_a_report_says_what_computes_experts():
    analog = analogfx.analogize(Bank(True), CONFIGS["DAC and ADC"]).to(DEVICE)
    assert analogfx.report(analog).kernels == {"weight": "triton: fused"}


def test_refusals_are_those_of_one_expert():
    spec = MVMSpec([5, 7], [OUTPUTS] * EXPERTS)
    x, weight = torch.empty(3, INPUTS), torch.empty(EXPERTS, OUTPUTS, INPUTS)
    reason = dispatch.refusal("experts", x, weight, ENDS, spec)
    assert "even split" in reason
    with pytest.raises(KernelError, match="even split"):
        dispatch.serves(reason)


def test_fakes_are_as_what_they_stand_for():
    spec = MVMSpec(
        [6, 6], [OUTPUTS] * EXPERTS, range_mode="static", out_bound=1.0, noise_std=0.1, keep=True
    )
    x, weight = torch.randn(37, INPUTS), torch.randn(EXPERTS, OUTPUTS, INPUTS)
    operands = Operands(x, weight, None, torch.ones(2), None, torch.tensor(3))
    arguments = (*(t if t is None else t.to(DEVICE) for t in operands), ENDS.to(DEVICE))
    op = torch.ops.analogfx.analog_experts.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*arguments, encode(spec)), test_utils=checks)
