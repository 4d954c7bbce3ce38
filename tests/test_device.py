import copy
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import analogfx
from analogfx import chip, files
from analogfx.errors import CheckpointError, ConfigError

PCM = chip.PCMLikeNoiseModel()
TIMES = (0.0, 3600.0, 86400.0)


def config(noise_model=None, compensation=None, **mapping):
    made = analogfx.TorchInferenceRPUConfig(
        forward=analogfx.IOParameters(inp_res=254, out_res=254, out_bound=10),
        mapping=analogfx.MappingParameter(**mapping),
        noise_model=noise_model,
        drift_compensation=compensation,
    )
    made.pre_post.input_range.enable = True
    return made


class Model(nn.Module):
    """A tied embedding, a grouped convolution, a computed weight, several tiles."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1, groups=2)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
        self.head = nn.Linear(24, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = torch.relu(self.conv(x.mT).mT)
        return self.head(self.norm(x))


TOKENS = torch.arange(14).reshape(2, 7) % 12


def model(*args, **kwargs):
    torch.manual_seed(0)
    rules = config(*args, **{"max_input_size": 10, "max_output_size": 7} | kwargs)
    return analogfx.analogize(Model(), rules).eval()


@pytest.fixture
def analog():
    return model()


def state(module):
    return {name: (t.clone(), t._version) for name, t in module.state_dict().items()}


def run(device, analog, seconds, **keywords):
    with device.at(seconds, **keywords), torch.no_grad():
        return analog(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tiles", [{}, {"max_input_size": -1, "max_output_size": -1}])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_perfect_chip_computes_what_the_model_does(dtype, tiles, mode):
    analog = model(**tiles)
    rules = analog.conv._analog.config
    rules.pre_post.input_range.dynamic = mode == "dynamic"
    analog = analogfx.analogize(Model(), rules).eval().to(dtype)
    perfect = chip.AdditiveNoiseModel(0.0)
    exact = analog(TOKENS)
    found = run(analogfx.program(analog, perfect), analog, 0)
    assert found.dtype is dtype
    tolerance = {} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(found, exact, **tolerance)


def test_no_parameter_moves_and_the_embedding_stays_exact(analog, tmp_path):
    before = state(analog)
    outside = analog(TOKENS)
    embedded = analog.embed(TOKENS)
    device = analogfx.program(analog, PCM)
    with device.at(3600.0):
        assert not torch.equal(analog(TOKENS), outside)
        assert torch.equal(analog.embed(TOKENS), embedded)
        analogfx.save(analog, tmp_path)
    for name, (t, version) in state(analog).items():
        assert torch.equal(t, before[name][0]) and version == before[name][1], name
    assert torch.equal(analog(TOKENS), outside)
    torch.manual_seed(0)
    assert torch.equal(analogfx.load(Model(), tmp_path).eval()(TOKENS), outside)


def test_times_commute_and_readings_repeat(analog):
    one, two = (analogfx.program(analog, PCM, seed=3) for _ in range(2))
    forward = [run(one, analog, t) for t in TIMES]
    back = [run(two, analog, t) for t in reversed(TIMES)][::-1]
    assert all(map(torch.equal, forward, back))
    again = run(one, analog, TIMES[1])
    assert not torch.equal(again, forward[1])  # read anew
    assert torch.equal(run(one, analog, TIMES[1], read=0), forward[1])
    assert torch.equal(run(one, analog, TIMES[1], read=1), again)
    other = analogfx.program(analog, PCM, seed=4)
    assert not torch.equal(run(other, analog, TIMES[0]), forward[0])


def test_a_chip_is_the_same_for_any_number_of_threads():
    analog = analogfx.analogize(nn.Linear(700, 800), config()).eval()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found += analogfx.program(analog, PCM).weights(60.0).values()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_weights_that_change_later_are_not_on_the_chip(analog):
    device = analogfx.program(analog, PCM)
    before = device.weights(10.0)
    with torch.no_grad():
        analog.embed.weight.mul_(2)
    after = device.weights(10.0)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_devices_are_independent_across_layers_and_tiles():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(200, 100), nn.Linear(200, 100))
    nn.init.constant_(layers[0].weight, 0.5)
    nn.init.constant_(layers[1].weight, 0.5)
    analog = analogfx.analogize(layers, config(max_input_size=100, max_output_size=50)).eval()
    held = analogfx.program(analog, PCM).weights(60.0)
    assert set(held) == {"0.weight", "1.weight"}
    tiles = torch.stack([t.flatten() for w in held.values() for t in w.chunk(2, 1)])
    tiles = tiles.unflatten(1, (2, -1)).flatten(0, 1)
    found = torch.corrcoef(tiles) - torch.eye(8)
    assert found.abs().max() < 5 / 5000**0.5


def test_a_computed_weight_is_programmed(analog):
    held = analogfx.program(analog, chip.AdditiveNoiseModel(0.0)).weights(0)
    computed = next(w for name, w in held.items() if name.startswith("norm"))
    torch.testing.assert_close(computed, analog.norm.weight)


def test_the_chip_holds_clipped_and_quantised_weights():
    rules = config()
    rules.modifier.quantization_type, rules.modifier.res = "DISCRETIZE_PER_CHANNEL", 6
    layer = analogfx.analogize(nn.Linear(20, 8), rules).eval()
    (held,) = analogfx.program(layer, chip.AdditiveNoiseModel(0.0)).weights(0).values()
    assert all(row.div(row.abs().max()).mul(3).round().unique().numel() <= 7 for row in held)
    levels = held / held.abs().amax(1, keepdim=True) * 3
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_devices_nest(analog):
    other = copy.deepcopy(analog)
    first, second = analogfx.program(analog, PCM), analogfx.program(other, PCM, seed=1)
    alone = run(first, analog, 60.0), run(second, other, 60.0)
    exact = analog(TOKENS)
    assert torch.equal(run(first, other, 60.0), exact)  # a copy is another model
    with first.at(60.0, read=0), second.at(60.0, read=0):
        assert torch.equal(analog(TOKENS), alone[0])
        assert torch.equal(other(TOKENS), alone[1])
        with first.at(3600.0):
            assert not torch.equal(analog(TOKENS), alone[0])
        assert torch.equal(analog(TOKENS), alone[0])
    assert torch.equal(analog(TOKENS), exact)


def test_two_chips_of_one_model_run_in_two_threads(analog):
    devices = [analogfx.program(analog, PCM, seed=s) for s in range(2)]
    alone = [run(device, analog, 60.0) for device in devices]
    meet = threading.Barrier(2)
    found = [None, None]

    def work(number):
        with devices[number].at(60.0, read=0), torch.no_grad():
            meet.wait(10)
            found[number] = analog(TOKENS)
            meet.wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, alone))


def test_an_exception_leaves_nothing_behind(analog):
    exact = analog(TOKENS)
    with pytest.raises(KeyError), analogfx.program(analog, PCM).at(60.0):
        raise KeyError
    assert torch.equal(analog(TOKENS), exact)


def test_training_inside_raises(analog):
    with analogfx.program(analog, PCM).at(60.0):
        with pytest.raises(RuntimeError, match=r"has no gradient: leave device\.at"):
            analog(TOKENS).sum().backward()
        analog.train()
        with pytest.raises(RuntimeError, match="conv: a programmed chip does not train"):
            analog(TOKENS)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(analog, seconds):
    device = analogfx.program(analog, PCM)
    with pytest.raises(ValueError, match="from 0 on"), device.at(seconds):
        pass


def test_without_a_noise_model_the_site_is_named(analog):
    with pytest.raises(ConfigError, match=r"conv.weight: noise_model = None"):
        analogfx.program(analog)


def test_configs_give_each_site_its_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    perfect = chip.AdditiveNoiseModel(0.0)
    analog = analogfx.analogize(net, {"0": config(perfect), "1": config(PCM)}).eval()
    held = analogfx.program(analog).weights(60.0)
    torch.testing.assert_close(held["0.weight"], net[0].weight)
    assert (held["1.weight"] - net[1].weight).abs().max() > 1e-3


def test_saved_chips_are_the_same_again(analog, tmp_path):
    device = analogfx.program(analog, PCM, chip.GlobalDriftCompensation(), seed=7)
    expected = run(device, analog, 3600.0)
    device.save(tmp_path)
    device.save(tmp_path)
    torch.manual_seed(0)
    other = model()
    with torch.no_grad():
        other.conv.weight.zero_()
    loaded = analogfx.load_device(other, tmp_path)
    assert torch.equal(run(loaded, other, 3600.0), expected)


def test_damaged_and_foreign_chips_are_refused(analog, tmp_path):
    with pytest.raises(CheckpointError, match=r"no chip\.json"):
        analogfx.load_device(analog, tmp_path)
    analogfx.program(analog, PCM).save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        analogfx.load_device(analogfx.analogize(nn.Linear(3, 4), config()), tmp_path)
    record = json.loads((tmp_path / "chip.json").read_text())
    (tmp_path / "chip.json").write_text(json.dumps(record | {"schema": 9}))
    with pytest.raises(CheckpointError, match="schema 9, expected 1"):
        analogfx.load_device(analog, tmp_path)
    (tmp_path / "chip.json").write_text(json.dumps(record))
    file = tmp_path / record["tensors"]["file"]
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="checksum"):
        analogfx.load_device(analog, tmp_path)


@dataclass(frozen=True)
class Halved(chip.NoiseModel):
    g_converter: chip.ConductanceConverter = None

    def __post_init__(self):
        object.__setattr__(self, "g_converter", chip.SinglePairConductanceConverter())

    def programmed(self, target, draw):
        return target

    def drift(self, target, draw):
        return target

    def at(self, programmed, drift, time, draw):
        return programmed / 2 if time else programmed


@dataclass(frozen=True)
class Largest(chip.BaseDriftCompensation):
    def readout(self, weights):
        return weights.abs().amax()


COMPENSATIONS = [
    chip.GlobalDriftCompensation(),
    chip.PerColumnDriftCompensation(),
    chip.GlobalDriftCompensationWithExactReference(),
    Largest(),
]


@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=lambda c: type(c).__name__)
def test_compensation_acts_behind_the_adc(compensation):
    """Halved weights move codes of the ADC by half, and the factor doubles them again."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 6, bias=False)
    analog = analogfx.analogize(layer, config()).eval()
    x = torch.randn(9, 40)
    with analogfx.program(analog, Halved(), compensation).at(1.0), torch.no_grad():
        found = analog(x)
    step = 2 * 3.0 * 10 * layer.weight.abs().max() / 254
    rounded = torch.round(x.clamp(-3, 3) / (6 / 254)) * (6 / 254)
    expected = 2 * torch.round(rounded @ (layer.weight.T / 2) / step) * step
    assert (found / step - expected / step).abs().round().max() <= 2  # a tie of the ADC at most
    assert (found - expected).abs().le(1e-4).float().mean() > 0.98
    torch.testing.assert_close(found / (2 * step), (found / (2 * step)).round(), atol=1e-3, rtol=0)


