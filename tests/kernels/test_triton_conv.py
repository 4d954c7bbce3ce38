import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from triton_cases import (
    ADC,
    ALL,
    DAC,
    DEVICE,
    HALF,
    NOISY,
    SEED,
    STATIC,
    Data,
    assert_as_good,
    philox_on_the_cpu,
)

import analogfx
from analogfx.kernels import conv as plain
from analogfx.kernels import dispatch, linear, philox, plan
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, encode
from analogfx.kernels.triton import blocks, conv, weights
from analogfx.kernels.triton.blocks import Blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


@dataclass(frozen=True)
class Case:
    """One site and the image that it is given."""

    fields: dict
    image: tuple = (2, 4, 6, 5)
    """(B, C, *image)."""
    outputs: int = 6
    kernel: tuple = (3, 2)
    stride: tuple = (1, 1)
    padding: tuple = (1, 0)
    dilation: tuple = (1, 1)
    groups: int = 1
    bias: bool = True
    clip: bool = False
    layout: str = "contiguous"
    """Of the image and the gradient."""
    parameters: str = "contiguous"
    """Layout of weight and bias."""
    dtypes: tuple = (torch.bfloat16,)

    @property
    def window(self):
        return Window(*map(list, (self.kernel, self.stride, self.padding, self.dilation)))

    @property
    def spec(self):
        inputs = self.image[1] // self.groups * math.prod(self.kernel)
        fields = {"keep": True, **self.fields}
        if self.clip and fields.get("weight_states"):
            fields["weight_per_channel"] = True
        return MVMSpec([inputs], [self.outputs], groups=self.groups, **fields)


CASES = {
    "nothing": Case({}, dtypes=ALL),
    "range": Case(STATIC, dtypes=ALL),
    "DAC": Case({**STATIC, "inp_res": 254.0}, bias=False),
    "DAC too fine": Case({**STATIC, "inp_res": 2046.0}),
    "ADC": Case(ADC, dtypes=ALL),
    "bound alone": Case({**STATIC, "out_bound": 0.4}),
    "bound by row": Case({**ADC, "bound_per_channel": True}),
    "fast": Case({**ADC, "range_mode": "fast"}, dtypes=ALL),
    "noise": Case({**ADC, **NOISY}, dtypes=ALL),
    "noise, odd outputs": Case({**ADC, **NOISY}, outputs=7),
    "clip": Case(ADC, clip=True, dtypes=ALL),
    "discrete": Case({"weight_states": 14.0, "range_mode": "none"}),
    "everything": Case({**ADC, **NOISY, "weight_states": 14.0}, clip=True, dtypes=ALL),
    "nothing kept": Case({**ADC, **NOISY, "keep": False}),
    "strides": Case(ADC, stride=(2, 3), padding=(2, 1), dtypes=HALF),
    "dilation": Case(ADC, (1, 3, 9, 7), dilation=(2, 3), padding=(0, 0)),
    "one axis": Case(
        {**ADC, **NOISY}, (3, 4, 11), kernel=(3,), stride=(2,), padding=(1,), dilation=(2,)
    ),
    "three axes": Case(
        {**ADC, **NOISY}, (2, 2, 3, 4, 5), kernel=(2, 1, 3), stride=(1, 2, 1),
        padding=(1, 0, 1), dilation=(1, 1, 2),
    ),
    "groups": Case({**ADC, **NOISY}, groups=2, dtypes=ALL),
    "depthwise": Case({**ADC, **NOISY}, (2, 4, 6, 5), 8, groups=4, dtypes=HALF),
    "point": Case(ADC, kernel=(1, 1), padding=(0, 0)),
    "channels last": Case({**ADC, **NOISY}, layout="channels last", dtypes=HALF),
    "every second": Case(ADC, layout="every second"),
    "a part of a weight": Case(ADC, parameters="a part"),
    "every second weight": Case({**ADC, **NOISY}, parameters="every second"),
    "a transposed kernel of 1": Case(
        ADC, kernel=(1, 1), padding=(0, 0), parameters="transposed", dtypes=ALL
    ),
    "one weight for all": Case(STATIC, parameters="expanded"),
    "no image": Case(ADC, (0, 4, 6, 5)),
    "more than a block": Case(
        {**ADC, **NOISY}, (2, 8, 9, 8), 70, kernel=(3, 3), padding=(1, 1), dtypes=HALF
    ),
}  # fmt: skip


def laid_out(t, layout):
    if layout == "channels last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        return torch.stack([t, t.flip(-1)], -1)[..., 0]
    return t


