"""How users put analog layers into code of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from samples import EVERYTHING, IDENTITY, merged, ranged
from torch import nn

import analogfx
from analogfx import recipes
from analogfx.errors import CaptureError

RANGES = merged(ranged(init_from_data=100), {"forward": {"inp_res": 254}})


@pytest.mark.parametrize("config", [IDENTITY, EVERYTHING, RANGES], ids=["ideal", "all", "ranges"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Linear(6, 4), (6,)),
        (nn.Linear(6, 4, bias=False), (2, 3, 6)),
        (nn.Linear(6, 4).bfloat16(), (2, 3, 6)),
        (nn.Conv2d(2, 4, 3), (1, 2, 5, 5)),
        (nn.Conv2d(2, 4, 3), (2, 5, 5)),
    ],
    ids=["2d", "1d", "3d", "bf16", "conv", "unbatched conv"],
)
def test_what_follows_may_write_to_the_output(layer, shape, training, config):
    model = analogfx.analogize(nn.Sequential(nn.Sequential(layer), nn.ReLU(inplace=True)), config)
    model.train(training)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    model(x).sum().backward()
    y = model[0](x)
    y += 1
    y.sum().backward()
    assert model[0][0].weight.grad is not None


def test_an_operand_may_not_be_written_to():
    model = analogfx.analogize(nn.Linear(4, 4), RANGES)
    x = torch.randn(2, 4)
    before = x.clone()
    model(x).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 7), r"head: expected an input \(..., 8\), found \(2, 7\)"),
        (torch.tensor(1.0), r"head: expected an input \(..., 8\), found \(\)"),
        (torch.randn(2, 8).double(), "head: the input is torch.float64, the weight torch.float32"),
        (torch.ones(2, 8).long(), "head: expected .* of floating point, found a torch.int64"),
        ([1.0, 2.0], "head: expected a tensor of floating point, found list"),
        (torch.randn(2, 8, device="meta"), "head: the input is on meta, the weight on cpu"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named_before_ranges_follow_it(x, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(x)

    model = analogfx.analogize(Model(), RANGES)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, TypeError), match=message):
        model(x)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_image_of_the_wrong_shape_is_named():
    model = analogfx.analogize(nn.Sequential(nn.Conv2d(3, 4, 3)), RANGES)
    with pytest.raises(RuntimeError, match=r"0: expected an input \(batch, 3, size, size\)"):
        model(torch.randn(2, 4, 8, 8))


def test_a_range_below_zero_acts_by_its_magnitude():
    model = analogfx.analogize(nn.Linear(8, 4), RANGES).eval()
    mirrored = copy.deepcopy(model)
    with torch.no_grad():
        mirrored.input_range.neg_()
    x = torch.randn(16, 8) * 3
    outputs = [layer(x) for layer in (model, mirrored)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.sum().backward()
    assert torch.equal(model.input_range.grad, -mirrored.input_range.grad)


class Scaled(nn.Module):
    """A product with a parameter whose code reads attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.scale = 1.0
        self.on = True

    def forward(self, x, gain=0):
        y = x @ self.weight if self.on else x
        return y * self.scale + (100 if gain is True else gain)


def test_attributes_that_the_forward_reads_may_change():
    digital = Scaled()
    analog, x = analogfx.analogize(digital, IDENTITY), torch.randn(2, 4)
    for model in (digital, analog):
        model.scale = 3.0
    torch.testing.assert_close(analog(x), digital(x))
    with pytest.raises(CaptureError, match="multiplies by"):
        analog.on = False  # and with it the site
    assert analog.on
    torch.testing.assert_close(analog(x), digital(x))


def test_one_and_true_are_different_arguments():
    digital = Scaled()
    analog, x = analogfx.analogize(digital, IDENTITY), torch.randn(2, 4)
    for gain in (0, False, 1, True, 1.0):
        torch.testing.assert_close(analog(x, gain), digital(x, gain))


def test_many_constants_of_one_argument_are_a_warning():
    analog, x = analogfx.analogize(Scaled(), IDENTITY), torch.randn(2, 4)
    for gain in range(29):
        analog(x, float(gain))
    with pytest.warns(UserWarning, match="pass what varies as a tensor"):
        analog(x, 29.0)


def test_a_weight_is_chosen_by_the_mode_or_not_at_all():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(n, 5)) for n in (4, 7))

        def forward(self, x):
            return F.linear(x, self.a if self.training else self.b)

    (site,) = analogfx.report(analogfx.analogize(Either(), IDENTITY)).sites[:1]
    assert site.status == "digital"
    assert "multiplies by" in site.reason


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return F.linear(x, self.weight.clamp(-1, 1))


def test_nothing_is_written_back_to_a_computed_weight():
    rounded = {"modifier": {"quantization_type": "DiscretizePerChannel", "res": 14}}
    analog = analogfx.analogize(Computed(), rounded)
    before = analog.weight.detach().clone()
    with pytest.raises(CaptureError, match="computed from weight"):
        analogfx.quantize_weights(analog)
    assert torch.equal(analog.weight, before)


def test_a_layer_of_one_input_keeps_its_weights_through_clipping():
    analog = analogfx.analogize(nn.Linear(1, 4), recipes.afm())
    before = analog.weight.detach().clone()
    analogfx.clip_weights(analog)
    assert torch.equal(analog.weight, before)


def test_a_tied_weight_is_clipped_once():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    config = {"clip": {"type": "LayerGaussian", "sigma": 1.0}}
    alone = analogfx.analogize(copy.deepcopy(tied[0]), config)
    both = analogfx.analogize(tied, config)
    for model in (alone, both):
        analogfx.clip_weights(model)
    assert torch.equal(alone.weight, both[0].weight)


def test_helpers_refuse_what_they_cannot_help():
    digital, analog = nn.Linear(4, 4), analogfx.analogize(nn.Linear(4, 4), RANGES)
    optimizer = torch.optim.SGD(analog.parameters())
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.clip_after_step(optimizer, digital)
    with pytest.raises(TypeError, match="takes an optimizer, found AnalogLinear"):
        analogfx.clip_after_step(analog, optimizer)
    with pytest.raises(ValueError, match="holds no parameter"):
        analogfx.clip_after_step(torch.optim.SGD(digital.parameters()), analog)
    with pytest.raises(TypeError, match="no analog layer"), analogfx.programmed(digital, 0.1):
        pass
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, found Tensor"):
        analogfx.analogize(torch.ones(2), RANGES)
    with pytest.raises(analogfx.errors.ConfigError, match="TorchInferenceRPUConfig\\(\\), made"):
        analogfx.analogize(digital, analogfx.TorchInferenceRPUConfig)


def test_an_attribute_of_a_states_name_keeps_a_layer_digital():
    layer = nn.Linear(4, 4)
    layer.input_range = 3.0
    model = nn.Sequential(nn.Linear(4, 4), layer)
    analog = analogfx.analogize(model, RANGES, inplace=True)
    assert [s.status for s in analogfx.report(analog).sites] == ["analog", "digital"]
    assert "input_range of its own" in analogfx.report(analog).sites[1].reason


class Untraceable(nn.Module):
    """Multiplies by a weight of its own in code that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return F.linear(x, self.matrix) if x.sum() > 0 else x


@pytest.mark.parametrize("model", [Untraceable()])
def test_strict_refuses_what_cannot_be_seen(model):
    with pytest.raises(analogfx.errors.PlacementError, match=type(model).__name__):
        analogfx.analogize(nn.Sequential(model), RANGES, strict=True)
