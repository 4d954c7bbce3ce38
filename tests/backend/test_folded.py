import copy

import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET, assert_same, compiled, evaluated, step, twins
from samples import TILES, merged, mlp
from torch import nn

import analogfx
from analogfx.kernels import prepared


@pytest.fixture
def preparations(monkeypatch):
    """Counts how often weights are prepared: the calls that freezing is to save."""
    calls = []
    original = prepared.prepare

    def prepare(*args):
        calls.append(args[0])
        return original(*args)

    monkeypatch.setattr(prepared, "prepare", prepare)
    return calls


def pair(config=QUIET):
    model = mlp()
    twin, analog = twins(model, config)
    x = torch.randn(6, 8)
    step(twin, x, 0), step(analog, x, 0)
    return model, twin, analog, x


def test_weights_are_prepared_once_until_they_change(preparations):
    model, twin, _, x = pair()
    evaluated(twin, x)
    before = len(preparations)
    evaluated(twin, x), evaluated(twin, x)
    assert len(preparations) == before
    with torch.no_grad():
        model.first.weight.mul_(2)
    evaluated(twin, x)
    assert len(preparations) == before + 2


def sgd(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()


def adam(model, x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(x).sum().backward()
    optimizer.step()


def loaded(model, x):
    model.load_state_dict({k: -v for k, v in model.state_dict().items() if "input" not in k},
                          strict=False)  # fmt: skip


def assigned(model, x):
    model.load_state_dict({k: v.clone() + 1 for k, v in model.state_dict().items()}, assign=True)


def replaced(model, x):
    model.first.weight = nn.Parameter(model.first.weight.detach() * 3)


def copied(model, x):
    with torch.no_grad():
        model.second.bias.copy_(torch.ones(4))


def through_data(model, x):
    model.first.weight.data = model.first.weight.data * 2  # a new storage


CHANGES = [sgd, adam, loaded, assigned, replaced, copied, through_data]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["digital", "analogized"])
def test_changed_weights_are_seen_at_once(change, kind):
    model, twin, analog, x = pair()
    expected = copy.deepcopy(analog)
    if kind == "analogized":
        model, twin = analog, compiled(analog, None)
    assert_same(evaluated(twin, x), evaluated(expected, x), exact=False)
    before = evaluated(twin, x)
    change(model, x)
    expected.load_state_dict(model.state_dict(), strict=False)
    after = evaluated(twin, x)
    assert not torch.equal(before, after)
    assert_same(after, evaluated(expected, x), exact=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_precision_is_seen(dtype):
    model, twin, analog, x = pair()
    evaluated(twin, x)
    for m in (model, analog):
        m.to(dtype)
    x = x.to(dtype)
    assert_same(evaluated(twin, x), evaluated(analog, x))
    for m in (model, analog):
        m.float()
    assert_same(evaluated(twin, x.float()), evaluated(analog, x.float()))


class Heads(nn.Module):
    """Two products of one input: with equal ranges they are one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.left(x), self.right(x)


@pytest.mark.parametrize("config", [QUIET, merged(QUIET, TILES)], ids=["one tile", "tiles"])
def test_ranges_that_part_after_compilation_are_seen_at_once(config):
    analog = analogfx.analogize(Heads(), config)
    twin = compiled(analog, None)
    x = torch.randn(6, 8)
    twin(x)
    for factor in (1.0, 0.4, 1.0, 2.5):
        with torch.no_grad():
            analog.right.input_range.mul_(factor)
        for _ in range(3):
            assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)


def test_ranges_that_part_cost_one_more_graph():
    graphs = []

    def note(graph, context):
        graphs.append(graph)
        return 0

    analog = analogfx.analogize(Heads(), QUIET).eval()
    twin = compiled(analog, None, passes=["freeze", "share_input", note])
    x = torch.randn(6, 8)
    for factor in (1.0, 0.4, 2.0, 0.9, 1.1):
        with torch.no_grad():
            analog.right.input_range.mul_(factor)
        evaluated(twin, x), evaluated(twin, x)
    assert len(graphs) == 2


def test_random_weights_are_never_frozen():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return F.linear(x, self.weight * torch.rand_like(self.weight))

    twin = compiled(Dropped(), DYNAMO_CONFIGS["discrete"])
    x = torch.randn(3, 8)
    first, second = evaluated(twin, x), evaluated(twin, x)
    assert not torch.equal(first, second)


def test_weights_that_the_graph_writes_are_never_frozen():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4, bias=False)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            self.scale += 1
            return F.linear(x, self.layer.weight * self.scale)

    twin = compiled(Counting(), DYNAMO_CONFIGS["discrete"])
    x = torch.randn(3, 8)
    one, two, three = (evaluated(twin, x) for _ in range(3))
    torch.testing.assert_close(two, one * 3 / 2)
    torch.testing.assert_close(three, one * 2)


def test_a_parametrized_weight_is_frozen_and_follows_its_parameters(preparations):
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    twin, analog = twins(nn.Sequential(layer), QUIET)
    x = torch.randn(6, 8)
    step(twin, x, 0, False), step(analog, x, 0, False)
    assert_same(evaluated(twin, x), evaluated(analog, x))
    before = len(preparations)
    assert_same(evaluated(twin, x), evaluated(analog, x))
    assert len(preparations) == before
    for m in (twin._orig_mod, analog):
        with torch.no_grad():
            m[0].parametrizations.weight.original0.mul_(2)
    assert_same(evaluated(twin, x), evaluated(analog, x))
    assert len(preparations) == before + 1


def test_weights_in_inference_mode():
    with torch.inference_mode():
        model = mlp().eval()
        twin, analog = twins(model, QUIET)
        x = torch.randn(6, 8)
        analog.eval()
        for _ in range(2):
            assert_same(twin(x), analog(x))
