import copy
import pickle
from unittest import mock

import pytest
import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from aihwkit_lightning.simulator.configs import (
    TorchInferenceRPUConfig,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from oracle import assert_equal, feeding
from samples import CONFIGS, EVERYTHING, IDENTITY, TILES, merged, modifier, ranged
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

import analogfx
from analogfx import chip
from analogfx.kernels import weights

# Configs are drawn: few steps are meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:forward[.].*_res = .* is a quantizer of"),
    pytest.mark.usefixtures("one_thread"),
]

OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "both directions, two layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
}
LAYERS = {
    f"{kind.__name__}, {name}": (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for name, options in OPTIONS.items()
} | {
    "LSTM, projected": (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu"}),
}
INPUTS = {
    "batch": lambda: torch.randn(5, 2, 3, dtype=torch.float64),
    "single": lambda: torch.randn(5, 3, dtype=torch.float64),
    "packed": lambda: pack_sequence(
        [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 3)], enforce_sorted=False
    ),
}
X = torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def made(kind=nn.LSTM, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return kind(3, 4, dtype=dtype, **options)


def tensors(output):
    """All tensors that a layer returns."""
    first, states = output
    assert isinstance(states, (torch.Tensor, tuple))
    if isinstance(first, PackedSequence):
        first = [t for t in first if t is not None]
    return tree_leaves((first, states))


def gradients(layer, outputs):
    loss = sum(t.square().sum() for t in outputs if t.is_floating_point())
    return torch.autograd.grad(loss, list(layer.parameters()))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_ideal_layer_is_torchs(name, shape, given):
    kind, options = LAYERS[name]
    digital, x = made(kind, **options), INPUTS[shape]()
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    states = ()
    if given:  # what torch returns has the shapes that it takes
        first = digital(x)[1]
        states = (tuple(map(torch.rand_like, first)),) if kind is nn.LSTM else (
            torch.rand_like(first),)  # fmt: skip
    expected, found = digital(x, *states), analog(x, *states)
    assert type(found[0]) is type(expected[0]) and type(found[1]) is type(expected[1])
    torch.testing.assert_close(tensors(found), tensors(expected))
    of_torch = gradients(digital, tensors(expected))
    torch.testing.assert_close(gradients(analog, tensors(found)), of_torch)
    with torch.no_grad():
        torch.testing.assert_close(tensors(analog.eval()(x, *states)), tensors(expected))


def test_dropout_between_layers_is_torchs():
    digital, x = made(num_layers=3, dropout=0.5), X
    analog = analogfx.analogize(digital, IDENTITY)
    for _ in range(3):
        masks = []
        for layer in (digital, analog):
            torch.manual_seed(1)
            masks.append(tensors(layer(x)))
        torch.testing.assert_close(*masks)
    assert not torch.equal(analog(x)[0], analog(x)[0])
    analog.eval()
    torch.testing.assert_close(tensors(analog(x)), tensors(digital.eval()(x)))


def test_torchs_refusals_stay():
    analog = analogfx.analogize(made(), IDENTITY)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 1D"):
        analog(X[0, 0])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        analog(X[..., :2])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        analog(X, (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))


def test_a_class_with_a_forward_of_its_own_stays_digital_and_the_report_says_so():
    class First(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    sites = analogfx.report(analogfx.analogize(First(3, 4), IDENTITY)).sites
    assert {s.status for s in sites} == {"digital"}
    assert "forward of its own" in sites[0].reason


# --------------------------------------------------------------------------- against Lightning


def both(kind, config, **options):
    digital = made(kind, **options)
    lightning = convert_to_analog(nn.Sequential(copy.deepcopy(digital)), copy.deepcopy(config))[0]
    return lightning, analogfx.analogize(digital, config)


def place(name):
    """Lightning's path of one of our parameters."""
    reverse = name.endswith("_reverse")
    what, of, layer = name.removesuffix("_reverse").rsplit("_", 2)
    return f"rnn.layers.{layer[1:]}.directions.{int(reverse)}.cell.weight_{of}.{what}"


def tensor_of(lightning, name):
    path = place(name)
    paths = path, path.replace(".directions.0", "")
    everything = dict(lightning.named_parameters()) | dict(lightning.named_buffers())
    return next(everything[p] for p in paths if p in everything)


def lightning_config(ranges="static", closed=False, noise=False, bits=254.0):
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.decay = 0.01
    config.pre_post.input_range.init_value = 0.6
    config.pre_post.input_range.init_from_data = 0 if closed else 9
    if ranges != "static":
        setattr(config.pre_post.input_range, ranges, True)
    config.forward.inp_res, config.forward.out_res, config.forward.out_bound = (
        bits,
        bits,
        2.1,
    )  # no sum of codes lies on a tie
    config.mapping.max_input_size = 2
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    config.modifier.res = 62
    if noise:
        config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
        config.modifier.std_dev = 0.05
        config.forward.out_noise = 0.03
    return config


STACKS = {
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {"num_layers": 2}),
    "RNN": (nn.RNN, {"bidirectional": True}),
    "LSTM, both directions, two layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
}


@pytest.mark.parametrize("ranges", ["static", "fast_mode", "dynamic"])
@pytest.mark.parametrize("name", STACKS)
def test_outputs_statistics_and_weight_gradients_are_lightnings(name, ranges):
    kind, options = STACKS[name]
    lightning, analog = both(kind, lightning_config(ranges), **options)
    for number, training in enumerate((True, True, True, False)):
        lightning.train(training)
        analog.train(training)
        with feeding([], torch.float64):
            expected = lightning(X)[0]
        found = analog(X)[0]
        assert_equal(found.detach(), expected.detach())
        with feeding([], torch.float64):
            expected.square().sum().backward()
        found.square().sum().backward()
        # Lightning's backward reads a range as it is then, which later steps have changed (see
        # docs/departures.md): it scales the range's gradient, and in fast mode masks by it.
        settled = number > 1 or ranges != "fast_mode"
        for name, parameter in analog.named_parameters():
            if settled and "range" not in name:
                assert_equal(parameter.grad, tensor_of(lightning, name).grad)
        for name, value in analog.state_dict().items():
            assert_equal(value, tensor_of(lightning, name).detach())
        analog.zero_grad()
        lightning.zero_grad()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_of_ranges_are_lightnings_step_by_step(name, training):
    """The decay of a range counts once for every time step."""
    kind, options = STACKS[name]
    lightning, analog = both(kind, lightning_config(closed=True), **options)
    lightning.train(training)
    analog.train(training)
    with feeding([], torch.float64):
        lightning(X)[0].square().sum().backward()
    analog(X)[0].square().sum().backward()
    names = [name for name, _ in analog.named_parameters() if "range" in name]
    assert len(names) == len(analogfx.report(analog).sites)
    for name, parameter in analog.named_parameters():
        assert parameter.grad.abs().sum() > 0
        assert_equal(parameter.grad, tensor_of(lightning, name).grad)


def test_noise_is_drawn_for_every_weight_in_every_time_step():
    lightning, analog = both(nn.GRU, lightning_config(noise=True))
    drawn = []

    def normal(*args):
        drawn.append(analogfx.kernels.noise.normal(*args).clone())
        return drawn[-1].clone()

    with (
        mock.patch.object(weights, "noise", mock.Mock(normal=normal)),
        mock.patch("analogfx.kernels.linear.noise", mock.Mock(normal=normal)),
    ):
        found = analog(X)[0]
    # Ours: of every step of x's product, then of h's: the weights, and outputs of every tile.
    calls, start = [], 0
    for tiles in [2] * 6 + [2] * 6:
        calls.append(drawn[start : start + 1 + tiles])
        start += 1 + tiles
    assert start == len(drawn)
    for first, *_ in calls:
        assert sum(torch.equal(first, other) for other, *_ in calls) == 1
    fed = []
    for step in range(6):
        for matrix, *outputs in (calls[step], calls[6 + step]):
            for part, output in zip(matrix.split(2, dim=1), outputs, strict=False):
                fed += [part, output]
    with feeding(fed, torch.float64):
        expected = lightning(X)[0]
    assert_equal(found.detach(), expected.detach())


def test_lightnings_state_dict_loads():
    lightning, analog = both(nn.LSTM, lightning_config(), num_layers=2, bidirectional=True)
    with feeding([], torch.float64):
        lightning(X)
    # Its hooks name what its layers hold, as below, but for learned clips.
    saved = {name: tensor_of(lightning, name).detach() for name in analog.state_dict()}
    analog.load_state_dict(saved)
    with feeding([], torch.float64):
        assert_equal(analog.eval()(X)[0].detach(), lightning.eval()(X)[0].detach())
    inside = nn.Module()
    inside.layer = lightning
    named = {name.removeprefix("layer.") for name in inside.state_dict()}
    assert named == set(analog.state_dict())


# --------------------------------------------------------------------------------- as any layer


RANGES = merged(ranged(init_from_data=3), {"forward": {"inp_res": 30, "out_res": 61}},
                {"forward": {"out_bound": 1.5}})  # fmt: skip


class Tagger(nn.Module):
    """Words to tags, by a recurrent layer and a cell."""

    def __init__(self):
        super().__init__()
        self.words, self.tags = nn.Embedding(9, 3), nn.Linear(4, 2)
        self.lstm = nn.LSTM(3, 4, 2, batch_first=True)
        self.cell = nn.GRUCell(4, 4)

    def forward(self, words):
        y, _ = self.lstm(self.words(words))
        h = None
        for t in range(2):
            h = self.cell(y[:, t], h)
        return self.tags(y[:, -1] + h)


WORDS = torch.arange(10).view(2, 5) % 9


def tagger(config=RANGES, training=False):
    torch.manual_seed(0)
    analog = analogfx.analogize(Tagger(), config, strict=True)
    for _ in range(3):
        analog(WORDS)
    return analog.train(training)


def test_the_report_lists_every_weight():
    found = analogfx.report(tagger())
    assert [s.name for s in found.sites] == [
        "tags",
        *(f"lstm.weight_{of}_l{layer}" for layer in (0, 1) for of in ("ih", "hh")),
        *(f"cell.weight_{of}" for of in ("ih", "hh")),
    ]
    assert found.coverage == 1.0
    assert {s.kind for s in found.sites} == {"linear"}


def test_statistics_count_time_steps():
    analog = tagger()
    assert analog.lstm.input_range_update_idx_ih_l0 == 3
    anew = analogfx.analogize(Tagger(), ranged(init_from_data=100))
    anew(WORDS)
    # The first state is 0, which has no spread.
    counts = {n: int(b) for n, b in anew.named_buffers() if "update_idx" in n}
    assert counts == {
        "lstm.input_range_update_idx_ih_l0": 5, "lstm.input_range_update_idx_hh_l0": 4,
        "lstm.input_range_update_idx_ih_l1": 5, "lstm.input_range_update_idx_hh_l1": 4,
        "cell.input_range_update_idx_ih": 2, "cell.input_range_update_idx_hh": 1,
        "tags.input_range_update_idx": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_inference_is_the_same_with_gradients_and_without(name):
    analog = tagger(merged(CONFIGS[name], TILES))
    with torch.no_grad():
        torch.testing.assert_close(analog(WORDS), analog(WORDS))
        without = analog(WORDS)
    torch.testing.assert_close(without, analog(WORDS).detach())


def test_copies_pickles_and_folders_compute_the_same(tmp_path):
    analog = tagger(EVERYTHING)
    analogfx.save(analog, tmp_path)
    expected = analog(WORDS)
    for twin in (
        copy.deepcopy(analog),
        pickle.loads(pickle.dumps(analog)),
        analogfx.load(Tagger(), tmp_path).eval(),
    ):
        assert torch.equal(twin(WORDS), expected)
    assert analogfx.to_digital(analog).state_dict().keys() == Tagger().state_dict().keys()
    assert type(analogfx.to_digital(analog).lstm) is nn.LSTM


def test_a_half_model_keeps_its_ranges_in_single_precision():
    analog = tagger().bfloat16()
    assert analog.lstm.input_range_hh_l1.dtype == torch.float32
    y = analog(WORDS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), tagger()(WORDS), atol=0.2, rtol=0.1)


def test_autocast_computes_in_its_precision():
    digital = made(dtype=torch.float32)
    analog, x = analogfx.analogize(digital, IDENTITY), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = analog(x)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), digital(x)[0], atol=0.03, rtol=0.05)


