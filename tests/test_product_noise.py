"""Noise that every product inside of a chip draws anew: read noise, and output noise."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from samples import Routed
from torch import nn

import analogfx
from analogfx import chip
from analogfx.errors import ConfigError

PCM = chip.PCMLikeNoiseModel()


def config(out_noise=0.0, inp_res=-1, out_bound=-1, **mapping):
    made = analogfx.TorchInferenceRPUConfig(
        forward=analogfx.IOParameters(inp_res=inp_res, out_bound=out_bound, out_noise=out_noise),
        mapping=analogfx.MappingParameter(**mapping),
    )
    made.pre_post.input_range.enable = True
    return made


KINDS = {
    "tiles": (lambda: nn.Linear(24, 7), (1, 24), {"max_input_size": 10, "max_output_size": 4}),
    "image": (lambda: nn.Conv2d(4, 6, 3, groups=2), (1, 4, 3, 3), {}),
    "patches": (lambda: nn.Conv1d(8, 6, 3), (1, 8, 3), {"max_input_size": 10}),
    "groups in tiles": (lambda: nn.Conv1d(8, 6, 3, groups=2), (1, 8, 3), {"max_input_size": 5}),
    "recurrent": (lambda: nn.LSTM(6, 5), (1, 1, 6), {}),
    "experts": (Routed, (4, 12), {"max_input_size": 7}),
}


def made(kind, **keywords):
    make, shape, mapping = KINDS[kind]
    torch.manual_seed(1)
    analog = analogfx.analogize(make(), config(**mapping, **keywords)).eval()
    return analog, torch.randn(shape)


def output(analog, x):
    y = analog(x)
    return (y[0] if isinstance(y, tuple) else y).flatten()


READINGS, PRODUCTS, DRAWS = 100, 1000, 300


@pytest.mark.parametrize("kind", KINDS)
def test_products_spread_as_readings_do(kind):
    """Weights that are drawn anew for each product, against products of one reading."""
    analog, x = made(kind)
    axis = 1 if kind == "recurrent" else 0
    model = chip.PCMLikeNoiseModel(read_noise_scale=0.3)  # seldom below a conductance of 0
    device = analogfx.program(analog, model, seed=2)
    with torch.no_grad():
        readings = []
        for read in range(READINGS):
            with device.at(3600.0, read=read):
                readings.append(output(analog, x))
        with device.at(3600.0, read_noise="product"):
            many = torch.cat([x] * PRODUCTS, axis)
            by_product = output(analog, many).view(PRODUCTS, -1).double()
    by_reading = torch.stack(readings).double()
    ratios = (by_product.var(0) / by_reading.var(0)).log()
    expected = math.sqrt(2 / READINGS + 2 / PRODUCTS)
    assert ratios.abs().max() < 5 * expected
    assert ratios.mean().abs() < 4 * expected / math.sqrt(len(ratios))
    apart = by_product.mean(0) - by_reading.mean(0)
    assert (apart.square() < 25 * by_reading.var(0) * (1 / READINGS + 1 / PRODUCTS)).all()
    correlated = torch.corrcoef(by_product.T) - torch.eye(by_product.shape[1])
    assert correlated.abs().max() < 6 / PRODUCTS**0.5


def test_every_input_vector_has_noise_of_its_own():
    analog, x = made("tiles")
    device = analogfx.program(analog, PCM)
    with torch.no_grad(), device.at(60.0, read_noise="product"):
        y = analog(x.expand(50, -1))
        assert y.unique(dim=0).shape[0] == 50
    with torch.no_grad(), device.at(60.0):
        y = analog(x.expand(50, -1))
        torch.testing.assert_close(y, y[:1].expand(50, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reading_that_is_repeated_draws_the_same(kind):
    analog, x = made(kind, out_noise=0.05)
    device = analogfx.program(analog, PCM)

    def run(seconds=60.0, read=0, chip=device, count=2):
        noisy = chip.at(seconds, read=read, read_noise="product", output_noise=True)
        with noisy, torch.inference_mode():
            return [output(analog, x) for _ in range(count)]

    first = run()
    assert not torch.equal(*first)
    assert all(map(torch.equal, run(count=1) + run()[1:], first))
    others = run(read=1) + run(61.0) + run(chip=analogfx.program(analog, PCM, seed=1))
    assert not any(torch.equal(first[0], other) for other in others)
    with device.at(60.0, read=0, read_noise="product", output_noise=True), torch.inference_mode():
        nested = [output(analog, x)]
        assert torch.equal(run()[1], first[1])
        nested.append(output(analog, x))
    assert all(map(torch.equal, nested, first))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["tiles", "image", "groups in tiles", "experts"])
def test_output_noise_is_that_of_the_config(kind, per_channel, tmp_path):
    """For a perfect chip: strength x range x largest weight, over all tiles as one tile has it."""
    analog, x = made(kind, out_noise=0.05)
    rules = analog._analog.config
    rules.forward.out_noise_per_channel = per_channel
    torch.manual_seed(1)
    analog = analogfx.analogize(KINDS[kind][0](), rules).eval()
    perfect = chip.AdditiveNoiseModel(0.0)
    device = analogfx.program(analog, perfect)
    device.save(tmp_path)
    device = analogfx.load_device(analog, tmp_path)
    with torch.no_grad():
        exact = output(analog, x)
        with device.at(1.0):
            torch.testing.assert_close(output(analog, x), exact)
        with device.at(1.0, output_noise=True):
            found = torch.stack([output(analog, x) for _ in range(DRAWS)]) - exact
    (site,) = analog._analog.sites
    weight = site.weight(analog).detach().flatten(1)
    tiles = weight.split(site.in_sizes, 1)
    if per_channel:
        widths = [tile.abs().amax(1) for tile in tiles]
    else:
        widths = [
            torch.cat([rows.abs().max().expand(len(rows)) for rows in tile.split(site.out_sizes)])
            for tile in tiles
        ]
    squares = torch.stack(widths).square().mean(0) * (0.05 * 3.0) ** 2  # the range is 3
    if site.experts:  # of which each row has one
        chosen = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        squares = squares.view(site.experts, -1)[chosen].flatten()
    shares = found.var(0) / squares.repeat_interleave(found.shape[1] // len(squares))
    assert (shares.log().abs() < 5 * math.sqrt(2 / DRAWS)).all()


@dataclass(frozen=True)
class Opaque(chip.NoiseModel):
    g_converter: chip.ConductanceConverter = field(
        default_factory=chip.SinglePairConductanceConverter
    )

    def programmed(self, target, draw):
        return target

    def drift(self, target, draw):
        return target

    def at(self, programmed, drift, time, draw):
        return programmed + draw(programmed)


def test_what_cannot_be_had_is_refused_by_name():
    analog, _ = made("tiles")
    device = analogfx.program(analog, PCM)
    with pytest.raises(ValueError, match="'readout' or 'product'"), device.at(1.0, read_noise="x"):
        pass
    with pytest.raises(ConfigError, match="out_noise = 0"), device.at(1.0, output_noise=True):
        pass
    for model in (Opaque(), chip.StuckAtNoiseModel(Opaque(), 0.1)):
        device = analogfx.program(analog, model)
        with device.at(1.0):
            pass
        with (
            pytest.raises(
                ConfigError, match=r"'product': expected.*Opaque does not define reading"
            ),
            device.at(1.0, read_noise="product"),
        ):
            pass


MODELS = {
    "pcm": chip.PCMLikeNoiseModel(),
    "hermes": chip.HermesNoiseModel(),
    "constant": chip.StateIndependentNoiseModel(),
    "cmo": chip.ReRamCMONoiseModel(),
    "two pairs": chip.PCMLikeNoiseModel(
        g_converter=chip.DualPairConductanceConverter(f_lst=[1.0, 3.0])
    ),
    "faults": chip.StuckAtNoiseModel(chip.PCMLikeNoiseModel(), 0.2, 0.2),
    "none": chip.FoundationNoiseModel(),
    "relaxing": chip.ReRamWan2022NoiseModel(),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_tell_their_read_noise_apart(name):
    """One normal in every draw: a reading is the state plus one standard deviation."""
    model = MODELS[name]
    torch.manual_seed(0)
    goal, scale = model.g_converter.to_conductances(torch.randn(4, 30))
    goal = goal.flatten(1)

    def draw(like, name=""):
        return torch.full_like(like, 0.25)

    programmed = model.programmed(goal, draw)
    drift = model.drift(goal, draw)
    read = model.at(programmed, drift, 3600.0, draw)
    state, spread = model.reading(programmed, drift, 3600.0, draw)
    if name in ("none", "relaxing"):
        assert spread is None
        assert torch.equal(state, read)
        return
    low, high = model.g_converter.g_min, model.g_converter.g_max
    inside = (read > low) & (read < high)
    torch.testing.assert_close(read[inside], (state + 0.25 * spread)[inside])
    assert (spread > 0).any() and inside.float().mean() > 0.4
    variance = model.g_converter.variance(spread.view(-1, 4, 30), scale)
    draws = torch.randn(2000, *spread.shape)
    weights = [
        model.g_converter.to_weights((state + n * spread).view(-1, 4, 30), scale) for n in draws
    ]
    shares = torch.stack(weights).double().var(0) / variance.double().clamp_min(1e-30)
    sure = variance > 1e-6 * variance.max()
    assert (shares[sure].log().abs() < 6 * math.sqrt(2 / 2000)).all()


def test_compiled_models_draw_what_eager_ones_do():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    rules = config(out_noise=0.1, out_bound=10, max_input_size=50)
    analog = analogfx.analogize(net, rules).eval()
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(analog, backend="analogfx", options={"compiler": "aot_eager"})
    device = analogfx.program(analog, PCM, chip.GlobalDriftCompensation())

    def run(model, seconds):
        noisy = device.at(seconds, read=0, read_noise="product", output_noise=True)
        with noisy, torch.no_grad():
            return torch.stack([model(x), model(x)])

    torch.testing.assert_close(run(compiled, 1.0), run(analog, 1.0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(run(compiled, 60.0), run(analog, 60.0))
    torch._dynamo.reset()


def test_lifetimes_with_noise_in_products():
    analog, x = made("tiles", out_noise=0.05)
    analogfx.calibrate(analog, [x], progress=False)
    analog.eval()
    given = {"noise_model": PCM, "times": (1.0, 60.0), "chips": 2, "progress": False}

    def metric(model):
        return output(model, x.expand(4, -1)).var()

    def measure(**keywords):
        return [row.value for row in analogfx.evaluate(analog, metric, **given, **keywords).rows]

    plain = measure()
    noisy = measure(read_noise="product")
    both = measure(read_noise="product", output_noise=True)
    assert noisy == measure(read_noise="product")
    assert len({*plain, *noisy, *both}) == 12
