import collections
import contextlib
import functools

import pytest
import torch
from samples import ALL_LAYERS, CONFIGS, EVERYTHING, IDENTITY, TILES, layer_and_input, merged
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import analogfx
from analogfx import ops
from analogfx.modules.program import explicit_level

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(
    name.removeprefix("analogfx::").removesuffix(".default")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("analogfx::")
)
RANDOM = {"draw_seed"}
ONCE_DIFFERENTIABLE = {
    "analog_linear_backward", "analog_conv_backward", "analog_experts_backward",
    "analog_recurrence_backward",
    "held_linear", "held_conv", "held_experts", "expert_mvm_backward", "expert_dac_backward",
}  # fmt: skip


def is_ours(function):
    return getattr(function, "namespace", None) == "analogfx"


class CallsOf(TorchFunctionMode):
    """Records the calls of our ops, arguments with their need of gradients."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if is_ours(function):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


class CallsBelow(TorchDispatchMode):
    """Records the calls of our ops below autograd, those of a backward included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if is_ours(function):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


OWN = {"mapping": {"experts": "own"}}

# Every op is checked on the arguments that it gets when these sites train.
SITES = {
    "linear": ("linear", EVERYTHING),
    "linear, tiles": ("linear", merged(EVERYTHING, TILES)),
    "linear of 1-D": ("linear of 1-D", EVERYTHING),
    "linear, nothing on": ("linear", IDENTITY),
    "linear, fast": ("linear", CONFIGS["fast"]),
    "linear, dynamic": ("linear of 3-D", merged(CONFIGS["everything, dynamic"], TILES)),
    "linear, by row": ("linear", merged(CONFIGS["output noise by row"], CONFIGS["discrete rows"])),
    "conv": ("conv2d", EVERYTHING),
    "conv, tiles": ("conv1d", merged(EVERYTHING, TILES)),
    "conv, fast": ("conv2d", CONFIGS["fast"]),
    "conv, groups": ("grouped", EVERYTHING),
    "conv3d": ("conv3d", CONFIGS["weight noise"]),
    "experts": ("experts", EVERYTHING),
    "experts, tiles and own ranges": ("experts", merged(EVERYTHING, TILES, OWN)),
    "experts, fast and own ranges": ("experts", merged(CONFIGS["fast"], OWN)),
    "experts, dynamic": ("experts", CONFIGS["everything, dynamic"]),
    "experts, nothing on": ("experts", IDENTITY),
}


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": channels_last,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
}  # fmt: skip


def calls(site, explicit, layout=LAYOUTS["as it is"], dtype=torch.float32):
    """One training step of a site: what its ops were called with."""
    layer, config = SITES[site]
    module, x = layer_and_input(layer, dtype)
    analog = analogfx.analogize(module, config)
    x = layout(x).detach().requires_grad_()
    with CallsOf() as above, explicit_level() if explicit else contextlib.nullcontext():
        y = analog(x)
    with CallsBelow() as below:
        y.sum().backward()
    return above.calls + below.calls


def calls_on_chip(layer):
    """A site on a chip: what its op is called with."""
    module, x = layer_and_input(layer, torch.float32)
    analog = analogfx.analogize(module, EVERYTHING).eval()
    chip = analogfx.program(
        analog, analogfx.chip.PCMLikeNoiseModel(), analogfx.chip.GlobalDriftCompensation()
    )
    with chip.at(60.0), CallsOf() as above:
        analog(x)
    return above.calls


def calls_of_a_digital_layer():
    """What the product of experts that a config leaves digital is called with."""
    x, offsets = torch.randn(5, 4, requires_grad=True), torch.tensor([2, 2, 4])
    weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 6, 4), (3, 6)))
    with CallsOf() as above:
        for b in (bias, None):
            ops.experts.grouped_linear(x, weight, b, offsets)
    return above.calls


def calls_of_a_recurrence(layer, config):
    """One training step of a layer whose ranges hold: what its ops are called with."""
    analog = analogfx.analogize(layer, config)
    for name, count in analog.named_buffers():
        if "update_idx" in name:
            count.fill_(10_000)
    with CallsOf() as above:
        y, _ = analog(torch.randn(3, 1, 16, requires_grad=True))
    with CallsBelow() as below:
        y.sum().backward()
    return [call for call in above.calls + below.calls if "recurrence" in call[0]._opname]


