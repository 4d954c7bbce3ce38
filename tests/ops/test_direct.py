import copy
import sys

import pytest
import torch
from samples import CONFIGS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import analogfx
from analogfx import recipes
from analogfx.kernels import small


class Watching(TorchDispatchMode):
    """Notes ops; whoever is watched calls the ops of a site one by one."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def frames(call):
    """Names of the Python functions that a call enters."""
    entered = []

    def profile(frame, event, _):
        if event == "call":
            entered.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]  # without the call's own


def closed(config, layer=None):
    """An analog layer whose ranges have been set."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8) if layer is None else layer
    analog = analogfx.analogize(layer, config)
    with torch.no_grad():
        analog(torch.randn(4, 16))
    for name, value in analog.state_dict().items():
        if "idx" in name:
            value.fill_(1 << 20)
    return analog


def step(analog, x, model=None):
    """What a training step gives and leaves behind."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = (model or analog)(x)
    y.sin().sum().backward()
    grads = [p.grad for p in analog.parameters()]
    return [y.detach(), x.grad, *grads, *analog.state_dict().values(), torch.get_rng_state()]


def equal(found, expected):
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def calls(monkeypatch):
    made, forward = [], small.forward
    monkeypatch.setattr(small, "forward", lambda *args: made.append(args) or forward(*args))
    return made


DIRECT = ("identity", "static range", "DAC", "DAC and ADC", "frozen range", "bound alone", "fast",
          "fast, ever seen", "weight noise", "weight noise by row", "gaussian clip",
          "gaussian clip by row")  # fmt: skip


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_direct_call_gives_what_the_ops_give(calls, name, shape):
    analog, x = closed(CONFIGS[name]), torch.randn(shape)
    twin = copy.deepcopy(analog)
    found = step(analog, x)
    assert bool(calls) == (name in DIRECT)
    calls.clear()
    with Watching() as watching:
        expected = step(twin, x)
    assert not calls and any("analog_linear" in op for op in watching.seen)
    assert equal(found, expected)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y = analog.eval()(x)
            with Watching():
                assert torch.equal(y, twin.eval()(x))
    # Outputs are noisy in training alone.
    assert bool(calls) == (name in DIRECT or name.startswith("output noise"))


def test_a_step_while_the_ranges_follow_the_data_is_that_of_the_ops(calls):
    config = CONFIGS["DAC and ADC"]  # three batches set the range
    analog = analogfx.analogize(nn.Linear(16, 8), config)
    twin = copy.deepcopy(analog)
    for number in range(5):
        x = torch.randn(3, 16)
        found = step(analog, x)
        assert len(calls) == max(0, number - 2)
        with Watching():
            assert equal(found, step(twin, x))


@pytest.mark.parametrize(("training", "most"), [(False, 24), (True, 40)], ids=["eval", "training"])
def test_a_small_layer_enters_few_python_functions(training, most):
    analog = closed(recipes.afm()).train(training)
    for shape in ((1, 16), (32, 16)):
        x = torch.randn(shape, requires_grad=training)
        with torch.set_grad_enabled(training):
            analog(x)
            entered = frames(lambda x=x: analog(x))
        assert len(entered) <= most, entered


def test_who_watches_casts_traces_or_transforms_is_shown_the_ops(calls):
    analog, x = closed(recipes.afm()).eval(), torch.randn(2, 16)
    y = analog(x)
    assert len(calls) == 1
    calls.clear()
    with torch.profiler.profile() as profile:
        assert torch.equal(analog(x), y)
    assert "analogfx::analog_linear" in {event.name for event in profile.events()}
    with torch.autocast("cpu"):
        assert analog(x).dtype == torch.bfloat16
    with torch.device("cpu"):  # a mode of torch functions
        assert torch.equal(analog(x), y)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        analog(x)
    assert counter.get_total_flops() == 2 * 2 * 16 * 8
    of_x = torch.func.vjp(analog, x)[1](torch.ones(2, 8))[0]
    grown = x.clone().requires_grad_()
    assert not calls
    analog(grown).sum().backward()
    assert torch.equal(of_x, grown.grad)
    tangents = torch.autograd.forward_ad
    with tangents.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        analog(tangents.make_dual(x, x))
    compiled = torch.compile(analog, backend="eager", fullgraph=True)
    calls.clear()
    assert torch.equal(compiled(x), y) and not calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_it_again(calls, reentrant):
    analog, x = closed(recipes.afm()), torch.randn(3, 16)
    twin = copy.deepcopy(analog)
    again = step(analog, x, lambda x: checkpoint(analog, x, use_reentrant=reentrant))
    assert len(calls) == 2
    assert equal(again, step(twin, x))


def test_a_gradient_takes_the_range_that_the_forward_used():
    analog, x = closed(recipes.afm()), torch.randn(3, 16)
    twin = copy.deepcopy(analog)
    expected = step(twin, x)
    torch.manual_seed(1)
    inputs = x.clone().requires_grad_()
    y = analog(inputs)
    with torch.no_grad():
        analog.input_range.mul_(3.0)
    y.sin().sum().backward()
    assert equal([inputs.grad, analog.input_range.grad], [expected[1], twin.input_range.grad])


def test_there_is_no_second_derivative():
    analog, x = closed(recipes.afm()), torch.randn(3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(analog(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_errors_are_those_of_the_ops():
    analog = closed(recipes.afm()).eval()
    x = torch.randn(2, 16)
    for wrong, error in ((x[:, 1:], RuntimeError), (x.double(), RuntimeError),
                         (x.to_sparse(), TypeError), (3.0, TypeError)):  # fmt: skip
        with pytest.raises(error, match=r"expected|the input is"):
            analog(wrong)


def test_negative_and_absurd_ranges_act_as_in_the_ops():
    analog, x = closed(recipes.afm()).eval(), torch.randn(2, 16)
    for value in (-2.0, 0.0, 1e-40, 1e38, float("nan")):
        with torch.no_grad():
            analog.input_range.fill_(value)
            y = analog(x)
            with Watching():
                torch.testing.assert_close(y, analog(x), rtol=0, atol=0, equal_nan=True)