def test_each_compensation_reads_what_it_says(analog):
    torch.manual_seed(0)
    target = torch.randn(50, 80)
    programmed, now = target * 1.1, target * torch.linspace(0.5, 1, 50).unsqueeze(1)
    by_tile = (programmed.abs().sum() / now.abs().sum()).expand(50)
    factors = [c.factor(target, programmed, now) for c in COMPENSATIONS]
    torch.testing.assert_close(factors[0], by_tile)
    torch.testing.assert_close(factors[1], 1.1 / torch.linspace(0.5, 1, 50))
    torch.testing.assert_close(factors[2], by_tile / 1.1)
    dead = torch.zeros(3, 4)
    assert all(torch.equal(c.factor(dead, dead, dead), torch.ones(3)) for c in COMPENSATIONS)


def test_a_million_devices_drift_as_the_law_says():
    """Median of g(t) / g(0) is (t / t_0)^-nu at the mean nu; its spread that of nu."""
    model = chip.PCMLikeNoiseModel(prog_noise_scale=0.0, read_noise_scale=0.0)
    layer = nn.Linear(1000, 1000, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    analog = analogfx.analogize(layer, analogfx.TorchInferenceRPUConfig()).eval()
    (held,) = analogfx.program(analog, model).weights(1e6).values()
    exponent = -held.log() / torch.tensor((1e6 + 20) / 20).log()
    assert exponent.mean().item() == pytest.approx(0.049, abs=1e-4)
    assert exponent.std().item() == pytest.approx(0.008, abs=1e-4)


def test_end_to_end_with_aihwkits_torch_tile(monkeypatch):
    """Programming, drift and global compensation of a Linear, all normals 1 on both sides."""
    pytest.importorskip("aihwkit")
    from aihwkit.inference import GlobalDriftCompensation, PCMLikeNoiseModel
    from aihwkit.inference.noise import pcm
    from aihwkit.nn.conversion import convert_to_analog
    from aihwkit.simulator.configs import TorchInferenceRPUConfig

    torch.manual_seed(0)
    digital = nn.Linear(30, 20).eval()
    # The reference takes a tile's largest weight for its scale anew at each time: none is moved.
    reference_model = PCMLikeNoiseModel(prog_noise_scale=0.0)
    rules = TorchInferenceRPUConfig()
    rules.forward.is_perfect = True
    rules.noise_model, rules.drift_compensation = reference_model, GlobalDriftCompensation()
    reference = convert_to_analog(digital, rules).eval()
    monkeypatch.setattr(pcm, "randn_like", torch.ones_like)
    monkeypatch.setattr(
        analogfx.device._Draws, "__call__", lambda draw, like: torch.ones_like(like)
    )
    analog = analogfx.analogize(digital, analogfx.TorchInferenceRPUConfig()).eval()
    device = analogfx.program(analog, reference_model, GlobalDriftCompensation())
    x = torch.randn(5, 30)
    reference.program_analog_weights()
    for seconds in (1.0, 3600.0, 1e8):
        reference.drift_analog_weights(seconds)
        with device.at(seconds), torch.no_grad():
            found = analog(x)
        torch.testing.assert_close(found, reference(x).detach(), rtol=1e-4, atol=1e-5)


def test_trace_shows_what_the_chip_holds(analog):
    device = analogfx.program(analog, PCM, chip.GlobalDriftCompensation())
    with device.at(60.0), torch.no_grad():
        graph = analogfx.trace(analog, TOKENS)
        expected = analog(TOKENS)
    assert sum("held_" in str(n.target) for n in graph.graph.nodes) == 3
    torch.testing.assert_close(graph(TOKENS), expected)


@pytest.mark.parametrize("backend", ["eager", "analogfx"])
def test_compiled_models_follow_the_chip_without_recompiling(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    analog = analogfx.analogize(net, config(max_input_size=50)).eval()
    x = torch.randn(2, 3, 6, 6)
    options = {"options": {"compiler": "eager"}} if backend == "analogfx" else {}
    compiled = torch.compile(analog, backend=backend, fullgraph=True, **options)
    device = analogfx.program(analog, PCM, chip.GlobalDriftCompensation())
    other = analogfx.program(analog, PCM, chip.GlobalDriftCompensation(), seed=1)
    with torch.no_grad():
        outside = analog(x)
        torch.testing.assert_close(compiled(x), outside)
        with device.at(1.0):
            torch.testing.assert_close(compiled(x), analog(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for one, seconds in ((device, 60.0), (other, 3600.0)):
                with one.at(seconds):
                    torch.testing.assert_close(compiled(x), analog(x))
            torch.testing.assert_close(compiled(x), outside)
    torch._dynamo.reset()


def test_another_saver_tidies_around_a_chip_that_is_being_saved(tmp_path, monkeypatch):
    analog = analogfx.analogize(nn.Linear(4, 3), analogfx.TorchInferenceRPUConfig()).eval()
    write = files.save_file

    def meanwhile(*arguments, **options):
        files.remove_abandoned(tmp_path)  # as every save of a checkpoint there does
        write(*arguments, **options)

    monkeypatch.setattr(files, "save_file", meanwhile)
    device = analogfx.program(analog, chip.PCMLikeNoiseModel())
    device.save(tmp_path)
    device.save(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    analogfx.load_device(analog, tmp_path)


MODELS = (
    PCM,
    chip.HermesNoiseModel(),
    chip.StuckAtNoiseModel(chip.StateIndependentNoiseModel(), at_g_min=0.1, at_g_max=0.1),
    chip.ReRamCMONoiseModel(),
    chip.ReRamWan2022NoiseModel(g_converter=chip.NPairConductanceConverter([1.0, 3.0])),
    chip.FoundationNoiseModel(),
    chip.CustomDriftPCMLikeNoiseModel(
        g_converter=chip.CustomPairConductanceConverter(),
        custom_drift_model={
            "g_lst": [0.0, 7.0, 25.0],
            "nu_mean_lst": [0.1, 0.06, 0.05],
            "nu_std_lst": [0.05, 0.03, 0.01],
        },
    ),
)


def layers():
    """One for each noise model, of more devices than are computed at a time."""
    torch.manual_seed(0)
    compensation = chip.GlobalDriftCompensation(), chip.PerColumnDriftCompensation()
    rules = {
        str(n): config(noise_model, compensation[n % 2], max_input_size=150, max_output_size=-1)
        for n, noise_model in enumerate(MODELS)
    }
    net = nn.Sequential(*(nn.Linear(300, 300) for _ in MODELS))
    return analogfx.analogize(net, rules, strict=True).eval()


def seen_of(device, analog):
    """What a chip holds, its factors, and what the model computes with them."""
    seen = {}
    for seconds in (0.0, 1.0, 1e5):
        with device.at(seconds, read=0), torch.no_grad():
            seen[f"{seconds}/out"] = analog(torch.linspace(-1, 1, 600).view(2, 300))
            for number, layer in enumerate(analog):
                (held,) = analogfx.held.of(layer._analog)
                seen |= {f"{seconds}/{number}": held.weight, f"{seconds}/{number}/gain": held.gain}
    return seen


def test_a_chip_holds_the_same_bits_in_another_process(tmp_path):
    """With other instructions and threads, too; outputs have the same bits with the same ones."""
    analog = layers()
    device = analogfx.program(analog, seed=5)
    device.save(tmp_path / "chip")
    expected = seen_of(device, analog)
    code = (
        "import sys, torch, analogfx, test_device as t; analog = t.layers();"
        "device = analogfx.load_device(analog, sys.argv[1]);"
        "torch.save(t.seen_of(device, analog), sys.argv[2])"
    )
    plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    other = {"ATEN_CPU_CAPABILITY": "avx2" if plain else "default", "OMP_NUM_THREADS": "3"}
    here = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for case, changed in (("here", here), ("there", other)):
        path = tmp_path / f"{case}.pt"
        command = [sys.executable, "-c", code, str(tmp_path / "chip"), str(path)]
        surroundings = os.environ | changed | {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run(command, check=True, timeout=120, env=surroundings)
        found = torch.load(path)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if case == "here" or "out" not in name:
                assert torch.equal(value, expected[name]), (case, name)
