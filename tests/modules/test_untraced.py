"""Forwards that no trace follows: their products are done by the sites that they belong to."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from samples import COARSE, IDENTITY
from torch import nn

import analogfx

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
FRAMES = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))


def helper(x, weight, bias):
    """No trace follows it: it branches on values."""
    return F.linear(x, weight, bias) if x.sum() > -1e9 else x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.child = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=2, groups=4)
        self.own = nn.Parameter(torch.randn(4, 2, 3))
        self.blocks = nn.Parameter(torch.randn(2, 2, 2))


def made(forward):
    return type("Hidden", (Base,), {"forward": forward})()


def by_a_helper(self, x):
    return helper(x, self.child.weight, self.child.bias)


def without_the_bias(self, x):
    return helper(x, self.child.weight, None) + self.child.bias


def weight_on_the_left(self, x):
    if x.sum() > -1e9:
        x = (self.child.weight @ x.t()).t() + self.child.bias
    return x


def by_einsum(self, x):
    if x.sum() > -1e9:
        x = torch.einsum("ni,oi->no", x, self.child.weight) + self.child.bias
    return x


def a_view_there_and_back(self, x):
    return helper(x, self.child.weight.unsqueeze(1).squeeze(1), self.child.bias)


def by_keywords(self, x):
    return helper(x, weight=self.child.weight, bias=self.child.bias)


CHILDREN = [
    by_a_helper,
    without_the_bias,
    weight_on_the_left,
    by_einsum,
    a_view_there_and_back,
    by_keywords,
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", CHILDREN)
def test_a_product_of_a_childs_weight_is_what_the_child_computes(forward, training):
    digital = made(forward)
    analog = analogfx.analogize(digital, COARSE, strict=True).train(training)
    child = analogfx.analogize(copy.deepcopy(digital.child), COARSE).train(training)
    torch.testing.assert_close(analog(X), child(X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(analog.child.input_range, child.input_range)
    seen = analogfx.audit(analog, X)
    assert (
        seen.ok and seen.coverage == 1.0 and not any(p.status == "digital" for p in seen.products)
    )


def test_a_convolution_of_another_padding_is_the_childs_site():
    def forward(self, x):
        steps = x if x.sum() > -1e9 else -x
        return F.conv1d(steps, self.conv.weight, self.conv.bias, padding=0, groups=4)

    digital = made(forward).eval()
    analog = analogfx.analogize(digital, COARSE, strict=True)
    whole = analogfx.analogize(copy.deepcopy(digital.conv), COARSE)
    assert torch.equal(analog(FRAMES), whole(FRAMES)[..., 2:-2])


def own(self, x):
    y = torch.einsum("ni,iho->nho", x, self.own)
    if y.sum() > 1e9:
        y = -y
    blocks = torch.bmm(x.view(-1, 2, 2).transpose(0, 1), self.blocks)
    return y, blocks


def test_products_of_its_own_weights_are_sites_of_the_module():
    digital = made(own)
    analog = analogfx.analogize(digital, COARSE, strict=True)
    first, _ = analog(X)
    assert [s.name for s in analogfx.report(analog).sites if s.status == "analog"][:2] == [
        "own",
        "blocks",
    ]
    layer = nn.Linear(4, 6, bias=False)
    layer.weight.data = digital.own.detach().flatten(1).t().contiguous()
    alone = analogfx.analogize(layer, COARSE)
    torch.testing.assert_close(first.flatten(1), alone(X), rtol=1e-6, atol=1e-6)
    seen = analogfx.audit(analog, X)
    assert seen.ok and seen.coverage == 1.0


def both(self, x):
    return torch.einsum("ni,iho->nho", without_the_bias(self, x), self.own)


def test_gradients_are_those_of_the_digital_forward():
    digital = made(both)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    for model in (digital, analog):
        model(X).square().sum().backward()
    got = {n: p.grad for n, p in analog.named_parameters() if p.grad is not None}
    assert {"own", "child.weight", "child.bias"} <= got.keys()
    for name in ("own", "child.weight", "child.bias"):
        parameter = digital.get_parameter(name)
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-5)


def doubled(self, x):
    return helper(x, self.child.weight * 2.0, None)


def test_what_was_not_foreseen_warns_once_and_is_listed():
    digital = made(doubled)
    analog = analogfx.analogize(digital, COARSE)
    with pytest.warns(UserWarning, match=r"Hidden: digital by child.weight: it multiplies by what"):
        y = analog(X)
    assert torch.equal(y, analog(X)) and torch.equal(y, F.linear(X, digital.child.weight * 2.0))
    rows = [(s.parameter, s.status) for s in analogfx.report(analog).sites]
    assert ("child.weight", "digital") in rows


def test_a_copy_and_a_pickle_compute_the_same():
    digital = made(without_the_bias)
    analog = analogfx.analogize(digital, COARSE)
    y = analog(X)
    assert torch.equal(copy.deepcopy(analog)(X), y)
    again = analogfx.analogize(Pickled(), COARSE)
    assert torch.equal(pickle.loads(pickle.dumps(again))(X), again(X))


class Pickled(Base):
    def forward(self, x):
        return helper(x, self.child.weight, None)


def test_a_chip_has_the_childs_weights():
    analog = analogfx.analogize(made(without_the_bias), COARSE).eval()
    device = analogfx.program(analog, noise_model=analogfx.chip.PCMLikeNoiseModel(), seed=3)
    with device.at(3600.0):
        y, child = analog(X), analog.child(X)
    torch.testing.assert_close(y, child, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, analog(X), atol=1e-3)


def test_a_forward_may_set_attributes():
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return helper(x, self.child.weight, self.child.bias)

    analog = analogfx.analogize(made(forward), COARSE, strict=True)
    analog(X)
    programs = analog._analog.programs
    analog(X)
    assert analog.calls == 2 and analog._analog.programs is programs
