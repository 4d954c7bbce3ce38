"""The audit against the zoo of hiding places: what runs digitally is listed, whatever hides it."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from samples import COARSE, IDENTITY, mlp, product
from torch import nn
from torch.nn.utils import parametrizations, prune

import analogfx
from analogfx.errors import PlacementError

X = torch.randn(6, 4)


class Matmul(nn.Module):
    def forward(self, x, y):
        return x @ y


class Weight(nn.Module):
    """A module with a weight (5, 4), a bias and a child, for a forward to multiply by."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))
        self.child = nn.Linear(4, 5)
        self.matmul = Matmul()
        self.op = torch.matmul
        self.table = {"linear": F.linear}


def bare(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@torch.fx.wrap
def wrapped(x, weight):
    return F.linear(x, weight)


OPS = {"linear": F.linear}


def branching(x, weight):
    return F.linear(x, weight) if x.sum() > -1e9 else x


@bare
def plainly_decorated(self, x):
    return branching(x, self.weight)


def without_gradients(self, x):
    with torch.no_grad():
        return F.linear(x, self.weight)


HIDDEN = {
    "normalize": lambda self, x: F.linear(x, F.normalize(self.weight)),
    "on values": lambda self, x: F.linear(x, self.weight[self.weight[:, 0] < 9]),
    "addmv": lambda self, x: torch.addmv(self.bias, self.weight, x[0]),
    "an overload of ATen's": lambda self, x: torch.ops.aten.linear(x, self.weight),
    "mm of ATen's": lambda self, x: torch.ops.aten.mm.default(x, self.weight.t()),
    "inner": lambda self, x: x.inner(self.weight),
    "convolution": lambda self, x: torch.convolution(
        x[:, :, None], self.weight[:, :, None], None, [1], [0], [1], False, [0], 1),
    "addbmm": lambda self, x: torch.addbmm(x[:, :1] * 0, x[None], self.weight.t()[None]),
    "addmm_": lambda self, x: (x @ torch.zeros_like(self.weight.t())).addmm_(x, self.weight.t()),
    "multi_dot": lambda self, x: torch.linalg.multi_dot([x, self.weight.t(), self.weight]),
    "a plain decorator": plainly_decorated,
    "an attribute": lambda self, x: self.op(x, self.weight.t()),
    "an attribute, untraceable": lambda self, x: (
        self.op(x, self.weight.t()) if x.sum() > -1e9 else x),
    "a table": lambda self, x: self.table["linear"](x, self.weight),
    "a table, untraceable": lambda self, x: OPS["linear"](x, self.weight) if x.sum() > -1e9 else x,
    "a child's weight": lambda self, x: F.linear(x, self.child.weight),
    "a child's weight under wrap": lambda self, x: wrapped(x, self.child.weight),
    "a child's weight, untraceable": lambda self, x: branching(x, self.child.weight),
    "autograd.Function": lambda self, x: Scaled.apply(x, self.weight),
    "no_grad": without_gradients,
    "no_grad around": torch.no_grad()(lambda self, x: F.linear(x, self.weight)),
    "vmap": lambda self, x: torch.vmap(lambda row: self.weight @ row)(x),
    "an argument of a module": lambda self, x: self.matmul(x, self.weight.t()),
    "an argument of a module, untraceable": lambda self, x: (
        self.matmul(x, self.weight.t()) if x.sum() > -1e9 else x),
    "matrices chosen by the input": lambda self, x: torch.bmm(
        x[:, None], self.weight.view(5, 2, 2).repeat(1, 2, 1)[(x[:, 0] > 0).long()]),
}  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", HIDDEN)
def test_no_product_is_missed_whatever_hides_it(name, grad):
    digital = type("Hiding", (Weight,), {"forward": HIDDEN[name]})()
    analog = analogfx.analogize(digital, COARSE)
    with torch.set_grad_enabled(grad):
        seen = analogfx.audit(analog, X)
    assert seen.products and seen.ok, seen
    if any(p.status == "digital" for p in seen.products):
        assert analogfx.report(analog).coverage < 1
        with pytest.raises(PlacementError):
            analogfx.analogize(digital, COARSE, strict=True)


def test_what_runs_by_element_is_listed_all_the_same():
    vecdot = lambda self, x: torch.linalg.vecdot(x[:, None], self.weight)  # noqa: E731
    digital = type("Hiding", (Weight,), {"forward": vecdot})()
    with pytest.raises(PlacementError, match=r"weight .*vecdot"):
        analogfx.analogize(digital, COARSE, strict=True)


def jit(self, x):
    return self.script(x, self.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_jit_function_is_seen_and_listed():
    digital = type("Jitted", (Weight,), {"forward": jit})()
    digital.script = torch.jit.trace(lambda x, w: x @ w.t(), (X, digital.weight.detach()))
    seen = analogfx.audit(analogfx.analogize(digital, COARSE, inplace=True), X)
    assert [p.status for p in seen.products] == ["digital"] and seen.ok


class Subclass(nn.Linear):
    def forward(self, x, *args):
        return super().forward(x)


class Untraceable(nn.Linear):
    def forward(self, x):
        if x.sum() > 1e9:
            x = -x
        return super().forward(x)


LAYERS = {
    "a subclass that takes more": (lambda: Subclass(4, 4), 1.0),
    "an untraceable subclass": (lambda: Untraceable(4, 4), 1.0),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 4, bias=False), "weight", 0.5), 1.0),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4, bias=False)), 1.0),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4, bias=False)), 1.0),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), 1.0),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), 1.0),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_whose_weight_is_made_elsewhere(name):
    make, coverage = LAYERS[name]
    torch.manual_seed(0)
    digital = nn.Sequential(make()).eval()
    with torch.no_grad():
        expected = digital(X)
    analog = analogfx.analogize(digital, COARSE)
    seen = analogfx.audit(analog, X)
    assert seen.ok and seen.coverage == analogfx.report(analog).coverage == coverage, seen
    with torch.no_grad():
        assert torch.equal(analog(X), expected) is (coverage == 0)
        torch.testing.assert_close(analogfx.analogize(digital, IDENTITY)(X), expected)