def calls_when_prepared(site):
    """A training site that leaves its ranges to the step: what its ops are called with."""
    layer, config = SITES[site]
    module, x = layer_and_input(layer, torch.float32)
    analog = analogfx.analogize(module, config)
    analogfx.prepare_training(torch.optim.SGD(analog.parameters(), lr=0.1), analog)
    with CallsOf() as above:
        analog(x)
    return above.calls


def check(function, args, compiled=True):
    """torch's own checks of an op; ``compiled``, the slow one, runs it through AOT autograd."""
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if compiled and function._opname not in RANDOM:
        checks.append("test_aot_dispatch_dynamic")
    differentiable = function._opname not in ONCE_DIFFERENTIABLE
    args = tuple(
        a.detach().requires_grad_(a.requires_grad and differentiable)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )
    torch.library.opcheck(function, args, test_utils=tuple(checks))


def signature(args):
    """What tells one call from another: kinds of tensors, and scalars."""
    return tuple(
        (a.dtype, a.dim(), a.requires_grad) if isinstance(a, torch.Tensor) else repr(a)
        for a in args
    )


@functools.cache
def recorded():
    """Every op's calls by all sites, those that look alike once."""
    found = collections.defaultdict(dict)
    for site in SITES:
        for explicit in (True, False):
            for function, args in calls(site, explicit):
                found[function._opname].setdefault(signature(args), (function, args))
    for function, args in calls_of_a_digital_layer():
        found[function._opname].setdefault(signature(args), (function, args))
    for site in (s for s, (layer, _) in SITES.items() if layer != "experts"):
        for function, args in calls_when_prepared(site):
            if function._opname == "collect_range":
                found[function._opname].setdefault(signature(args), (function, args))
    for layer in (nn.LSTM(16, 16, proj_size=12), nn.GRU(16, 16, bias=False), nn.RNN(16, 16)):
        for function, args in calls_of_a_recurrence(layer, EVERYTHING):
            found[function._opname].setdefault(signature(args), (function, args))
    for layer in ("linear", "linear of 3-D", "conv2d", "grouped", "experts"):
        for function, args in calls_on_chip(layer):
            found[function._opname].setdefault(signature(args), (function, args))
    return {name: list(by_signature.values()) for name, by_signature in found.items()}


def test_the_sites_call_every_op():
    assert sorted(recorded()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for number, (function, args) in enumerate(recorded()[name]):
        check(function, args, compiled=number < 3)


@pytest.mark.parametrize("layout", ["transposed", "channels last", "every second"])
@pytest.mark.parametrize("site", ["linear", "conv", "conv, groups"])
def test_opcheck_of_inputs_with_strides(site, layout):
    for function, args in calls(site, explicit=False, layout=LAYOUTS[layout]):
        check(function, args, compiled=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("site", ["linear", "conv"])
def test_opcheck_of_other_dtypes(site, dtype):
    for function, args in calls(site, explicit=False, dtype=dtype):
        check(function, args, compiled=False)


# --------------------------------------------------------------------------- promises of all ops


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])
@pytest.mark.parametrize("site", SITES)
def test_no_op_writes_to_its_inputs(site, explicit):
    for function, args in calls(site, explicit):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        before = [(t.detach().clone(), t._version) for t in tensors]
        with torch.no_grad():
            function(*args)
        for t, (value, version) in zip(tensors, before, strict=True):
            assert torch.equal(t, value) and t._version == version, function


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_a_first_derivative_can_be_kept_and_a_second_is_refused(layer):
    module, x = layer_and_input(layer)
    analog = analogfx.analogize(module, EVERYTHING)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(analog(x).square().sum(), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


WRONG = {
    # name: (layer, input, error, what the message says)
    "another dtype": ("linear", torch.ones(2, 12, dtype=torch.float64), RuntimeError,
                      "input is torch.float64, the weight torch.float32: cast one .*autocast"),
    "another width": ("linear", torch.ones(2, 5), RuntimeError, r"\(\.\.\., 12\), found \(2, 5\)"),
    "no axis": ("linear", torch.ones(()), RuntimeError, r"\(\.\.\., 12\), found \(\)"),
    "integers": ("linear", torch.ones(2, 12, dtype=torch.int64), TypeError, "a torch.int64 tensor"),
    "no tensor": ("linear", [1.0] * 12, TypeError, "found list"),
    "other channels": ("conv2d", torch.ones(1, 3, 4, 4), RuntimeError, r"found \(1, 3, 4, 4\)"),
    "other axes": ("conv2d", torch.ones(1, 1, 2, 4, 4), RuntimeError, r"\(batch, 2, size, size\)"),
}  # fmt: skip


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])
@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_a_site_cannot_multiply_are_refused_before_its_ranges_follow_them(
    name, explicit
):
    layer, x, error, message = WRONG[name]
    module, _ = layer_and_input(layer, torch.float32)
    analog = analogfx.analogize(nn.Sequential(module), EVERYTHING)
    level = explicit_level() if explicit else contextlib.nullcontext()
    with level, pytest.raises(error, match=f"^0: .*{message}"):
        analog(x)
    assert analog[0].input_range == 3.0 and analog[0].input_range_update_idx == 0


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])
@pytest.mark.parametrize("of_input", [torch.float32, torch.float64, "autocast's"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "linear of 1-D", "conv2d", "conv1d"])
def test_autocast_gives_the_dtype_that_the_layer_gives(layer, autocast, of_input, explicit):
    of_input = autocast if of_input == "autocast's" else of_input
    of_layer = torch.float64 if of_input == torch.float64 else torch.float32
    digital, x = layer_and_input(layer, of_layer)
    x = x.to(of_input).requires_grad_()
    analog = analogfx.analogize(digital, EVERYTHING)

    def forward(module):
        with torch.autocast("cpu", autocast):
            return module(x)

    with explicit_level() if explicit else contextlib.nullcontext():
        y = forward(analog)
    assert y.dtype == forward(digital).dtype
    y.sum().backward()
    assert x.grad.dtype == of_input
    assert all(p.grad.dtype == p.dtype == of_layer for p in analog.parameters())