def stored(t, layout):
    """The same values with other strides, in a larger tensor."""
    if layout == "a part":
        axis = min(t.dim() - 1, 1)
        return torch.cat([t, t], axis).narrow(axis, 0, t.shape[axis])
    if layout == "every second":
        return torch.stack([t, -t], 1).flatten(0, 1)[::2]
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t[:1].expand(t.shape) if layout == "expanded" else t


def data(case, dtype):
    g = torch.Generator().manual_seed(sum(case.image) + case.outputs)

    def normal(*shape):  # on its device at once: a move may give a tensor other strides
        return torch.randn(shape, generator=g).to(DEVICE)

    x = normal(*case.image)
    w = 0.3 * normal(case.outputs, case.image[1] // case.groups, *case.kernel)
    ranged = case.spec.range_mode in ("static", "fast")
    y = [case.image[0], case.outputs, *case.window.out_size(list(case.image[2:]))]
    made = Data(
        laid_out(x.to(dtype), case.layout),
        stored(w.to(dtype), case.parameters),
        stored(normal(case.outputs).to(dtype), case.parameters) if case.bias else None,
        1 + normal(1).sigmoid() if ranged else None,
        (0.2 + 0.5 * normal(1, case.outputs).sigmoid()).to(dtype) if case.clip else None,
        torch.tensor(SEED, device=DEVICE),
        laid_out(normal(*y).to(dtype), case.layout),
    )
    if made.clip is not None:
        made.clip[0, 0] *= -1  # acts by its magnitude
    return made


def run(implementation, case, d):
    """Outputs and gradients by name."""
    site, scalars = d.inputs(), (case.window, case.spec)
    needs = [True, True, case.bias, d.input_range is not None, d.clip is not None]
    y, *kept = implementation.forward(site, *scalars)
    gradients = implementation.backward(d.grad, site, *kept, needs, *scalars)
    named = {f"gradient of {name}": t for name, t in gradients._asdict().items()}
    return {"output": y} | {n: t for n, t in named.items() if t.numel() or not y.numel()}


def oracle(case, d, dtype, monkeypatch):
    """What a case gives in float64, and by torch in the kernels' own precision."""
    on_cpu = d.to(None, "cpu")
    with philox_on_the_cpu():
        same = run(plain, case, on_cpu)
        if dtype != torch.float32:
            _multiply_what_the_kernels_do(case, d, dtype, monkeypatch)
        return run(plain, case, on_cpu.to(torch.float64)), same


def _multiply_what_the_kernels_do(case, d, dtype, monkeypatch):
    """Operands rounded to a half dtype, in float64: how they come about is tested on its own."""
    rows = case.spec._replace(groups=1)
    matrix = d.weight.flatten(1)
    peaks = weights.maxima(matrix, d.clip, rows)
    held = weights.modified_weight(matrix, d.clip, d.seed, peaks, rows).cpu().double()
    of_torch, whole = linear.converted, case.spec.inp_res and case.spec.inp_res < 512

    def converted(x, r, spec, codes=False):
        out = of_torch(x, r, spec, codes)
        return out if whole or r is None else out.to(dtype).double()

    monkeypatch.setattr(plain, "modified_weight", lambda *_: held)
    monkeypatch.setattr(linear, "converted", converted)


@pytest.mark.parametrize("by_vendor", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
)
def test_it_is_as_exact_as_torch(name, dtype, by_vendor, monkeypatch):
    monkeypatch.setattr(plan, "LEAST_OUTPUTS", 99 if by_vendor else 0)
    case = CASES[name]
    d = data(case, dtype)
    with philox_on_the_cpu():
        found = run(conv, case, d)
    assert_as_good(found, *oracle(case, d, dtype, monkeypatch), dtype)


@pytest.fixture
def fused(monkeypatch):
    """As if small groups were worth a launch of their own."""
    monkeypatch.setattr(plan, "LEAST_OUTPUTS", 0)


@pytest.mark.usefixtures("fused")
def test_results_do_not_depend_on_blocks(monkeypatch):
    case, dtype = CASES["more than a block"], torch.bfloat16
    d = data(case, dtype)
    expected, clipped = run(conv, case, d), conv.forward(d.inputs(), case.window, case.spec)[1]
    monkeypatch.setattr(blocks, "choose", lambda *_: Blocks(16, 32, 16, 4, 1))
    found = run(conv, case, d)
    assert torch.equal(conv.forward(d.inputs(), case.window, case.spec)[1], clipped)
    assert clipped.any() and not clipped.all()
    exact = {n: t.cpu().double() for n, t in expected.items()}
    assert_as_good(found, exact, {n: t.cpu() for n, t in expected.items()}, dtype)


@pytest.mark.usefixtures("fused")
def test_output_noise_is_philox_by_patch_and_channel():
    case = Case({**DAC, "out_noise": 0.5}, (2, 1, 4, 3), 3, (1, 1), padding=(0, 0))
    d = data(case, torch.bfloat16)
    d.weight.fill_(1.0)
    quiet = case.spec._replace(out_noise=0.0)
    noisy, still = (
        conv.forward(d.inputs(), case.window, spec)[0].float() for spec in (case.spec, quiet)
    )
    draw = philox.normal(torch.tensor(SEED), 1, noisy.numel()).view(2, 12, 3).mT.reshape(2, 3, 4, 3)
    expected = draw * 0.5 * float(d.input_range)
    torch.testing.assert_close((noisy - still).cpu(), expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_output_has_the_memory_format_of_the_image(layout):
    d = data(Case(ADC, layout=layout), torch.bfloat16)
    case = Case(ADC)
    y, clipped, kept = conv.forward(d.inputs(), case.window, case.spec)
    assert y.stride() == clipped.stride() and kept.numel() == 0
    last = y.is_contiguous(memory_format=torch.channels_last)
    assert last == (layout == "channels last") and clipped.dtype == torch.uint8


@pytest.mark.usefixtures("fused")
def test_nan_and_infinity_pass_as_in_torch():
    case = Case(ADC)
    d = data(case, torch.bfloat16)
    d.x[0, 1, 2, 2], d.x[1, 0, 0, 0], d.x[1, 2, 4, 4] = float("nan"), float("inf"), float("-inf")
    found = conv.forward(d.inputs(), case.window, case.spec)[0].cpu()
    expected = plain.forward(d.to(None, "cpu").inputs(), case.window, case.spec)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any() and found.isfinite().any()


@pytest.mark.usefixtures("fused")
def test_no_input_is_written():
    case = CASES["everything"]
    d = data(case, torch.bfloat16)
    before = [t.clone() for t in (*d.inputs(), d.grad)]
    run(conv, case, d)
    assert all(torch.equal(a, b) for a, b in zip((*d.inputs(), d.grad), before, strict=True))


@pytest.mark.usefixtures("fused")
def test_a_forward_that_kept_nothing_is_done_again():
    case = Case({**ADC, **NOISY})
    d = data(case, torch.bfloat16)
    kept = run(conv, case, d)
    again = run(conv, Case({**ADC, **NOISY, "keep": False}), d)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_image_smaller_than_the_kernel_is_an_error(dtype):
    analog = analogfx.analogize(nn.Conv2d(4, 16, 3, dtype=dtype), {"forward": {}}).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"kernel \(3, 3\).* larger than the image \(2, 2\)"):
        analog(torch.zeros(1, 4, 2, 2, dtype=dtype, device=DEVICE))


@pytest.mark.usefixtures("triton")
def test_a_transposed_convolution_of_kernel_1_is_that_of_torch():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 16, 1, dtype=torch.bfloat16)
    analog = analogfx.analogize(layer, {"pre_post": {"input_range": {"enable": True}}}).to(DEVICE)
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16, device=DEVICE).clamp(-1, 1)
    torch.testing.assert_close(analog.eval()(x).cpu(), layer(x.cpu()), rtol=0.02, atol=0.02)


