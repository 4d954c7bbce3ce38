import itertools
import json

import pytest
import torch
from samples import IDENTITY, analog_names, merged, mlp, modifier, ranged
from torch import nn

import analogfx
from analogfx.chip import AdditiveNoiseModel

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Layers of different sizes, of which some are multiplied up: they need to be exact."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, n, bias=False) for n in (4, 8, 16, 32))
        self.gains = (1.0, 30.0, 1.0, 10.0)

    def forward(self, x):
        return torch.cat([g * f(x) for g, f in zip(self.gains, self.layers, strict=True)], -1)


def error_of(model):
    """A metric: how far the outputs are from the exact ones."""
    reference = model(X).detach()
    return lambda other: (other(X) - reference).square().mean().sqrt()


COARSE = modifier(quantization_type="DiscretizePerChannel", res=14)
FINE = modifier(quantization_type="DiscretizePerChannel", res=254)


def planned(budget, **options):
    model = Chain()
    changed = {"maximize": False, "progress": False, "perturb": {}} | options
    changed["perturb"] = changed["perturb"] or {"forward.out_noise": 0.0}  # nothing
    return analogfx.plan(model, COARSE, error_of(model), budget, **changed)


def error_with(digital, config=COARSE, exempt=None):
    model = Chain()
    mapping = {f"layers.{n}": exempt if n in digital else config for n in range(4)}
    analog = analogfx.analogize(model, mapping).eval()
    with torch.no_grad():
        return float(error_of(model)(analog))


def test_a_budget_that_is_met_needs_nothing():
    found = planned(100.0)
    assert found.met and found.exempt == () and len(found.steps) == 1


def test_the_plan_meets_the_budget_and_is_what_it_says():
    found = planned(0.1)
    digital = {int(name[-1]) for name in found.exempt}
    assert found.met and digital == {1, 3}
    assert found.steps[-1].mean == pytest.approx(error_with(digital)) and found.reference == 0
    assert error_with(digital) <= 0.1 < min(error_with({1}), error_with({3}))
    analog = analogfx.analogize(Chain(), found.mapping).eval()
    assert analog_names(analog) == ["layers.0", "layers.2"]
    with torch.no_grad():
        assert float(error_of(Chain())(analog)) == pytest.approx(found.steps[-1].mean)


@pytest.mark.parametrize("budget", [1.0, 0.3, 0.1, 0.01, 0.0])
def test_against_all_plans_there_are(budget):
    found = planned(budget)
    sizes = torch.tensor([4.0, 8.0, 16.0, 32.0]) / 60
    plans = [set(c) for n in range(5) for c in itertools.combinations(range(4), n)]
    good = [float(sizes[list(p)].sum()) for p in plans if error_with(p) <= budget]
    assert found.met and found.steps[-1].cost >= min(good) - 1e-6
    assert found.steps[-1].cost <= 1.5 * min(good) + 1e-6  # greedy, and not far off here
    # no exemption is needless
    digital = {int(name[-1]) for name in found.exempt}
    assert all(error_with(digital - {one}) > budget for one in digital)


def test_a_better_config_is_a_choice():
    found = planned(0.3, choices=[FINE])
    assert found.met and set(found.exempt) <= {f"layers.{n}" for n in range(4)}
    assert all(found.mapping[name].modifier.res == 254 for name in found.exempt)
    assert {s.choice for s in found.steps[1:]} <= {"choice 0", "base"}
    digital = {int(name[-1]) for name in found.exempt}
    exempt = error_with(digital, exempt=FINE)
    assert found.steps[-1].mean == pytest.approx(exempt)


def test_a_budget_out_of_reach_is_told():
    found = planned(1e-6, choices=[FINE])
    assert not found.met and len(found.exempt) == 4 and "NOT within" in str(found)


def test_a_cost_of_ones_own():
    def products(analog):
        return -len(analog_names(analog))  # every layer counts the same, whatever its size

    found = planned(0.1, cost=products)
    assert found.met and [s.cost for s in found.steps] == list(range(-4, -3 + len(found.exempt)))


def test_noise_and_preparation():
    model = mlp()
    config = merged(ranged(), {"forward": {"inp_res": 254}})
    calls = []

    def prepare(analog):
        calls.append(analog)
        analogfx.calibrate(analog, [X], progress=False)

    found = analogfx.plan(
        model, config, error_of(model), 1e9, perturb=AdditiveNoiseModel(0.1), prepare=prepare,
        chips=3, maximize=False, progress=False,
    )  # fmt: skip
    assert found.met and len(found.steps[0].values) == 3 and len(calls) == found.measured == 1
    with pytest.raises(ValueError, match="expected a budget"):
        analogfx.plan(model, config, error_of(model), -1.0)
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.plan(model, None, error_of(model), 1.0)


def test_a_layer_inside_another_keeps_its_own_config():
    class Outer(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.inner = nn.Linear(8, 4)
            self.digital = nn.Linear(8, 4)

        def forward(self, x):
            return super().forward(x) + self.inner(x) + self.digital(x)

    model = nn.Sequential(Outer())
    base = {"0.digital": None, "0": IDENTITY}
    found = analogfx.plan(
        model, base, error_of(model), 0.1, perturb={"forward.out_noise": 0.0}, maximize=False,
        progress=False,
    )  # fmt: skip
    assert analog_names(analogfx.analogize(model, found.mapping)) == ["0", "0.inner"]


def test_files(tmp_path):
    found = planned(0.1)
    record = json.loads(found.to_json(tmp_path / "plan.json"))
    assert record["exempt"] == list(found.exempt)
    assert record["mapping"]["layers.1"] is None
    again = analogfx.analogize(Chain(), record["mapping"])  # a file is enough
    assert analog_names(again) == ["layers.0", "layers.2"]
    found.plot(tmp_path / "plan.png", "error")
    assert (tmp_path / "plan.png").stat().st_size > 1000