def test_autocast_does_not_reach_into_a_site():
    digital, x = layer_and_input("linear", torch.float32)
    analog = analogfx.analogize(digital, EVERYTHING)
    with CallsBelow() as below, torch.autocast("cpu", torch.bfloat16):
        analog(x)
    (args,) = (args for function, args in below.calls if function._opname == "analog_linear")
    x, weight, bias, input_range, clip = args[:5]
    assert {x.dtype, weight.dtype, bias.dtype} == {torch.bfloat16}
    assert input_range.dtype == clip.dtype == torch.float32


def test_autocast_helper():
    x = torch.zeros(1)
    assert ops.autocast(None) is None and ops.autocast(x) is x
    with torch.autocast("cpu", torch.float16):
        assert ops.autocast(x).dtype == torch.float16
        assert ops.autocast(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.float16, enabled=False):
        assert ops.autocast(x) is x


# ------------------------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(run, analog, x):
    torch.manual_seed(3)
    analog.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in analog.named_parameters()}


@pytest.mark.parametrize(
    ("layer", "config", "explicit"),
    [
        ("linear", EVERYTHING, False),
        ("linear", merged(EVERYTHING, TILES), True),
        ("linear of 3-D", merged(CONFIGS["everything, dynamic"], TILES), False),
        ("linear", CONFIGS["fast"], False),
        ("conv2d", EVERYTHING, False),
        ("grouped", merged(EVERYTHING, TILES), False),
    ],
)
def test_a_site_compiles_to_one_graph_that_computes_the_same(fresh_dynamo, layer, config, explicit):
    module, x = layer_and_input(layer)
    analog = analogfx.analogize(module, config)
    twin = analogfx.analogize(module, config)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with explicit_level() if explicit else contextlib.nullcontext():
        for _ in range(2):  # the second step reads what the first one stored
            eager, with_compile = step(analog, analog, x), step(compiled, twin, x)
            torch.testing.assert_close(with_compile, eager, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.state_dict(), analog.state_dict(), rtol=1e-12, atol=1e-12)
    analog.eval(), twin.eval()
    torch.testing.assert_close(compiled(x), analog(x), rtol=1e-12, atol=1e-12)


def test_draws_that_look_alike_stay_apart_when_compiled(fresh_dynamo):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x), self.b(x)

    analog = analogfx.analogize(Twice(), CONFIGS["weight noise"])
    first, second = torch.compile(analog, fullgraph=True, backend="aot_eager")(torch.randn(3, 6))
    assert (first - second).abs().max() > 1e-3
