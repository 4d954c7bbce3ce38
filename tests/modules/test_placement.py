"""Programs follow what is done to a module, and serve several threads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from samples import clip, merged, ranged
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import analogfx
from analogfx.errors import CaptureError

IDENTITY = {"mapping": {"max_input_size": 5}}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def linear(**options):
    torch.manual_seed(1)
    return nn.Linear(8, 6, **options)


def close(analog, weight, bias):
    torch.testing.assert_close(analog(X), F.linear(X, weight, bias))


# -------------------------------------------------------------------- parameters come and go


def test_a_bias_comes_and_goes():
    analog = analogfx.analogize(linear(bias=False), IDENTITY)
    bias = nn.Parameter(torch.arange(6.0))
    analog.bias = bias
    close(analog, analog.weight, bias)
    analog.bias = None
    close(analog, analog.weight, None)


@pytest.mark.parametrize("shape", [(9, 8), (3, 8)])
def test_a_weight_of_other_outputs(shape):
    analog = analogfx.analogize(linear(bias=False), merged(IDENTITY, clip("LearnablePerChannel")))
    analog.weight = nn.Parameter(torch.randn(shape))
    analog.out_features = shape[0]
    close(analog.eval(), analog.weight, None)
    assert analogfx.report(analog).sites[0].weight_shape == shape


def test_a_weight_of_other_inputs_refuses_old_inputs():
    analog = analogfx.analogize(linear(), IDENTITY)
    analog.weight = nn.Parameter(torch.randn(6, 7))
    with pytest.raises((RuntimeError, ValueError), match="8"):
        analog(X)
    torch.testing.assert_close(analog(X[:, :7]), F.linear(X[:, :7], analog.weight, analog.bias))


def test_a_product_that_comes_later_has_no_range():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
            self.both = False

        def forward(self, x):
            x = x @ self.first
            return x @ self.second if self.both else x

    analog = analogfx.analogize(Two(), IDENTITY)
    with pytest.raises(
        CaptureError, match=r"multiplies by \['first'\] or by \['first', 'second'\]"
    ):
        analog.both = True
    assert analog.both is False
    torch.testing.assert_close(analog(X), X @ analog.first)


def test_a_replaced_layer_is_digital_in_the_report():
    analog = analogfx.analogize(nn.Sequential(linear(), linear()), IDENTITY)
    analog[0] = nn.Linear(8, 8)
    first, second = analogfx.report(analog).sites
    assert (first.status, second.status) == ("digital", "analog")
    assert "after analogize()" in first.reason


def test_parametrizations_come_and_go():
    analog = analogfx.analogize(linear(), IDENTITY)
    weight = analog.weight.detach().clone()
    parametrizations.weight_norm(analog)
    with torch.no_grad():
        analog.parametrizations.weight.original0.mul_(2)
    close(analog, 2 * weight, analog.bias)
    parametrize.remove_parametrizations(analog, "weight")
    close(analog, 2 * weight, analog.bias)
    assert isinstance(analogfx.to_digital(analog), nn.Linear)


def test_hooks_on_the_instance_survive_the_way_back():
    analog = analogfx.analogize(linear(), IDENTITY)
    inner = analog.forward
    analog.forward = lambda x: inner(x) + 1
    torch.testing.assert_close(analog(X), F.linear(X, analog.weight, analog.bias) + 1)
    digital = analogfx.to_digital(analog, inplace=True)
    torch.testing.assert_close(digital(X), F.linear(X, digital.weight, digital.bias) + 1)


def test_swapped_tensors_are_the_weights():
    analog = analogfx.analogize(linear(), IDENTITY)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        analog.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    x = X.double()
    torch.testing.assert_close(analog(x), F.linear(x, analog.weight, analog.bias))


# -------------------------------------------------------------------------- clips and their order


@pytest.mark.parametrize("order", ["to_empty then reset", "to_empty then filled"])
def test_clips_learned_from_meta_start_from_the_weights(order):
    with torch.device("meta"):
        model = nn.Linear(8, 6)
    analog = analogfx.analogize(model, clip("LearnablePerChannel"))
    analog.to_empty(device="cpu")
    if order == "to_empty then reset":
        analog.reset_parameters()
    else:
        with torch.no_grad():
            analog.weight.copy_(linear().weight)
            analog.bias.zero_()
    analog(X)
    clips = next(v for n, v in analog.named_parameters() if "clip" in n)
    largest = analog.weight.abs().amax(1)
    torch.testing.assert_close(clips.detach().flatten().sort()[0], largest.detach().sort()[0])


def test_a_layer_of_zeros_learns():
    layer = linear()
    nn.init.zeros_(layer.weight)
    bounded = {"forward": {"out_bound": 12.0, "inp_res": 254, "out_res": 254}}
    analog = analogfx.analogize(layer, merged(ranged(), clip("LearnablePerChannel"), bounded))
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (analog(X) - 1).square().mean().backward()
        optimizer.step()
    assert analog.weight.abs().sum() > 0


def test_quantizing_is_all_or_nothing():
    class Computed(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.clamp(-1, 1), self.bias)

    rounded = {"modifier": {"quantization_type": "DiscretizePerChannel", "res": 14}}
    analog = analogfx.analogize(nn.Sequential(linear(), Computed(6, 4)), rounded)
    before = copy.deepcopy(analog.state_dict())
    with pytest.raises(CaptureError, match="computed from weight"):
        analogfx.quantize_weights(analog)
    assert all(torch.equal(v, before[k]) for k, v in analog.state_dict().items())


# --------------------------------------------------------------------------------------- threads


def in_threads(function, count=4, times=4):
    start = threading.Barrier(count)

    def run(number):
        start.wait()
        return [function(number) for _ in range(times)]

    with ThreadPoolExecutor(count) as pool:
        return [made for many in pool.map(run, range(count)) for made in many]


def test_models_are_made_in_several_threads():
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(6, 3))
    call = nn.Module.__call__
    expected = model(X)
    for analog in in_threads(lambda _: analogfx.analogize(model, IDENTITY)):
        torch.testing.assert_close(analog(X), expected)
    assert nn.Module.__call__ is call
    torch.testing.assert_close(nn.Linear(8, 2)(X).shape, torch.Size([4, 2]))


def test_a_first_call_with_a_new_constant_waits():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return F.linear(x, self.weight, self.bias) * scale

    torch.manual_seed(1)
    analog = analogfx.analogize(Scaled(8, 6), IDENTITY).eval()
    expected = F.linear(X, analog.weight, analog.bias)
    for number, y in in_threads(lambda n: (n, analog(X, scale=float(n + 2)))):
        torch.testing.assert_close(y, expected * (number + 2))
