import csv
import json
import math
import statistics

import pytest
import torch
from samples import IDENTITY, Deep, mlp, modifier
from torch import nn

import analogfx
from analogfx.chip import AdditiveNoiseModel
from analogfx.errors import CheckpointError
from analogfx.measure import chip_seed

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
NOISE = AdditiveNoiseModel(0.1)


def power(model):
    return model(X).square().mean()


@pytest.fixture
def analog():
    return analogfx.analogize(mlp(), IDENTITY).eval()


def on_chip(analog, seed, *names):
    """The metric with the noise of a chip written into some layers' weights."""
    held = analogfx.program(analog, NOISE, seed=seed).weights(1.0)
    digital = mlp()
    with torch.no_grad():
        for name in names:
            getattr(digital, name).weight.copy_(held[f"{name}.weight"])
        return float(power(digital))


def test_alone(analog):
    found = analogfx.sensitivity(analog, power, NOISE, chips=3, seed=5, progress=False)
    rows = {row.name: row for row in found.rows}
    for name in ("first", "second"):
        expected = [on_chip(analog, chip_seed(5, chip), name) for chip in range(3)]
        assert rows[name].values == pytest.approx(expected)
        assert rows[name].mean == pytest.approx(statistics.mean(expected))
        assert rows[name].std == pytest.approx(statistics.stdev(expected))
        assert rows[name].effect == pytest.approx(statistics.mean(expected) - found.exact)
    both = [on_chip(analog, chip_seed(5, chip), "first", "second") for chip in range(3)]
    assert found.everywhere == pytest.approx(both)
    assert [row.effect for row in found.rows] == sorted(row.effect for row in found.rows)
    assert (rows["first"].weights, rows["second"].weights) == (96, 48)


def test_all_but_one(analog):
    found = analogfx.sensitivity(
        analog, power, NOISE, mode="all_but", chips=2, progress=False, maximize=False
    )
    rows = {row.name: row for row in found.rows}
    assert rows["first"].values == pytest.approx(
        [on_chip(analog, chip_seed(0, chip), "second") for chip in range(2)]
    )
    assert rows["first"].effect == pytest.approx(
        rows["first"].mean - statistics.mean(found.everywhere)
    )
    assert [row.effect for row in found.rows] == sorted(row.effect for row in found.rows)


def test_fewer_weight_states_find_the_layer_that_hurts():
    fine = modifier(quantization_type="Discretize", res=1e6)
    analog = analogfx.analogize(mlp(), fine).eval()
    with torch.no_grad():
        analog.first.weight[0, 0] = 100.0  # steps of all others are far too wide
        reference = analog(X)
    found = analogfx.sensitivity(
        analog,
        lambda model: (model(X) - reference).square().mean(),
        {"modifier.res": 30},
        maximize=False,
        progress=False,
    )
    assert [row.name for row in found.rows] == ["first", "second"]
    assert math.isnan(found.rows[0].std) and len(found.everywhere) == 1
    assert found.rows[0].mean > 5 * found.rows[1].mean


def test_a_metric_that_draws_is_deterministic(analog):
    def noisy(model):
        return model(torch.randn(4, 8)).sum() + torch.rand(())

    torch.manual_seed(0)
    first = analogfx.sensitivity(analog, noisy, NOISE, chips=2, progress=False)
    state = torch.get_rng_state()
    second = analogfx.sensitivity(analog, noisy, NOISE, chips=2, progress=False)
    assert first == second and torch.equal(state, torch.get_rng_state())


class _Counting:
    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def __call__(self, model):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return power(model)


def test_an_interrupted_run_goes_on(analog, tmp_path):
    options = {"chips": 3, "progress": False}
    whole = _Counting()
    expected = analogfx.sensitivity(analog, whole, NOISE, **options)
    file = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        analogfx.sensitivity(analog, _Counting(stop=4), NOISE, file=file, **options)
    with file.open("a") as stream:
        stream.write('{"key": "2 fi')  # a line that was cut short
    rest = _Counting()
    assert analogfx.sensitivity(analog, rest, NOISE, file=file, **options) == expected
    assert rest.calls == whole.calls - 4
    again = _Counting()
    assert analogfx.sensitivity(analog, again, NOISE, file=file, **options) == expected
    assert again.calls == 0


def test_a_file_of_another_run_is_refused(analog, tmp_path):
    file = tmp_path / "run.jsonl"
    options = {"file": file, "chips": 1, "progress": False}
    analogfx.sensitivity(analog, power, NOISE, **options)
    text = file.read_text()
    weight = analog.first.weight.detach().clone()
    with torch.no_grad():
        analog.first.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="made for another model"):
        analogfx.sensitivity(analog, power, NOISE, **options)
    assert file.read_text() == text
    file.write_text(text.replace('"value"', '"vaule"'))
    with torch.no_grad():
        analog.first.weight.copy_(weight)
    with pytest.raises(CheckpointError, match="is damaged"):
        analogfx.sensitivity(analog, power, NOISE, **options)


def test_printing_and_files(tmp_path):
    analog = analogfx.analogize(Deep(depth=1), IDENTITY).eval()
    x = torch.randn(3, 4)
    found = analogfx.sensitivity(analog, lambda m: m(x).sum(), NOISE, chips=2, progress=False)
    lines = str(found).splitlines()
    assert lines[0].split() == ["module", "weights", "share", "mean", "std", "effect"]
    assert len(lines) == 2 + 3 + 2 and lines[-2].startswith("AdditiveNoiseModel, 1 s after")
    record = json.loads(found.to_json(tmp_path / "s.json"))
    assert [row["name"] for row in record["rows"]] == [row.name for row in found.rows]
    found.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3 * 2
    found.plot(tmp_path / "s.png", "power")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_mistakes_are_refused(analog):
    for wrong in ({"mode": "one"}, {"chips": 0}):
        with pytest.raises(ValueError, match="expected 'alone' or 'all_but'"):
            analogfx.sensitivity(analog, power, NOISE, progress=False, **wrong)
    with pytest.raises(ValueError, match="call eval"):
        analogfx.sensitivity(analog.train(), power, NOISE, progress=False)
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.sensitivity(nn.Linear(2, 2), power, NOISE, progress=False)
