"""Forwards that no trace follows: products by a child's weight are done by the child."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from samples import COARSE, IDENTITY
from torch import nn

import analogfx
from analogfx.errors import PlacementError

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


def test_gradients_are_those_of_the_digital_forward():
    digital = made(without_the_bias)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    for model in (digital, analog):
        model(X).square().sum().backward()
    got = {n: p.grad for n, p in analog.named_parameters() if p.grad is not None}
    assert {"child.weight", "child.bias"} <= got.keys()
    for name in ("child.weight", "child.bias"):
        parameter = digital.get_parameter(name)
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-5)


def computed_first(self, x):
    return helper(x, self.child.weight * 2.0, None)


def a_part(self, x):
    return helper(x, self.child.weight[:2], None)


def its_own(self, x):
    return helper(x, self.blocks[0].repeat(1, 2), None)


def in_other_code(self, x):
    return compiled(x, self.child.weight)


@torch.jit.script
def compiled(x, weight):
    return x @ weight.t() if x.sum() > -1e9 else x


@pytest.mark.parametrize("forward", [computed_first, a_part, its_own, in_other_code])
def test_what_no_child_computes_is_a_digital_row(forward):
    digital = made(forward)
    analog = analogfx.analogize(digital, COARSE)
    assert torch.equal(analog(X), digital(X))
    (row,) = [s for s in analogfx.report(analog).sites if s.status == "digital"]
    assert row.parameter == ("blocks" if forward is its_own else "child.weight")
    with pytest.raises(PlacementError, match="stayed digital"):
        analogfx.analogize(digital, COARSE, strict=True)


def both(self, x):
    return helper(helper(x, self.child.weight, self.child.bias), self.own.flatten(1)[:, :4], None)


def test_one_product_of_a_child_and_one_of_its_own():
    digital = made(both)
    analog = analogfx.analogize(digital, COARSE)
    child = analogfx.analogize(copy.deepcopy(digital.child), COARSE)
    torch.testing.assert_close(analog(X), child(X) @ digital.own.flatten(1)[:, :4].t())
    rows = [(s.parameter, s.status) for s in analogfx.report(analog).sites]
    assert ("own", "digital") in rows and ("child.weight", "digital") not in rows
    seen = analogfx.audit(analog, X)
    assert seen.ok and {(*p.parameters, p.status) for p in seen.products} == {
        ("own", "digital"),
        ("child.weight", "analog"),
    }


def the_other_way(self, x):
    return x @ self.child.weight if x.sum() > -1e9 else x


def test_what_the_child_does_not_compute_warns_once_and_is_listed():
    digital = made(the_other_way)
    analog = analogfx.analogize(digital, COARSE)
    with pytest.warns(UserWarning, match=r"Hidden: digital by child.weight: its layer does not"):
        y = analog(X)
    assert torch.equal(y, analog(X)) and torch.equal(y, digital(X))  # without another warning
    rows = [(s.parameter, s.status) for s in analogfx.report(analog).sites]
    assert ("child.weight", "digital") in rows
    assert analogfx.audit(analog, X).ok


def test_a_child_that_is_called_computes_once():
    def forward(self, x):
        return self.child(helper(x, self.child.weight, self.child.bias))

    analog = analogfx.analogize(made(forward), COARSE, strict=True)
    calls = []
    analog.child.register_forward_hook(lambda *_: calls.append(1))
    y = analog(X)
    assert len(calls) == 2
    child = analogfx.analogize(made(forward).child, COARSE)
    torch.testing.assert_close(y, child(child(X)))


def test_a_child_that_the_config_leaves_out_is_digital():
    digital = made(by_a_helper)
    analog = analogfx.analogize(digital, {"child": None, "*": COARSE}, strict=True)
    assert torch.equal(analog(X), digital(X))


class Optional(Base):
    """Traced as it is mostly called; with an offset no trace follows it."""

    def forward(self, x, offset=None):
        y = F.linear(x, self.child.weight, self.child.bias)
        return y if offset is None or offset.sum() < 0 else y + offset


def test_a_call_that_no_trace_follows_has_the_childs_products(recwarn):
    analog = analogfx.analogize(Optional(), COARSE, strict=True)
    torch.testing.assert_close(analog(X, torch.ones(4)), analog(X) + 1)
    seen = analogfx.audit(analog, X, torch.ones(4))
    assert seen.ok and {p.status for p in seen.products} == {"analog"} and not recwarn.list


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


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
IDS = torch.arange(12).view(2, 6) + 3


def mamba():
    config = transformers.MambaConfig(**TINY, state_size=4, time_step_rank=4)
    return transformers.MambaForCausalLM(config)


def lfm2():
    config = transformers.Lfm2Config(
        **TINY,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    return transformers.Lfm2ForCausalLM(config)


@pytest.mark.parametrize("make", [mamba, lfm2])
def test_a_state_space_model_generates_and_trains(make, recwarn):
    torch.manual_seed(0)
    digital = make().eval()
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    results = [
        model.generate(
            IDS, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        for model in (digital, analog)
    ]
    for own, analogs in zip(*(r.scores for r in results), strict=True):
        torch.testing.assert_close(analogs, own)
    for model in (digital, analog):
        model.train()(IDS, labels=IDS).loss.backward()
    for name, parameter in digital.named_parameters():
        torch.testing.assert_close(analog.get_parameter(name).grad, parameter.grad)
    assert not [w for w in recwarn.list if "digital" in str(w.message)]
