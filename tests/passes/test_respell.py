import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, assert_same, ranges, step, twins
from samples import IDENTITY, after, product, run, text

import analogfx
from analogfx.passes.respell import respell

aten = torch.ops.aten
X, W = (3, 6), (4, 6)
IMAGE = (2, 4, 5, 3)

SPELLINGS = {
    # name: (forward, shapes of the parameters, shape of the input, the report's kind)
    "vector": (lambda s, x: x @ s.v, {"v": (6,)}, X, "matmul"),
    "vector on the left": (lambda s, x: s.v @ x, {"v": (3,)}, (2, 3, 6), "matmul"),
    "linear of a vector": (
        lambda s, x: F.linear(x, s.v), {"v": (6,)}, X, "linear"),
    "mv": (lambda s, x: torch.mv(s.w, x), {"w": W}, (6,), "mv"),
    ".mv by a vector": (lambda s, x: x.mv(s.v), {"v": (6,)}, X, "mv"),
    "dot": (lambda s, x: torch.dot(s.v, x), {"v": (6,)}, (6,), "dot"),
    "addmv": (
        lambda s, x: torch.addmv(s.b, s.w, x, beta=0.5, alpha=2), {"w": W, "b": (4,)}, (6,),
        "addmv"),
    ".addmv, beta 0": (
        lambda s, x: torch.full_like(x, float("nan"))[:, 0].addmv(x, s.v, beta=0), {"v": (6,)}, X,
        "addmv"),
    "addbmm": (
        lambda s, x: torch.addbmm(s.b, x, s.w, alpha=3), {"w": (2, 6, 4), "b": (3, 4)}, (2, 3, 6),
        "addbmm"),
    "addbmm, weight first": (
        lambda s, x: torch.addbmm(s.b, s.w, x), {"w": (2, 4, 3), "b": (4, 6)}, (2, 3, 6),
        "addbmm"),
    "inner": (lambda s, x: torch.inner(x, s.w), {"w": W}, (2, 3, 6), "inner"),
    "inner, three axes": (lambda s, x: torch.inner(x, s.w), {"w": (2, 4, 6)}, (3, 6), "inner"),
    "inner, weight first": (
        lambda s, x: torch.inner(s.w, x), {"w": (2, 4, 6)}, (5, 3, 6), "inner"),
    "inner of vectors": (lambda s, x: x.inner(s.v), {"v": (6,)}, (6,), "inner"),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, 1), {"w": (6, 4)}, (2, 3, 6), "tensordot"),
    "tensordot, two axes": (
        lambda s, x: torch.tensordot(x, s.w), {"w": (3, 6, 2, 4)}, (5, 3, 6), "tensordot"),
    "tensordot, axes": (
        lambda s, x: torch.tensordot(x, s.w, dims=([0, -1], [2, 1])), {"w": (4, 6, 2, 5)},
        (2, 3, 6), "tensordot"),
    "tensordot, weight first": (
        lambda s, x: torch.tensordot(s.w, x, ([1, -1], [1, 2])), {"w": (4, 3, 5, 6)}, (2, 3, 6),
        "tensordot"),
    "tensordot to a scalar": (lambda s, x: torch.tensordot(x, s.w), {"w": X}, X, "tensordot"),
    "multi_dot": (
        lambda s, x: torch.linalg.multi_dot([s.a, x, s.b, s.c]),
        {"a": (5, 3), "b": (6, 4), "c": (4, 2)}, X, "multi_dot"),
    "multi_dot of vectors": (
        lambda s, x: torch.linalg.multi_dot([s.a, x, s.b]), {"a": (3,), "b": (6,)}, X,
        "multi_dot"),
    "expanded": (
        lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], -1, -1)), {"w": (6, 4)}, (2, 3, 6),
        "bmm"),
    "unsqueezed and expanded": (
        lambda s, x: torch.bmm(x, s.w.unsqueeze(0).expand(x.size(0), 6, 4)), {"w": (6, 4)},
        (2, 3, 6), "bmm"),
    "expanded, first": (
        lambda s, x: s.w.expand(x.shape[0], -1, -1) @ x, {"w": (4, 3)}, (2, 3, 6), "matmul"),
    "expanded along an axis that x lacks": (
        lambda s, x: x @ s.w.expand(5, x.shape[0], 6, 4), {"w": (6, 4)}, (2, 3, 6), "matmul"),
    "repeated": (
        lambda s, x: torch.bmm(x, s.w.repeat(x.shape[0], 1, 1)), {"w": (6, 4)}, (2, 3, 6), "bmm"),
    "einsum of three": (
        lambda s, x: torch.einsum("ni,oi,n->on", x, s.w, x[:, 0]), {"w": W}, X, "einsum"),
    "einsum of two factors": (
        lambda s, x: torch.einsum("...i,ir,ro->...o", x, s.a, s.b), {"a": (6, 2), "b": (2, 4)},
        (2, 3, 6), "einsum"),
    "einsum, bilinear": (
        lambda s, x: torch.einsum("ni,oij,nj->no", x, s.w, x.tanh()), {"w": (4, 6, 6)}, X,
        "einsum"),
    "einsum, implicit": (lambda s, x: torch.einsum("zi,oi", x, s.w), {"w": W}, X, "einsum"),
    "einsum, implicit, ...": (
        lambda s, x: torch.einsum("...i,oi", x, s.w), {"w": W}, (2, 3, 6), "einsum"),
    "einsum, sublists": (
        lambda s, x: torch.einsum(x, [0, 1], s.w, [2, 1], [2, 0]), {"w": W}, X, "einsum"),
    "einsum, sublists, implicit": (
        lambda s, x: torch.einsum(x, [..., 1], s.w, [2, 1]), {"w": W}, X, "einsum"),
    "einsum, summed": (lambda s, x: torch.einsum("mi,oi->m", x, s.w), {"w": W}, X, "einsum"),
    "einsum, all summed": (lambda s, x: torch.einsum("mi,oi->", x, s.w), {"w": W}, X, "einsum"),
    "bilinear": (
        lambda s, x: F.bilinear(x, x.tanh(), s.w, s.b), {"w": (4, 6, 6), "b": (4,)}, (2, 3, 6),
        "bilinear"),
    "aten.linear": (
        lambda s, x: aten.linear.default(x, s.w, s.b), {"w": W, "b": (4,)}, X, "linear"),
    "aten.addmm": (
        lambda s, x: aten.addmm.default(s.b, x, aten.t.default(s.w)), {"w": W, "b": (4,)}, X,
        "addmm"),
    "aten.mm": (lambda s, x: aten.mm(x, s.w), {"w": (6, 4)}, X, "mm"),
    "aten.convolution": (
        lambda s, x: aten.convolution.default(
            x, s.w, s.b, [1, 2], [1, 0], [1, 1], False, [0, 0], 2),
        {"w": (6, 2, 3, 2), "b": (6,)}, IMAGE, "convolution"),
    "aten.convolution, transposed": (
        lambda s, x: aten.convolution.default(
            x, s.w, None, [1, 2], [1, 0], [1, 1], True, [0, 1], 2),
        {"w": (4, 3, 3, 2)}, IMAGE, "convolution"),
    "torch.convolution": (
        lambda s, x: torch.convolution(x, s.w, None, [2], [1], [1], False, [0], 1),
        {"w": (6, 4, 3)}, (2, 4, 7), "convolution"),
    "conv_transpose1d": (
        lambda s, x: F.conv_transpose1d(x, s.w, s.b, 3, padding=1, output_padding=2, dilation=2),
        {"w": (4, 6, 3), "b": (6,)}, (2, 4, 5), "conv_transpose1d"),
    "conv_transpose1d, padded beyond the stride": (
        lambda s, x: F.conv_transpose1d(x, s.w, None, 1, 0, 2, 1, 3), {"w": (4, 2, 3)}, (4, 5),
        "conv_transpose1d"),
    "conv_transpose2d": (
        lambda s, x: F.conv_transpose2d(x, s.w), {"w": (4, 3, 3, 2)}, IMAGE, "conv_transpose2d"),
    "conv_transpose2d, everything": (
        lambda s, x: F.conv_transpose2d(
            x, s.w, s.b, (2, 3), (1, 2), output_padding=(1, 2), groups=2, dilation=(2, 1)),
        {"w": (4, 3, 3, 4), "b": (6,)}, IMAGE, "conv_transpose2d"),
    "conv_transpose3d": (
        lambda s, x: F.conv_transpose3d(x, s.w, s.b, (2, 1, 3), (1, 0, 1), (1, 0, 2), 2, (1, 2, 1)),
        {"w": (4, 3, 2, 3, 2), "b": (6,)}, (2, 4, 3, 2, 4), "conv_transpose3d"),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def made(name, dtype=torch.float64):
    forward, shapes, x_shape, _ = SPELLINGS[name]
    module = product(forward, dtype=dtype, **shapes)
    return module, torch.randn(x_shape, dtype=dtype)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_analog_product_and_its_gradients_are_those_of_the_spelling(name):
    digital, x = made(name)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    sites = analogfx.report(analog).sites
    assert sites and all((s.status, s.kind) == ("analog", SPELLINGS[name][3]) for s in sites)
    results = []
    for module in (digital, analog):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_second_run_changes_nothing(name):
    module, x = made(name)
    graph, context = after((respell,), module, IDENTITY)
    torch.testing.assert_close(run(graph, module, x), module(x), rtol=1e-11, atol=1e-11)
    once = text(graph)
    assert respell(graph, context) == 0
    assert text(graph) == once


