import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from samples import (
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    LAYERS,
    TILES,
    layer_and_input,
    merged,
    mlp,
    product,
)
from torch import nn

import analogfx
from analogfx.errors import CaptureError
from analogfx.modules.analog_module import AnalogModule, analog_class
from analogfx.modules.program import explicit_level
from analogfx.modules.remember import row_maxima
from analogfx.modules.sites import sites, unwrapped

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = CONFIGS["learned clip"]


def analog_layer(config=EVERYTHING, layer="linear", dtype=torch.float32):
    module, x = layer_and_input(layer, dtype)
    return analogfx.analogize(module, config), x


# --------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (IDENTITY, []),
        (CONFIGS["weight noise"], []),
        (CONFIGS["dynamic"], []),
        (CONFIGS["DAC"], ["input_range", "input_range_update_idx", "x_min", "x_max"]),
        (CONFIGS["fast"], ["input_range", "input_range_update_idx", "x_min", "x_max"]),
        (CONFIGS["learned clip, discrete"], ["learnable_weight_clip"]),
        (EVERYTHING, [
            "input_range", "input_range_update_idx", "learnable_weight_clip", "x_min", "x_max",
        ]),
    ],
)  # fmt: skip
def test_a_site_registers_what_its_config_needs_under_lightnings_names(config, names):
    analog, _ = analog_layer(config)
    assert sorted(analog.state_dict()) == sorted(["weight", "bias", *names])


def test_initial_state():
    analog, _ = analog_layer(merged(EVERYTHING, TILES))  # 3 tiles of 4 inputs, 7 outputs
    assert analog.input_range.tolist() == [3.0] * 3
    assert analog.input_range_update_idx.tolist() == [0] * 3
    assert analog.input_range_update_idx.dtype == torch.int64
    torch.testing.assert_close(analog.x_max, torch.full((3,), 1e-5))
    torch.testing.assert_close(analog.x_min, torch.full((3,), -1e-5))
    expected = torch.stack([part.abs().amax(1) for part in analog.weight.split(4, dim=1)])
    assert torch.equal(analog.learnable_weight_clip, expected)
    assert analog.input_range.requires_grad and analog.learnable_weight_clip.requires_grad


@pytest.mark.parametrize("learn", [True, False])
def test_a_range_is_trained_if_the_config_says_so(learn):
    config = merged(CONFIGS["DAC"], {"pre_post": {"input_range": {"learn_input_range": learn}}})
    analog, _ = analog_layer(config)
    assert isinstance(analog.input_range, nn.Parameter)
    assert analog.input_range.requires_grad is learn


@pytest.mark.parametrize("layer", LAYERS)
def test_row_maxima_are_those_of_every_tile(layer):
    analog, _ = analog_layer(merged(CLIP, TILES), layer)
    ((_, module, site),) = sites(analog)
    matrix = analog.weight.flatten(1)
    expected = [part.abs().amax(1) for part in matrix.split(list(site.in_sizes), dim=1)]
    assert torch.equal(row_maxima(site, site.weight(module)), torch.stack(expected))


STATE = ("input_range", "x_min", "x_max", "learnable_weight_clip")


@pytest.mark.parametrize(
    ("change", "weights", "state"),
    [
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.bfloat16(), torch.bfloat16, torch.float32),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.double().float(), torch.float32, torch.float32),
        (lambda m: m.double().half(), torch.float16, torch.float32),
        (lambda m: m.half().float(), torch.float32, torch.float32),
        (lambda m: m.to("cpu"), torch.float32, torch.float32),
    ],
)
def test_ranges_and_clips_stay_in_single_precision_in_a_half_model(change, weights, state):
    analog, x = analog_layer()
    torch.manual_seed(0)
    analog(x).sum().backward()
    before = analog.input_range.detach().clone()
    analog = change(analog)
    assert analog.weight.dtype == weights
    assert {getattr(analog, name).dtype for name in STATE} == {state}
    assert analog.input_range.grad.dtype == state
    assert analog.input_range_update_idx.dtype == torch.int64
    torch.testing.assert_close(analog.input_range.detach().float(), before)
    y = analog(x.to(weights))
    assert y.dtype == weights
    y.sum().backward()


def test_half_models_are_analogized_with_single_precision_state():
    digital = nn.Linear(6, 4).bfloat16()
    analog = analogfx.analogize(digital, EVERYTHING)
    assert {getattr(analog, name).dtype for name in STATE} == {torch.float32}


# ------------------------------------------------------------------------------------ the class


def test_nothing_stays_on_a_module_that_is_digital_again():
    digital, _ = layer_and_input("linear", torch.float32)
    analog, _ = analog_layer()
    analog.load_state_dict(digital.state_dict())
    analogfx.to_digital(analog, inplace=True)
    assert vars(analog).keys() == vars(digital).keys()
    assert not analog._load_state_dict_post_hooks
    assert analog.state_dict().keys() == digital.state_dict().keys()