def test_a_model_evaluated_on_chips_of_a_config():
    config = merged(RANGES, {"noise_model": chip.PCMLikeNoiseModel().to_dict()})
    analog = tagger(config)
    exact = analog(WORDS).detach()

    def error(model):
        return float((model(WORDS) - exact).norm())

    life = analogfx.evaluate(analog, error, chips=4, times=(1.0, 3.0e7), progress=False)
    assert life.exact < 1e-5
    early, late = life.mean
    assert 0 < early < late


def test_a_chip_without_noise_is_the_model():
    analog = tagger(merged(EVERYTHING, TILES))
    device = analogfx.program(analog, chip.AdditiveNoiseModel(0.0), seed=1)
    with torch.no_grad(), device.at(1.0):
        torch.testing.assert_close(analog(WORDS), analog(WORDS))
        on_chip = analog(WORDS)
    torch.testing.assert_close(on_chip, analog(WORDS).detach())
    assert {"lstm.weight_ih_l0", "cell.weight_hh"} <= device.weights(1.0).keys()


def test_programming_noise_acts_on_every_time_step_alike():
    analog = analogfx.analogize(made(), IDENTITY).eval()
    device = analogfx.program(analog, analogfx.chip.AdditiveNoiseModel(0.1), seed=0)
    noisy = made()
    with torch.no_grad():
        for name, weight in device.weights(0.0).items():
            noisy.get_parameter(name).copy_(weight)
    assert not torch.equal(noisy.weight_hh_l0, analog.weight_hh_l0)
    with device.at(0.0):
        torch.testing.assert_close(tensors(analog(X)), tensors(noisy(X)))


