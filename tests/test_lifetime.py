import csv
import json
import math
import statistics

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import analogfx
from analogfx import chip
from analogfx.errors import CheckpointError, MetricError
from analogfx.lifetime import Lifetime, Row, named, seconds

PCM = chip.PCMLikeNoiseModel()


@pytest.fixture
def analog():
    torch.manual_seed(0)
    return analogfx.analogize(nn.Linear(50, 40), analogfx.TorchInferenceRPUConfig()).eval()


X = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))


def loss(model):
    assert not torch.is_grad_enabled()
    return model(X).square().mean()


def measure(analog, metric=loss, **keywords):
    given = {"noise_model": chip.PCMLikeNoiseModel(), "times": (1, 86400), "chips": 4}
    return analogfx.evaluate(analog, metric, progress=False, **given | keywords)


def test_each_row_is_a_chip_that_can_be_programmed_again(analog):
    life = measure(analog)
    assert [(row.chip, row.seconds) for row in life.rows] == [
        (c, t) for c in range(4) for t in (1.0, 86400.0)
    ]
    assert len({row.value for row in life.rows}) == 8
    row = life.rows[5]
    device = analogfx.program(analog, chip.PCMLikeNoiseModel(), seed=row.seed)
    with torch.no_grad():
        assert life.exact == float(loss(analog))
        with device.at(row.seconds):
            assert float(loss(analog)) == row.value


def test_seeds_share_no_chip(analog):
    seeds = [{row.seed for row in measure(analog, seed=s, times=(1,)).rows} for s in range(3)]
    assert len(set.union(*seeds)) == 12
    assert measure(analog).rows == measure(analog).rows


def test_compensation_keeps_what_drift_takes(analog):
    plain = measure(analog, times=(1, 3e7))
    kept = measure(analog, times=(1, 3e7), compensation=chip.GlobalDriftCompensation())
    assert plain.mean[1] < 0.6 * plain.mean[0]
    assert kept.mean[1] == pytest.approx(kept.mean[0], rel=0.15)