def test_the_class_is_a_subclass_of_the_modules_own_and_cached():
    analog, _ = analog_layer()
    assert isinstance(analog, nn.Linear) and isinstance(analog, AnalogModule)
    assert type(analog) is analog_class(nn.Linear)
    assert type(analog).__name__ == "AnalogLinear" and type(analog).digital_class is nn.Linear
    assert "tiles=1x1" in repr(analog)


def test_two_classes_of_one_name_stay_two_classes():
    classes = [type("Net", (nn.Linear,), {"forward": f}) for f in (
        lambda self, x: F.linear(x, self.weight), lambda self, x: F.linear(x, -self.weight)
    )]  # fmt: skip
    nets = [analogfx.analogize(cls(3, 2), IDENTITY) for cls in classes]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(nets[0](x), -nets[1](x))


def test_the_signature_is_that_of_the_digital_forward():
    import inspect

    analog, _ = analog_layer()
    assert inspect.signature(analog.forward) == inspect.signature(nn.Linear(1, 1).forward)


def test_modules_of_a_metaclass_with_abstract_methods():
    import abc

    class Base(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x): ...

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return F.linear(x, self.w)

    analog = analogfx.analogize(Net(), EVERYTHING)
    assert isinstance(analog, Base) and analog(torch.randn(2, 4)).shape == (2, 3)


# ------------------------------------------------------------------------------- copies, pickles


def same_outputs(first, second, x):
    for training in (True, False):
        torch.manual_seed(1)
        y = first.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(y, second.train(training)(x))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_independent_and_computes_the_same(name):
    analog = analogfx.analogize(mlp(), merged(EVERYTHING, TILES))
    x = torch.randn(5, 8)
    analog(x)
    twin = COPIES[name](analog)
    torch.testing.assert_close(twin.state_dict(), analog.state_dict(), rtol=0, atol=0)
    same_outputs(analog, twin, x)
    twin.first._analog.config.forward.inp_res = -1
    assert analog.first._analog.config.forward.inp_res == 30
    with torch.no_grad():
        twin.first.weight.zero_()
        twin.first.input_range.zero_()
    assert analog.first.weight.any() and analog.first.input_range.any()


def test_a_copy_shares_the_programs():
    analog, _ = analog_layer()
    twin = copy.deepcopy(analog)
    key = next(iter(analog._analog.programs))
    assert twin._analog.programs[key] is analog._analog.programs[key]


# --------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("assign", [False, True])
def test_a_digital_state_dict_loads_and_leaves_ranges_alone(assign):
    analog = analogfx.analogize(mlp(), merged(EVERYTHING, TILES))
    analog(torch.randn(5, 8))
    ranges = analog.first.input_range.detach().clone()
    digital = mlp(seed=5)
    result = analog.load_state_dict(digital.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(analog.first.input_range, ranges)
    assert analog.first.input_range_update_idx.tolist() == [1, 1]
    for name in ("first", "second"):
        layer = getattr(analog, name)
        assert torch.equal(layer.weight, getattr(digital, name).weight)
        ((_, _, site),) = sites(layer)
        assert torch.equal(layer.learnable_weight_clip, row_maxima(site, layer.weight))
        assert isinstance(layer.input_range, nn.Parameter) and layer.input_range.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_an_analog_state_dict_loads_as_it_is(assign):
    analog, x = analog_layer(merged(EVERYTHING, TILES))
    analog(x)
    with torch.no_grad():
        analog.learnable_weight_clip.mul_(0.5)
    state = copy.deepcopy(analog.state_dict())
    fresh, _ = analog_layer(merged(EVERYTHING, TILES))
    fresh.load_state_dict(state, assign=assign)
    torch.testing.assert_close(fresh.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_clips_of_a_parametrized_weight_start_from_the_weight_that_is_loaded(device):
    def make(seed, device="cpu"):
        torch.manual_seed(seed)
        with torch.device(device):
            return torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))

    analog = analogfx.analogize(make(0, device), CLIP, inplace=True)
    analog.load_state_dict(make(1).state_dict(), assign=device == "meta")
    torch.testing.assert_close(analog.learnable_weight_clip[0], analog.weight.abs().amax(1))
    assert analog.input_range == 3.0


def test_a_range_missing_from_a_strict_analog_state_is_no_error_but_a_weight_is():
    analog, _ = analog_layer()
    with pytest.raises(RuntimeError, match="weight"):
        analog.load_state_dict({"bias": analog.bias.detach()})
    with pytest.raises(RuntimeError, match="unknown"):
        analog.load_state_dict({**analog.state_dict(), "unknown": torch.ones(1)})


def test_lightnings_state_in_floats_is_read_as_counts_and_single_precision():
    analog, _ = analog_layer(CONFIGS["DAC"])
    state = analog.state_dict()
    for count, expected in ((7.0, 7), (float("-inf"), 1 << 31), (float("nan"), 1 << 31)):
        state["input_range_update_idx"] = torch.tensor([count], dtype=torch.bfloat16)
        state["input_range"] = torch.tensor([2.5], dtype=torch.bfloat16)
        analog.load_state_dict(state)
        assert analog.input_range_update_idx.tolist() == [expected]
        assert analog.input_range.dtype == torch.float32 and analog.input_range == 2.5


