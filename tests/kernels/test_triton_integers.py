"""Integer-exact sites in the kernels: the bits of torch's, forward; and clipped alike."""

import pytest
import torch
from test_integers import SITES, W4A8, W8A8, by_hand, operands, spec_of
from triton_cases import DEVICE

from analogfx.kernels import integers, linear, plan
from analogfx.kernels.operands import Operands
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton import linear as kernels
from analogfx.kernels.triton.blocks import Blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


def computed(given, spec, **changed):
    """The output of the kernels, and what the backward is given."""
    x, weight, bias, ranges = (t.to(DEVICE) for t in given)
    ranges = None if spec.range_mode == "dynamic" else ranges[: len(spec.in_sizes)]
    found = kernels.forward(Operands(x, weight, bias, ranges), spec._replace(**changed))
    return [t.cpu() for t in found]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SITES)
def test_every_output_is_that_of_integers(name, dtype, keep):
    spec, given = spec_of(SITES[name]), operands(rows=32, dtype=dtype)
    assert torch.equal(computed(given, spec, keep=keep)[0], by_hand(*given, spec).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inp_res", [1022.0, 16382.0])
def test_codes_that_bfloat16_cannot_hold(inp_res, dtype):
    spec, given = spec_of(W4A8 | {"inp_res": inp_res}), operands(rows=16, dtype=dtype)
    assert integers.depth(spec) and integers.largest_of(spec) > plan.EXACT[torch.bfloat16]
    assert torch.equal(computed(given, spec)[0], by_hand(*given, spec).to(dtype))


@pytest.mark.parametrize("keep", [False, True])
def test_sums_beyond_float32_are_exact(keep):
    spec = spec_of(W8A8, inputs=3000, tiles=1)
    x, weight, bias, ranges = operands(inputs=3000, rows=8)
    weight[2] = torch.cat([torch.full((1500,), 1.0), torch.full((1500,), -1.0)])
    x[:4] = 5.0
    x[:4, -700:] = torch.randn(4, 700)
    expected = by_hand(x, weight, bias, ranges, spec)
    assert torch.equal(computed((x, weight, bias, ranges), spec, keep=keep)[0], expected)


def test_blocks_change_nothing(monkeypatch):
    spec, given = spec_of(W4A8), operands(rows=40)
    expected = computed(given, spec, keep=True)
    monkeypatch.setattr(blocks, "choose", lambda *_: Blocks(16, 64, 16, 4, 1))
    monkeypatch.setattr(plan, "REUSED", 0)
    monkeypatch.setattr(plan, "FEW", 0)
    for found, want in zip(computed(given, spec, keep=True), expected, strict=True):
        assert torch.equal(found, want)


def test_what_a_bound_clips_is_found_again():
    """Of a bound that clips a part of the outputs: gradients are torch's."""
    x, weight, bias, ranges = operands(rows=40)
    spec = spec_of(W4A8 | {"out_bound": 0.5, "decay": 0.01})._replace(keep=True)
    grad, needs = torch.randn(40, 12), [True, True, True, True, False]
    found = []
    for implementation in (linear, kernels):
        place = "cpu" if implementation is linear else DEVICE
        site = Operands(*(t.to(place) for t in (x, weight, bias, ranges)))
        _, marks, kept = implementation.forward(site, spec)
        assert marks.any()
        gradients = implementation.backward(grad.to(place), site, marks, kept, needs, spec)
        found.append([t.cpu() for t in gradients[:4]])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
