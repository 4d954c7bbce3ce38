import pytest
import torch
from torch import nn

from analogfx.kernels import linear, small
from analogfx.kernels.operands import Operands
from analogfx.kernels.spec import MVMSpec

RANGE = {"range_mode": "static", "decay": 0.01, "input_min_percentage": 0.95}
ADC = {"out_bound": 1.5, "out_res": 61.0}
SPECS = {
    "identity": {},
    "range": RANGE,
    "DAC": RANGE | {"inp_res": 30.0},
    "DAC and ADC": RANGE | {"inp_res": 30.0} | ADC,
    "resolutions as fractions": RANGE | {"inp_res": 1 / 30, "out_bound": 1.5, "out_res": 0.07},
    "bounds of rows": RANGE | ADC | {"bound_per_channel": True},
    "bound without steps": RANGE | {"out_bound": 1.5},
    "fast": ADC | {"range_mode": "fast", "inp_res": 30.0},
    "no decay while few are saturated": RANGE | {"decay": 0.3, "input_min_percentage": 1.0},
    "noise": {"noise_std": 0.1},
    "noise of rows": RANGE | ADC | {"noise_std": 0.1, "noise_per_channel": True, "inp_res": 254.0},
}
WEIGHTS = ("as made", "a row of zeros", "zeros", "tiny", "a row of NaN", "an infinite weight")


def case(name, weight, keep=True, shape=(5, 12), outputs=7):
    torch.manual_seed(0)
    w = torch.randn(outputs, shape[-1]) / 3
    if weight == "a row of zeros":
        w[2] = 0
    elif weight == "zeros":
        w.zero_()
    elif weight == "tiny":
        w[1] *= 1e-40
    elif weight == "a row of NaN":
        w[3] = float("nan")
    elif weight == "an infinite weight":
        w[3, 1] = float("inf")
    spec = MVMSpec([shape[-1]], [outputs], keep=keep, **SPECS[name])
    r = None if spec.range_mode == "none" else torch.tensor([1.3])
    seed = torch.tensor(5) if spec.noise_std else None
    return torch.randn(shape), w, torch.randn(outputs), r, seed, spec


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.numel() == 0 and b.numel() == 0) or torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", SPECS)
def test_every_bit_is_that_of_the_general_product(name, weight, keep):
    x, w, bias, r, seed, spec = case(name, weight, keep)
    scalars, value = small.made(spec), 1.0 if r is None else float(r)
    assert scalars is not None and small.serves(x, w, value, scalars)
    for b in (bias, None):
        expected = linear.forward(Operands(x, w, b, r, None, seed), spec)
        found = small.forward(x, w, b, r, value, seed, scalars)
        same(found, expected)
    kept = expected[1:]
    for inputs in (x, x * 0.1):  # saturated, and not
        for needs in ([True] * 4, [False, True, True, True], [True, False, False, False]):
            wanted = [*needs[:3], needs[3] and r is not None, False]
            grad = torch.randn(expected[0].shape)
            of = linear.backward(
                grad, Operands(inputs, w, None, r, None, seed), *kept, wanted, spec
            )
            same(small.backward(grad, inputs, w, r, value, seed, *kept, wanted, scalars), of)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (2, 1, 3, 12)])
@pytest.mark.parametrize("name", ["identity", "range", "DAC and ADC"])
def test_inputs_of_any_shape_give_an_output_that_may_be_written_to(name, shape):
    x, w, bias, r, seed, spec = case(name, "as made", shape=shape)
    for inputs in (x, x.mT.contiguous().mT if x.dim() > 1 else x):
        y, *kept = small.forward(inputs, w, bias, r, 1.3, seed, small.made(spec))
        same([y, *kept], linear.forward(Operands(inputs, w, bias, r, None, seed), spec))
        assert not y._is_view()
        needs = [True, True, True, r is not None, False]
        grad = torch.ones(()).expand(y.shape)  # as sum() gives it, without strides
        of = linear.backward(grad, Operands(inputs, w, None, r, None, seed), *kept, needs, spec)
        same(small.backward(grad, inputs, w, r, 1.3, seed, *kept, needs, small.made(spec)), of)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-38, 1e38, float("inf"), float("nan")])
def test_ranges_at_the_end_of_all_numbers_are_left_to_the_general_product(value):
    x, w, _, _, _, spec = case("DAC and ADC", "as made")
    assert not small.serves(x, w, value, small.made(spec))


def test_large_and_empty_operands_are_left_to_the_general_product():
    _, _, _, _, _, spec = case("DAC and ADC", "as made")
    scalars = small.made(spec)
    wide = small.LARGEST // 12 + 1
    for rows, outputs, serves in ((1, 7, True), (0, 7, False), (1, 0, False), (wide, 7, False),
                                  (1, wide, False), (wide // 2, 40, False)):  # fmt: skip
        x, w = torch.ones(rows, 12), torch.ones(outputs, 12)
        assert small.serves(x, w, 1.0, scalars) == serves


@pytest.mark.parametrize(
    "other",
    [{"in_sizes": [6, 6]}, {"out_sizes": [3, 4]}, {"groups": 2}, {"weight_states": 14.0},
     {"out_noise": 0.1}, {"range_mode": "dynamic"}, {"activation": "relu"}],
    ids=str,
)  # fmt: skip
def test_other_sites_are_not_served(other):
    assert small.made(MVMSpec([12], [7])._replace(**other)) is None


def test_constants_are_real_wherever_a_program_is_built():
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = case("noise of rows", "as made")[-1]
    with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
        made = small.made(spec)
    for constant in (made.noise_std, made.out_bound, made.dac.constant, made.decay):
        assert type(constant) is torch.Tensor and constant.device.type == "cpu"
        assert not constant.is_inference()
    assert nn.Parameter(made.noise_std).item() == pytest.approx(0.1)