TWINS = [
    "tensordot, weight first", "multi_dot", "expanded", "einsum, bilinear", "bilinear",
    "conv_transpose2d, everything", "conv_transpose3d", "vector", "addmv",
]  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_both_front_ends_give_the_same_numbers_and_ranges(name):
    digital, x = made(name, torch.float32)
    twin, analog = twins(digital, DYNAMO_CONFIGS["everything"])
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))


def test_a_tile_of_a_transposed_convolution_has_a_row_for_every_input_channel():
    module, _ = made("conv_transpose2d, everything")
    (site,) = analogfx.report(analogfx.analogize(module, IDENTITY)).sites
    # 2 groups of 3 channels at 3 * 4 offsets, by the 2 input channels of a group
    assert site.weight_shape == (2 * 3 * 3 * 4, 2, 1, 1)


REFUSED = {
    "tensordot of nothing": (
        lambda s, x: torch.tensordot(x, s.w, 0), {"w": (4,)}, (3,), "contracts nothing"),
    "kernel is an activation": (
        lambda s, x: F.conv_transpose1d(x, x, s.b), {"b": (2,)}, (2, 2, 5), "kernel is not"),
    "einsum without a contraction": (
        lambda s, x: torch.einsum("ni,o,n->nio", x, s.w, x[:, 0]), {"w": (4,)}, X,
        "no activation is contracted"),
    "einsum, ... in the weight": (
        lambda s, x: torch.einsum("ni,...i,n->n...", x, s.w, x[:, 0]), {"w": W}, X, "'...'"),
    "bilinear in an input that is a parameter": (
        lambda s, x: F.bilinear(x, s.v, s.w), {"w": (4, 6, 5), "v": (3, 5)}, X,
        "between two activations"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_tile_computes_is_refused_with_a_reason(name):
    forward, shapes, x_shape, reason = REFUSED[name]
    module = product(forward, **shapes)
    analog = analogfx.analogize(module, IDENTITY)
    sites = analogfx.report(analog).sites
    assert sites and all(s.status == "digital" and reason in s.reason for s in sites)
    x = torch.randn(x_shape, dtype=torch.float64)
    assert torch.equal(analog(x), module(x))
