"""Layers whose own forward cannot be traced, but calls the one that it inherits."""

import copy
import pickle

import pytest
import torch
from samples import COARSE, CONFIGS, IDENTITY
from torch import nn

import analogfx
from analogfx.modules.analog_module import AnalogModule


class Router(nn.Linear):
    """A linear layer that chooses; a trace does not follow how."""

    def forward(self, x, *rest):
        scores = super().forward(x)
        with torch.no_grad():
            best = scores.argmax(-1)
        return scores, [int(i) for i in best.flatten()]


class Scaled(nn.Conv1d):
    def forward(self, x):
        scale = float(x.detach().abs().max())
        return super().forward(x / scale) * scale


class Extended(nn.Linear):
    """What it has besides its layer is in no graph."""

    def __init__(self):
        super().__init__(6, 4)
        self.extra = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        both = super().forward(x) + x @ self.extra.T
        return both * float(both.detach().sum() > 0)


class Replaced(nn.Linear):
    """A forward of its own, which is not that of its layer."""

    def forward(self, x):
        return x * float(x.detach().sum()) @ self.weight.T


@pytest.mark.parametrize("name", ["identity", "everything"])
def test_the_inherited_product_is_that_of_the_layer(name):
    torch.manual_seed(0)
    router, plain = Router(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(router.state_dict())
    found, expected = (analogfx.analogize(m, CONFIGS[name], strict=True) for m in (router, plain))
    for step in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        scores, best = found(x)
        torch.manual_seed(step)
        y = expected(x)
        assert torch.equal(scores, y) and best == y.argmax(-1).tolist()
        scores.sum().backward()
        y.sum().backward()
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert found.state_dict().keys() == expected.state_dict().keys()
    (site,) = analogfx.report(found).sites
    assert (site.status, site.kind, site.name) == ("analog", "linear", "weight")


def test_a_convolution():
    torch.manual_seed(0)
    layer, x = Scaled(3, 4, 2), torch.randn(2, 3, 7)
    torch.testing.assert_close(analogfx.analogize(layer, IDENTITY)(x), layer(x))
    assert not torch.allclose(analogfx.analogize(layer, COARSE)(x), layer(x), atol=1e-3)


def test_there_and_back_and_through_a_pickle(tmp_path):
    torch.manual_seed(0)
    digital, x = nn.Sequential(Router(6, 4)), torch.randn(5, 6)
    analog = analogfx.analogize(digital, COARSE).eval()
    scores, _ = analog(x)
    assert isinstance(analog[0], Router) and isinstance(analog[0], AnalogModule)
    for other in (copy.deepcopy(analog), pickle.loads(pickle.dumps(analog))):
        assert torch.equal(other(x)[0], scores)
    analogfx.save(analog, tmp_path)
    assert torch.equal(analogfx.load(digital, tmp_path).eval()(x)[0], scores)
    back = analogfx.to_digital(analog)
    assert type(back[0]) is Router and torch.equal(back(x)[0], digital(x)[0])


def test_what_else_the_layer_has_is_listed():
    analog = analogfx.analogize(nn.Sequential(Extended()), COARSE)
    rows = {s.name: s.status for s in analogfx.report(analog).sites}
    assert rows == {"0": "analog", "0.extra": "digital"}


def test_a_layer_that_does_not_call_what_it_inherits_stays_digital():
    analog = analogfx.analogize(Replaced(6, 4), COARSE)
    (site,) = analogfx.report(analog).sites
    assert site.status == "digital" and "cannot be traced" in site.reason