def test_calibration_sees_the_inputs_of_all_time_steps():
    analog = analogfx.analogize(made(dtype=torch.float32), ranged()).eval()
    x = X.float()
    analogfx.calibrate(analog, [x], method="max", progress=False)
    torch.testing.assert_close(analog.input_range_ih_l0.detach(), x.abs().max().view(1))
    h = made(dtype=torch.float32)(x)[0][:-1]
    torch.testing.assert_close(analog.input_range_hh_l0.detach(), h.abs().max().view(1))


def test_the_optimizers_step_clips_every_weight():
    config = {"clip": {"type": "LayerGaussianPerChannel", "sigma": 1.0}}
    analog = analogfx.analogize(made(), config)
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.0)
    analogfx.clip_after_step(optimizer, analog)
    analog(X)[0].sum().backward()
    optimizer.step()
    for name, weight in made().named_parameters():
        if name.startswith("weight"):
            bound = weight.std(dim=1, keepdim=True)
            clipped = weight.clamp(-bound, bound)
            torch.testing.assert_close(getattr(analog, name).detach(), clipped.detach())


def test_quantized_weights_are_what_inference_used():
    config = modifier(quantization_type="DiscretizePerChannel", res=14)
    analog = analogfx.analogize(made(), config).eval()
    before = analog(X)[0]
    analogfx.quantize_weights(analog)
    torch.testing.assert_close(analog(X)[0], before)
    assert len(analog.weight_hh_l0[0].unique()) <= 15


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "analogfx"])
def test_an_analog_model_compiles(backend):
    analog = tagger()
    with torch.no_grad():
        expected = analog(WORDS)
        torch.testing.assert_close(torch.compile(analog, backend=backend)(WORDS), expected)


def test_a_trace_is_one_graph():
    analog = tagger()
    with torch.no_grad():
        expected = analog(WORDS)
        torch.testing.assert_close(analogfx.trace(analog, WORDS)(WORDS), expected)


@pytest.mark.filterwarnings("ignore:the file of Tagger takes one size alone")
def test_an_exported_model_computes_the_same(tmp_path):
    pytest.importorskip("onnx_ir")
    analog = tagger()
    # It compares every site and the whole with onnxruntime.
    analogfx.export_onnx(analog, (WORDS,), tmp_path / "tagger.onnx")


def test_packed_sequences_with_noise_leave_what_has_ended_alone():
    analog = analogfx.analogize(made(batch_first=True), EVERYTHING)
    x = X.transpose(0, 1)
    y, (h, _) = analog(pack_padded_sequence(x, torch.tensor([6, 2]), batch_first=True))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    assert lengths.tolist() == [6, 2]
    assert torch.equal(h[0, 1], padded[1, 1])
    assert torch.equal(padded[1, 2:], torch.zeros(4, 4, dtype=x.dtype))