def test_statistics_and_files(tmp_path):
    values = {1.0: [0.5, 0.7, 0.9, 0.6], 60.0: [0.1, 0.3, 0.2, 0.4]}
    rows = tuple(Row(c, c, t, v[c]) for c in range(4) for t, v in values.items())
    life = Lifetime(tuple(values), rows, 0.8)
    assert life.mean == pytest.approx([statistics.mean(v) for v in values.values()])
    assert life.std == pytest.approx([statistics.stdev(v) for v in values.values()])
    assert life.quantile(0.5) == pytest.approx([statistics.median(v) for v in values.values()])
    assert "1 min" in str(life) and "4 chips; without one: 0.8" in str(life)
    life.to_json(tmp_path / "life.json")
    record = json.loads((tmp_path / "life.json").read_text())
    assert record["mean"] == life.mean and len(record["rows"]) == 8
    life.to_csv(tmp_path / "life.csv")
    with (tmp_path / "life.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert [float(line["value"]) for line in read] == [row.value for row in rows]
    life.plot(tmp_path / "life.png")
    assert (tmp_path / "life.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_chip_has_no_spread(analog):
    life = measure(analog, chips=1)
    assert all(math.isnan(v) for v in life.std)
    assert json.loads(life.to_json())["std"] == [None, None]


def test_a_run_that_was_cut_off_goes_on(analog, tmp_path):
    calls = []

    def drawn(model):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(model)
        return loss(model) + torch.rand(())

    file = tmp_path / "life.journal"
    with pytest.raises(KeyboardInterrupt):
        analogfx.evaluate(analog, drawn, PCM, times=(1, 9, 9), chips=2, progress=False, file=file)
    with file.open("a") as stream:
        stream.write('{"key": "chip 1, 9.0 s')  # cut short
    calls[:] = [None] * 6
    life = analogfx.evaluate(
        analog, drawn, PCM, times=(1, 9, 9), chips=2, progress=False, file=file
    )
    assert len(calls) == 8  # two of the seven were left
    whole = analogfx.evaluate(
        analog, lambda m: loss(m) + torch.rand(()), PCM, times=(1, 9, 9), chips=2, progress=False
    )
    assert life == whole and len({row.value for row in life.rows}) == 6
    more = analogfx.evaluate(analog, drawn, PCM, times=(1, 9), chips=3, progress=False, file=file)
    assert more.rows[:2] == life.rows[:2] and len(calls) == 10  # a chip more


def test_the_file_tells_runs_apart(analog, tmp_path):
    file = tmp_path / "life.journal"
    measure(analog, file=file)
    for changed in ({"noise_model": chip.HermesNoiseModel()}, {"seed": 1}, {"output_noise": True}):
        with pytest.raises(CheckpointError, match="another model, config"):
            measure(analog, file=file, **changed)
    rules = analogfx.TorchInferenceRPUConfig()
    rules.mapping.max_input_size = 25
    torch.manual_seed(0)
    other = analogfx.analogize(nn.Linear(50, 40), rules).eval()
    with pytest.raises(CheckpointError, match="another model, config"):
        measure(other, file=file)
    with torch.no_grad():
        analog.weight.mul_(2)
    with pytest.raises(CheckpointError, match="another model, config"):
        measure(analog, file=file)


def test_what_cannot_be_measured_is_refused(analog):
    with pytest.raises(ValueError, match="chips = 0"):
        measure(analog, chips=0)
    with pytest.raises(ValueError, match="times = "):
        measure(analog, times=())
    with pytest.raises(ValueError, match="AnalogLinear is in training mode"):
        measure(analog.train())
    for found, told in (("good", "a str"), (torch.ones(3), r"a Tensor of shape \(3,\)")):
        with pytest.raises(MetricError, match=f"the metric returned {told}: expected a number"):
            measure(analog.eval(), metric=lambda _, found=found: found)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("90s", 90), ("2min", 120), ("1h", 3600), ("1.5d", 129600), ("10y", 315360000)],
)
def test_times_in_units(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "-1", "d", "nan", "1w"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="expected a time"):
        seconds(text)


def test_names_of_times():
    assert [named(t) for t in (0, 1, 3600, 86400, 3.1536e8)] == ["0 s", "1 s", "1 h", "1 d", "10 y"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(x)[0])


IDS = torch.arange(12).view(2, 6)
MODELS = {
    "CNN": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
            nn.Linear(64, 4),
        ),
        torch.randn(3, 1, 8, 8),
    ),
    "GPT-2": lambda: (
        GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=16,
                       bos_token_id=0, eos_token_id=0)
        ),
        IDS,
    ),
    "Llama": lambda: (
        LlamaForCausalLM(
            LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2)
        ),
        IDS,
    ),
    "LSTM": lambda: (Recurrent(), torch.randn(2, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_from_config_have_a_lifetime_and_a_chip_that_comes_back(name, tmp_path):
    torch.manual_seed(0)
    digital, x = MODELS[name]()
    analog = analogfx.analogize(digital.eval(), analogfx.recipes.afm(), strict=True)
    analogfx.calibrate(analog, [x], progress=False)
    analog.eval()

    def output(model):
        y = model(x)
        return getattr(y, "logits", y)

    with torch.no_grad():
        exact = output(analog)
    life = analogfx.evaluate(
        analog,
        lambda model: (output(model) - exact).square().mean().sqrt(),
        noise_model=chip.PCMLikeNoiseModel(),
        times=(1.0, 3e7),
        chips=3,
        progress=False,
    )
    assert 0 < life.mean[0] < life.mean[1]  # without compensation, drift moves outputs away
    device = analogfx.program(analog, chip.PCMLikeNoiseModel(), seed=4)
    device.save(tmp_path)
    again = analogfx.load_device(analog, tmp_path)
    with torch.no_grad(), device.at(3600.0, read=0):
        first = output(analog)
    with torch.no_grad(), again.at(3600.0, read=0):
        assert torch.equal(output(analog), first)