HARMLESS = {
    "a look-up": lambda self, x: F.embedding((x > 0).long(), self.weight).sum(-1),
    "a norm": lambda self, x: F.layer_norm(x[:, None].expand(6, 5, 4), (5, 4), self.weight),
    "by element": lambda self, x: x[:, None] * self.weight + self.weight,
    "its dtype": lambda self, x: x.to(self.weight.dtype) if x.sum() > -1e9 else x,
    "its dtype, of a child": lambda self, x: self.child(x.to(self.child.weight.dtype)),
    "added, untraceable": lambda self, x: x[:, :1] + self.weight[:1] if x.sum() > -1e9 else x,
    "a scale of no dimensions": lambda self, x: x @ x.t() * self.bias[0].exp(),
    "a branch that is not taken": lambda self, x, more=None: (
        x * 2 if more is None else branching(x, self.weight)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_multiplies_by_no_weight_is_no_alarm(name):
    digital = type("Harmless", (Weight,), {"forward": HARMLESS[name]})()
    analog = analogfx.analogize(digital, COARSE, strict=True)
    seen = analogfx.audit(analog, X)
    assert seen.ok and seen.coverage == 1.0 and not seen.missed


def test_a_miss_is_a_row_of_its_own_and_not_ok():
    analog = analogfx.analogize(mlp(), COARSE)
    second = analog.second
    analog.second = nn.Identity()
    analog.second.w = second.weight  # a parameter of a module whose code names no product
    analog.second.forward = functools.partial(F.linear, weight=second.weight)
    seen = analogfx.audit(analog, torch.randn(3, 8))
    assert not seen.ok
    (missed,) = seen.missed
    assert (missed.parameters, missed.module, missed.op) == (("second.w",), "second", "aten.mm")
    assert (missed.elements, missed.calls) == (48, 1)
    assert seen.coverage == pytest.approx(96 / (96 + 48))
    lines = str(seen).splitlines()
    assert lines[2].split()[:3] == ["second.w", "digital,", "MISSED"]
    assert "1 digital products that the report does not list" in lines
    assert "66.7% of the weight elements as measured" in str(seen)


def test_a_child_that_is_never_called_is_idle():
    digital = type("Reader", (Weight,), {"forward": HIDDEN["a child's weight"]})()
    seen = analogfx.audit(analogfx.analogize(digital, COARSE), X)
    assert [s.name for s in seen.idle] == ["child"]


def test_nothing_of_the_model_changes():
    config = {"pre_post": {"input_range": {"enable": True, "init_from_data": 9}}, "forward": {}}
    digital = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    analog = analogfx.analogize(digital, config).train()
    before = {k: v.clone() for k, v in analog.state_dict().items()}
    random = torch.get_rng_state()
    seen = analogfx.audit(analog, X)
    assert seen.ok and len(seen.products) == 2
    torch.testing.assert_close(dict(analog.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(random, torch.get_rng_state())


def test_inference_mode_shows_the_same():
    analog = analogfx.analogize(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), COARSE)
    plain = analogfx.audit(analog, X)
    with torch.inference_mode():
        inference = analogfx.audit(analog, X)
    rows = [{(p.parameters, p.status, p.reported) for p in a.products} for a in (plain, inference)]
    assert rows[0] == rows[1]


def test_tied_weights_are_one_and_masks_are_none():
    def forward(self, x):
        q = F.linear(x, self.w)
        return F.scaled_dot_product_attention(q, q, q, self.mask) @ self.w

    digital = product(forward, dtype=torch.float32, w=(4, 4), mask=(6, 6))
    seen = analogfx.audit(analogfx.analogize(digital, COARSE), X)
    assert {p.parameters for p in seen.products} == {("w",)} and seen.coverage == 1.0


def test_a_weight_that_is_computed_by_a_product_is_no_product_of_its_own():
    def forward(self, x):
        return F.linear(x, self.w + self.b @ self.a)

    digital = product(forward, dtype=torch.float32, w=(5, 4), a=(2, 4), b=(5, 2))
    analog = analogfx.analogize(digital, COARSE, strict=True)
    (seen,) = analogfx.audit(analog, X).products
    assert seen.parameters == ("a", "b", "w") and seen.status == "analog" and seen.reported


def test_a_learned_input_of_a_layer_is_an_activation():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.layer(self.latents) @ self.layer(x).t()

    digital = Latents()
    seen = analogfx.audit(analogfx.analogize(digital, {"layer": None, "*": COARSE}), X)
    assert {(p.parameters, p.status) for p in seen.products} == {(("layer.weight",), "digital")}
    assert seen.ok and seen.products[0].calls == 2


def test_to_dict_is_plain_data():
    seen = analogfx.audit(analogfx.analogize(mlp(), COARSE), torch.randn(2, 8))
    data = json.loads(json.dumps(seen.to_dict()))
    assert data["ok"] is True and data["coverage"] == data["reported_coverage"] == 1.0
    assert data["products"][0]["parameters"] == ["first.weight"]


def test_a_model_that_is_not_analog_has_no_audit():
    with pytest.raises(PlacementError, match="carries no placement"):
        analogfx.audit(nn.Linear(2, 2), torch.ones(1, 2))
