"""Integer-exact sites: codes against sums of integers in numpy, wherever they are computed."""

import numpy as np
import pytest
import torch
from torch.nn.functional import unfold

from analogfx.kernels import conv, integers, linear, patches, prepared
from analogfx.kernels.operands import Operands
from analogfx.kernels.spec import MVMSpec, encode

W4A8 = {
    "range_mode": "static",
    "inp_res": 254.0,
    "weight_states": 14.0,
    "weight_per_channel": True,
    "out_bound": 12.0,
    "out_res": 254.0,
    "bound_per_channel": True,
}
W8A8 = W4A8 | {"weight_states": 254.0}

SITES = {
    "W4A8": W4A8,
    "W8A8": W8A8,
    "one number for all": W8A8 | {"weight_per_channel": False, "bound_per_channel": False},
    "bound of the tile": W4A8 | {"bound_per_channel": False},
    "step of the tile": W4A8 | {"weight_per_channel": False},
    "dynamic": W8A8 | {"range_mode": "dynamic"},
    "fractions": W4A8 | {"inp_res": 1 / 62, "out_res": 1 / 126},
    "odd states": W4A8 | {"weight_states": 7.0, "inp_res": 31.0},
}

f32 = np.float32


def operands(inputs=96, outputs=12, rows=512, dtype=torch.float32):
    """Inputs, weights with a row of zeros, biases and ranges of two tiles."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    weight[1] = 0
    x = 2 * torch.randn(rows, inputs)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs).to(dtype), torch.tensor([1.5, 3.0])


def spec_of(fields, inputs=96, outputs=12, tiles=2):
    sizes = [inputs // tiles] * tiles
    return MVMSpec(sizes, [outputs // 3, outputs - outputs // 3], **fields)


def by_hand(x, weight, bias, ranges, spec, noted=None):
    """The site's output: int64 sums, and one float32 product for every code."""
    x, weight, bias = (t.float().numpy() for t in (x, weight, bias))
    n_x, n_y = (r if r > 1 else 1 / r for r in (spec.inp_res, spec.out_res))
    rows = np.cumsum(spec.out_sizes)[:-1]
    total = 0
    for tile, columns in enumerate(np.split(np.arange(x.shape[1]), np.cumsum(spec.in_sizes)[:-1])):
        peak = np.abs(weight[:, columns]).max(1)
        whole = np.concatenate([np.full_like(p, p.max()) for p in np.split(peak, rows)])
        m, a = (peak if p else whole for p in (spec.weight_per_channel, spec.bound_per_channel))
        step = 2 * (m / f32(spec.weight_states))
        step[step == 0] = 1
        end = spec.weight_states / 2
        q_w = np.rint(np.clip(weight[:, columns] / step[:, None], -end, end)).astype(np.int64)
        r = ranges[tile].numpy()
        if spec.range_mode == "dynamic":
            r = np.abs(x[:, columns]).max(1, keepdims=True)
        width = 2 * r / f32(spec.inp_res) if spec.inp_res > 1 else 2 * r * f32(spec.inp_res)
        q_x = np.rint(np.clip(x[:, columns], -r, r) / width).astype(np.int64)
        acc = q_x @ q_w.T
        rho = f32(2 * n_y / (n_x * spec.weight_states * spec.out_bound))
        if spec.weight_per_channel != spec.bound_per_channel:
            rho = m / np.maximum(a, np.finfo(f32).tiny) * rho
        code = np.rint(acc.astype(f32) * rho)
        bound = r * f32(spec.out_bound) * a
        d = 2 * bound / f32(spec.out_res) if spec.out_res > 1 else 2 * bound * f32(spec.out_res)
        total = total + np.clip(code * np.where(d == 0, f32(1), d), -bound, bound)
        if noted is not None:
            noted.append((acc, code))
    return torch.from_numpy(total + bias)


def eager(x, weight, bias, ranges, spec, **changed):
    given = None if spec.range_mode == "dynamic" else ranges[: len(spec.in_sizes)]
    return linear.forward(Operands(x, weight, bias, given), spec._replace(**changed))[0]