def test_a_wide_image_is_refused():
    window, spec = Case(ADC).window, Case(ADC).spec
    x = torch.empty(1, 4, 1 << 15, 1 << 14, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(6, 4, 3, 2, dtype=torch.bfloat16, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_refused_device", lambda device: "")
        assert "2**31 elements" in dispatch.refusal("conv", x, weight, window, spec)
        assert dispatch.refusal("conv", x[..., :5], weight, window, spec) == ""


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_of_convolutions_trains_by_the_kernels(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, stride=2))
    config = analogfx.recipes.afm()
    config.mapping.max_input_size = 30
    analog = analogfx.analogize(model.to(dtype), config).to(DEVICE)
    assert analogfx.report(analog).kernels == {
        "0": plan.CONV_BY_VENDOR if dtype == torch.float32 else "triton: fused",
        "2": "triton: fused",  # cut into tiles: a linear product of patches
    }
    x = torch.randn(2, 3, 8, 8, device=DEVICE, dtype=dtype)
    losses = []
    optimizer = torch.optim.SGD(analog.parameters(), 0.05)
    for _ in range(4):
        loss = analog(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["everything", "channels last", "one axis", "depthwise"])
def test_fakes_are_as_what_they_stand_for(name):
    case = CASES[name]
    op = torch.ops.analogfx.analog_conv.default
    arguments = (*data(case, torch.bfloat16).inputs(), encode(case.window), encode(case.spec))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
