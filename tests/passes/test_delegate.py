import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, assert_same, ranges, step, twins
from samples import IDENTITY
from torch import nn

import analogfx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def reads(child, forward):
    """A module that multiplies by the weights of a child, and never calls it."""
    module = type("Reads", (nn.Module,), {"forward": forward})()
    module.child = child
    return module


LINEAR = nn.Linear(6, 4)
CONV = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
OF_THE_CHILD = {
    "linear": (LINEAR, lambda s, x: F.linear(x, s.child.weight, s.child.bias), (5, 6)),
    "matmul": (nn.Linear(6, 4, bias=False), lambda s, x: x @ s.child.weight.t(), (5, 6)),
    "conv": (
        CONV, lambda s, x: F.conv2d(x, s.child.weight, s.child.bias, s.child.stride, 1, groups=2),
        (2, 4, 7, 7)),
}  # fmt: skip
OF_THE_MODULE = {
    "without the bias": (LINEAR, lambda s, x: F.linear(x, s.child.weight), (5, 6)),
    "part of the weight": (LINEAR, lambda s, x: F.linear(x, s.child.weight[:2]), (5, 6)),
    "another geometry": (
        CONV, lambda s, x: F.conv2d(x, s.child.weight, s.child.bias, groups=2), (2, 4, 7, 7)),
    "no product of the child's": (
        nn.Embedding(4, 6), lambda s, x: F.linear(x, s.child.weight), (5, 6)),
    "a child with a forward of its own": (
        type("Own", (nn.Linear,), {"forward": lambda self, x: x})(6, 4),
        lambda s, x: F.linear(x, s.child.weight, s.child.bias), (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_CHILD)
def test_a_childs_product_has_the_childs_site_in_both_front_ends(name):
    child, forward, shape = OF_THE_CHILD[name]
    module = reads(child, forward)
    x = torch.randn(shape)
    exact = analogfx.analogize(module, IDENTITY, strict=True)
    torch.testing.assert_close(exact(x), module(x))
    assert [s.name for s in analogfx.report(exact).sites] == ["child"]

    twin, analog = twins(module, DYNAMO_CONFIGS["everything"])
    assert_same(step(twin, x, 0), step(analog, x, 0))
    assert_same(ranges(twin), ranges(analog))
    assert {n for n in ranges(analog) if n.endswith("input_range")} == {"child.input_range"}


@pytest.mark.parametrize("name", OF_THE_MODULE)
def test_a_product_that_no_child_computes_is_the_modules_own(name):
    child, forward, shape = OF_THE_MODULE[name]
    module = reads(child, forward)
    x = torch.randn(shape)
    exact = analogfx.analogize(module, IDENTITY)
    torch.testing.assert_close(exact(x), module(x))
    assert "child.weight" in [s.name for s in analogfx.report(exact).sites]
    twin, analog = twins(module, DYNAMO_CONFIGS["everything"])
    assert_same(step(twin, x, 0), step(analog, x, 0))


def test_the_childs_config_decides():
    child, forward, _ = OF_THE_CHILD["linear"]
    analog = analogfx.analogize(reads(child, forward), {"child": None, "*": IDENTITY})
    (site,) = analogfx.report(analog).sites
    assert (site.name, site.status, site.asked) == ("child", "digital", True)