def ready(x, weight, bias, ranges, spec):
    """The product of a compiled graph."""
    text = encode(spec)
    held, adc = prepared.prepare(weight, None, text)
    given = None if spec.range_mode == "dynamic" else ranges[: len(spec.in_sizes)]
    if given is not None:
        adc = prepared.limits(adc, given, text)
    return prepared.linear(x, held, adc, bias, None, given, None, text)


@pytest.mark.parametrize("compute", [eager, ready])
@pytest.mark.parametrize("name", SITES)
def test_every_output_is_that_of_integers(name, compute):
    spec, given = spec_of(SITES[name]), operands()
    assert integers.depth(spec)
    assert torch.equal(compute(*given, spec), by_hand(*given, spec))


def test_one_output_in_so_many_is_on_a_tie():
    """84 steps of the product are one of the ADC, so one sum in 84 is half way between two."""
    noted, given = [], operands(rows=4096)
    spec = spec_of(W4A8)
    expected = by_hand(*given, spec, noted)
    sums = np.concatenate([acc[:, [0, *range(2, 12)]].ravel() for acc, _ in noted])
    assert 0.9 / 84 < (sums % 84 == 42).mean() < 1.1 / 84
    assert torch.equal(eager(*given, spec), expected)
    # Sums of floats put some of them on the other side.
    floats = [linear.converted(given[0], given[3][0], spec)[:, :48], given[1][:, :48]]
    step = floats[1].abs().amax(1, keepdim=True) / 7
    q_w = torch.where(step > 0, (floats[1] / step).round(), 0) * step
    y = linear.product(floats[0], q_w)
    d = 2 * (given[3][0] * 12 * floats[1].abs().amax(1)) / 254
    codes = torch.where(d > 0, (y / d).round(), 0).numpy()
    assert (codes != noted[0][1]).sum() > 20


@pytest.mark.parametrize("compute", [eager, ready])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype, compute):
    spec, given = spec_of(W4A8), operands(dtype=dtype)
    assert torch.equal(compute(*given, spec), by_hand(*given, spec).to(dtype))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("compute", [eager, ready])
def test_sums_beyond_float32_are_exact(compute, narrow):
    """1,500 products of codes of 127, whose partial sums pass 2**24 and come back; or fewer."""
    spec = spec_of(W8A8, inputs=3000, tiles=1)
    x, weight, bias, ranges = operands(inputs=3000, rows=8)
    if not narrow:
        weight[2] = torch.cat([torch.full((1500,), 1.0), torch.full((1500,), -1.0)])
        x[:4] = 5.0
        x[:4, -700:] = torch.randn(4, 700)
    noted = []
    expected = by_hand(x, weight, bias, ranges, spec, noted)
    assert integers.depth(spec) < 3000 and (np.abs(noted[0][0]) > 1 << 22).any() != narrow
    assert torch.equal(compute(x, weight, bias, ranges, spec), expected)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [12, 450])