# ----------------------------------------------------------------------------------------- meta


def on_meta():
    with torch.device("meta"):
        model = mlp()
    return analogfx.analogize(model, merged(EVERYTHING, TILES), inplace=True)


def assert_fresh(layer):
    ((_, _, site),) = sites(layer)
    assert layer.input_range.tolist() == [3.0] * len(site.in_sizes)
    assert not layer.input_range_update_idx.any()
    torch.testing.assert_close(layer.x_max, torch.full_like(layer.x_max, 1e-5))
    assert torch.equal(layer.learnable_weight_clip, row_maxima(site, layer.weight))


def test_a_meta_model_is_analogized_without_memory():
    assert all(t.is_meta for t in on_meta().state_dict().values())


def test_a_meta_model_takes_a_digital_checkpoint_by_assignment():
    analog, digital = on_meta(), mlp(seed=4)
    analog.load_state_dict(digital.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*analog.parameters(), *analog.buffers()))
    for name in ("first", "second"):
        assert torch.equal(getattr(analog, name).weight, getattr(digital, name).weight)
        assert_fresh(getattr(analog, name))
    same_outputs(analog, analogfx.analogize(digital, merged(EVERYTHING, TILES)), torch.randn(5, 8))


def test_a_meta_model_takes_a_checkpoint_after_to_empty():
    analog, digital = on_meta().to_empty(device="cpu"), mlp(seed=4)
    analog.load_state_dict(digital.state_dict())
    for name in ("first", "second"):
        assert_fresh(getattr(analog, name))


def test_a_meta_model_takes_an_analog_checkpoint_by_assignment():
    trained = analogfx.analogize(mlp(seed=4), merged(EVERYTHING, TILES))
    trained(torch.randn(5, 8))
    analog = on_meta()
    analog.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(analog.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert isinstance(analog.first.input_range, nn.Parameter)


# ------------------------------------------------------------------------------- specialisation


def branches(self, x, mask=None, twice=False):
    y = x @ self.w
    if mask is not None:
        y = y * mask
    return y + y if twice else y


@pytest.mark.parametrize("config", [IDENTITY, EVERYTHING], ids=["identity", "everything"])
def test_optional_arguments_may_be_none_tensors_or_flags(config):
    module = product(branches, w=(6, 4))
    analog = analogfx.analogize(module, config).eval()
    x, mask = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    plain = analog(x)
    assert torch.equal(analog(x, None), plain) and torch.equal(analog(x=x, mask=None), plain)
    assert torch.equal(analog(x, mask), plain * mask)
    assert torch.equal(analog(x, mask=mask, twice=True), 2 * (plain * mask))
    assert torch.equal(analog(x, twice=True), 2 * plain)
    if config is IDENTITY:
        assert torch.equal(plain, module(x))


def test_a_call_that_multiplies_by_other_parameters_is_refused():
    module = product(lambda self, x, two=False: x @ self.a @ self.b if two else x @ self.a,
                     a=(4, 4), b=(4, 4))  # fmt: skip
    analog = analogfx.analogize(module, EVERYTHING)
    x = torch.randn(2, 4, dtype=torch.float64)
    analog(x)
    with pytest.raises(CaptureError, match=r"\['a'\] or by \['a', 'b'\]"):
        analog(x, two=True)


def test_a_training_branch_is_run_in_training_alone():
    module = product(lambda self, x: x @ self.w + (1 if self.training else 0), w=(6, 4))
    analog = analogfx.analogize(module, IDENTITY)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(analog(x), x @ module.w + 1)
    assert torch.equal(analog.eval()(x), x @ module.w)


# ---------------------------------------------------------------------------------------- levels


def test_the_explicit_level_ends_with_its_context():
    analog, x = analog_layer(IDENTITY)
    called = []
    program = analog._analog.programs[True, ()]
    spied = {
        name: lambda *args, name=name: called.append(name) or getattr(program, name)(*args)
        for name in ("explicit", "fused")
    }
    analog._analog.programs[True, ()] = type(program)(**{**vars(program), **spied})
    analog(x)
    with explicit_level():
        analog(x)
        with explicit_level():
            analog(x)
        analog(x)
    with pytest.raises(ValueError, match="inside"), explicit_level():
        raise ValueError("inside")
    analog(x)
    assert called == ["fused", "explicit", "explicit", "explicit", "fused"]


def test_what_wraps_a_model_is_looked_through():
    model = nn.Linear(2, 2)
    wrapped = torch.compile(nn.DataParallel(torch.compile(model)))
    assert unwrapped(wrapped) is model and unwrapped(model) is model


def test_deepspeeds_books_on_a_module_build_nothing_anew():
    analog = analogfx.analogize(nn.Linear(4, 3), {"forward": {}})
    programs = dict(analog._analog.programs)
    analog.ds_grads_remaining = 3
    assert analog._analog.programs == programs
    analog.note = 3  # of any other attribute the forward may read
    assert analog._analog.programs != programs