def test_convolutions(channels, groups):
    """By unfolded patches; 450 channels have more products than float32 sums."""
    torch.manual_seed(0)
    window = patches.Window([3, 3], [2, 1], [1, 1], [1, 1])
    outputs = 6
    x, weight = torch.randn(2, channels, 7, 6), torch.randn(outputs, channels // groups, 3, 3)
    bias, ranges = torch.randn(outputs), torch.tensor([1.5])
    inputs = weight[0].numel()
    spec = MVMSpec([inputs], [outputs], groups, **W8A8)
    found = conv.forward(Operands(x, weight, bias, ranges), window, spec)[0]
    columns = unfold(x, 3, padding=1, stride=(2, 1)).mT.reshape(-1, groups, inputs)
    one = spec._replace(groups=1, out_sizes=[outputs // groups])
    parts = zip(columns.unbind(1), weight.flatten(1).chunk(groups), bias.chunk(groups), strict=True)
    by_group = [by_hand(*part, ranges, one) for part in parts]
    expected = torch.cat(by_group, 1).view(2, -1, outputs).mT.reshape(found.shape)
    assert torch.equal(found, expected)
    text = encode(spec)
    held, adc = prepared.prepare(weight, None, text)
    adc = prepared.limits(adc, ranges, text)
    again = prepared.conv(x, held, adc, bias, None, ranges, None, encode(window), text)
    assert torch.equal(again, expected)


def test_wide_windows():
    """A window of more taps than float32 sums."""
    torch.manual_seed(0)
    window = patches.Window([40, 40], [40, 40], [0, 0], [1, 1])
    x, weight = torch.randn(1, 1, 80, 40), torch.randn(3, 1, 40, 40)
    spec = MVMSpec([1600], [3], **W8A8)
    found = conv.forward(Operands(x, weight, None, torch.tensor([2.0])), window, spec)[0]
    expected = by_hand(
        unfold(x, 40, stride=40)[0].T, weight.flatten(1), torch.zeros(3), torch.tensor([2.0]), spec
    )
    assert torch.equal(found.flatten(2)[0].T, expected)


@pytest.mark.parametrize("inputs", [8, 1200])
def test_nan_stays_in_its_row(inputs):
    spec = spec_of(W8A8, inputs=inputs, tiles=1)
    x, weight, bias, ranges = operands(inputs=inputs, rows=4)
    x[2, 5] = float("nan")
    for compute in (eager, ready):
        assert compute(x, weight, bias, ranges, spec).isnan().all(1).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_those_of_floats(keep):
    """Straight through both converters, and nothing where the ADC clipped.

    Of a bound that is no simple multiple of anything, so that floats decide alike.
    """
    x, weight, bias, ranges = operands(rows=64)
    spec = spec_of(W8A8 | {"out_bound": 0.5123, "decay": 0.01}, tiles=2)._replace(keep=keep)
    site = Operands(x, weight, bias, ranges)
    y, clipped, kept = linear.forward(site, spec)
    assert (clipped != 0).any() == keep
    grad = torch.randn_like(y)
    needs = [True, True, True, True, False]
    found = linear.backward(grad, site, clipped, kept, needs, spec)
    q_w = [
        (w / (w.abs().amax(1, keepdim=True) / 127)).nan_to_num().round()
        * (w.abs().amax(1, keepdim=True) / 127)
        for w in weight.split(48, 1)
    ]
    grads_x, grads_w = [], []
    for r, part, held, w in zip(ranges, x.split(48, 1), q_w, weight.split(48, 1), strict=True):
        step = 2 * r / 254
        q_x = (part.clamp(-r, r) / step).round() * step
        bound = r * 0.5123 * w.abs().amax(1)
        d = 2 * bound / 254
        passed = grad * (((q_x @ held.T / d).round() * d).nan_to_num().abs() <= bound)
        grads_x.append(passed @ held * (part.abs() <= r))
        grads_w.append(passed.T @ q_x)
    torch.testing.assert_close(found.x, torch.cat(grads_x, 1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.weight, torch.cat(grads_w, 1), rtol=1e-5, atol=1e-3)


def test_what_is_not_of_integers():
    """Noise, floats on one side, no ADC, and converters too fine for float32's sums."""
    spec = spec_of(W4A8)
    for other in (
        {"noise_std": 0.1},
        {"out_noise": 0.1},
        {"inp_res": 0.0},
        {"weight_states": 0.0},
        {"out_res": 0.0},
        {"range_mode": "none"},
        {"inp_res": 2.0**16, "weight_states": 2.0**12},
    ):
        assert not integers.depth(spec._replace(**other))
    assert integers.depth(spec) * 127 * 7 < 1 << 24 <= (integers.depth(spec) + 1) * 127 * 7
    assert integers.depth(spec._replace(weight_states=254.0)) * 127 * 127 < 1 << 24


def test_both_modes_of_training_agree():
    """What keeps bits for a backward computes what does not."""
    given, spec = operands(), spec_of(W4A8)
    assert torch.equal(eager(*given, spec, keep=True), eager(*given, spec))
