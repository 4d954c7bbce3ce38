"""AIHWKIT-Lightning's layers beside ours: one digital layer made into both, fed the same noise.

Lightning is the oracle and runs as it was installed, but for two functions, which are replaced
while one of its layers runs. ``randn_like`` hands out the noise that ours drew, in Lightning's
own order: for every tile the weight noise, then the output noise. And in float64 ``Tensor.float``
keeps float64, because Lightning rounds range statistics to float32 there and ours does not
(``test_departures`` shows it), which would hide the last 29 bits of everything else.
"""

import contextlib
import copy
import warnings
from dataclasses import dataclass, fields
from unittest import mock

import torch
from aihwkit_lightning import nn as lightning_nn
from aihwkit_lightning.nn.modules.torch_utils import torch_linear
from aihwkit_lightning.nn.modules.torch_utils.torch_abs_max import sliced_abs_max
from aihwkit_lightning.simulator.configs import (
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from hypothesis import strategies as st
from torch import Tensor, nn

import analogfx
from analogfx.kernels import noise
from analogfx.modules.program import explicit_level

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest difference, relative to the element and to the largest element of its tensor."""

TIE_ULPS = 8
"""How near to a rounding tie a value must be, in ulps of the largest value that is rounded along
with it, for two orders of summation to be free to round it differently."""


# ------------------------------------------------------------------------------------ layers


def lightning_layer(digital: nn.Module, config) -> nn.Module:
    """Lightning's layer with the weights of a digital one and a config of its own."""
    layer = getattr(lightning_nn, f"Analog{type(digital).__name__}")
    analog = layer.from_digital(digital, copy.deepcopy(config))
    if not isinstance(digital, nn.Linear):
        # Lightning's convolutions keep the clips of the random weights that they were born with.
        matrix = analog.weight.detach().flatten(1)
        maxima = sliced_abs_max(upper_end_of_slices=analog.upper_end_of_slices, weights=matrix)
        analog.init_learnable_weight_ranges(maxima, maxima.device, maxima.dtype)
    analog.weight.requires_grad = digital.weight.requires_grad
    return analog


def state(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached but not copied."""
    named = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: t.detach() for name, t in named}


def copied_state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state(layer).items()}


def load(layer: nn.Module, source: dict[str, Tensor]) -> None:
    """Give a layer the state of another, bit by bit; Lightning's Conv1d has a unit axis more."""
    for name, t in state(layer).items():
        t.copy_(source[name].view_as(t))


# ------------------------------------------------------------------------------------- noise


def draws_of(
    layer: nn.Module,
    seed: int,
    shape: torch.Size,
    dtype: torch.dtype,
    rows: slice = slice(None),
) -> list[Tensor]:
    """What ours draws after ``torch.manual_seed(seed)``, in the order in which Lightning draws.

    Args:
        layer: a Lightning layer; nothing is drawn unless it trains.
        shape: shape of one tile's output, outputs last.
        rows: the layer's outputs among those of our site.
    """
    if not layer.training:
        return []
    torch.manual_seed(seed)
    key = noise.draw_seed(torch.device("cpu"))
    matrix = noise.normal(key, 0, (shape[-1], sum(layer.in_sizes)), dtype)[rows]
    draws = []
    for tile, of_weights in enumerate(matrix.split(layer.in_sizes, dim=1)):
        if layer.rpu_config.modifier.noise_type is not WeightNoiseInjectionType.NONE:
            draws.append(of_weights)
        if layer.rpu_config.forward.out_noise > 0:
            draws.append(noise.normal(key, tile + 1, shape, dtype)[..., rows])
    return draws


@contextlib.contextmanager
def feeding(draws: list[Tensor], dtype: torch.dtype):
    """Let Lightning's layers run on given draws, every one of which they must use."""
    left = list(draws)

    def randn_like(like: Tensor) -> Tensor:
        draw = left.pop(0)
        assert draw.shape[-2:] == like.shape[-2:]
        return draw.to(like.dtype).view_as(like)  # a batch axis of 1 may be there or not

    to_float = torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch_linear, "randn_like", randn_like),
        mock.patch.object(torch.Tensor, "float", to_float),
    ):
        # Lightning asks for the standard deviation of a single element, too: NaN, not counted.
        warnings.filterwarnings("ignore", message="std.*degrees of freedom")
        yield
    assert not left, f"{len(left)} draws were not used"


# ------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """One forward, backward and optimizer step."""

    x: Tensor
    grad: Tensor
    training: bool
    seed: int


def run(layer: nn.Module, step: Step, learning_rate: float = 0.01) -> dict[str, Tensor | None]:
    """Take a step with plain SGD; return everything that it shows, by name."""
    layer.train(step.training)
    layer.zero_grad()
    x = step.x.detach().requires_grad_()
    y = layer(x)
    y.backward(step.grad)
    seen = {"output": y.detach(), "gradient of x": x.grad}
    seen |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    torch.optim.SGD(layer.parameters(), learning_rate).step()
    return seen | copied_state(layer)


def mismatch(actual: Tensor | None, expected: Tensor | None, terms: Tensor | None = None) -> str:
    """How two tensors differ by more than rounding, "" if they do not.

    Args:
        terms: of the size of what was summed, where a sum may leave little of it.
    """
    if actual is None or expected is None:
        return "" if actual is expected else f"{actual} instead of {expected}"
    if actual.numel() != expected.numel():
        return f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    tolerance = TOLERANCE[expected.dtype]
    sizes = [t.abs().max().item() for t in (expected, terms) if t is not None and t.numel()]
    scale = max(sizes, default=0.0)
    # Counters are integers here and floats there; Lightning's Conv1d has an axis more.
    actual = actual.view_as(expected).to(expected.dtype)
    try:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
    except AssertionError as error:
        return str(error)
    return ""


def assert_equal(actual: Tensor | None, expected: Tensor | None) -> None:
    """Assert that a tensor is that of Lightning, up to the rounding of its dtype."""
    text = mismatch(actual, expected)
    assert not text, text


@dataclass
class Tally:
    """What a parity test compared, for its own limits and for the summary of the test run."""

    configurations: int = 0
    steps: int = 0
    tied: int = 0
    """Steps that differ and in which Lightning itself rounds a tie."""
    tensors: int = 0
    exact: int = 0
    """Tensors that are equal bit by bit."""

    def __post_init__(self) -> None:
        TALLIES.append(self)


TALLIES: list[Tally] = []


def summary() -> str:
    """One line on all parity tests of this run, "" if there were none."""
    total = {f.name: sum(getattr(tally, f.name) for tally in TALLIES) for f in fields(Tally)}
    if not total["tensors"]:
        return ""
    total["share"] = total["exact"] / total["tensors"]
    return (
        "parity with Lightning: {configurations} configurations, {steps} steps, "
        "{tensors} tensors, {share:.1%} bit-exact, {tied} steps on a tie".format(**total)
    )


class Twins:
    """Lightning's layer and ours, made of one digital layer."""

    def __init__(self, digital: nn.Module, config, tally: Tally, explicit: bool = False) -> None:
        self.oracle = lightning_layer(digital, config)
        self.ours = analogfx.analogize(digital, config)
        self.spatial = digital.weight.dim() - 2
        self.dtype = digital.weight.dtype
        self.level = explicit_level if explicit else contextlib.nullcontext
        self.tally = tally
        tally.configurations += 1

    def step(self, step: Step) -> None:
        """Take one step on both sides from the same state; assert that they agree.

        The state is Lightning's, bit by bit: what is compared is every step by itself, and no
        difference in the last bit grows until it changes a decision three steps later.
        """
        before = copied_state(self.oracle)
        load(self.ours, before)
        x, grad = step.x.clone(), step.grad.clone()
        torch.manual_seed(step.seed)
        with self.level():
            actual = run(self.ours, step)
        assert torch.equal(step.x, x) and torch.equal(step.grad, grad), "inputs were written to"
        expected = self._lightning(self.oracle, step, actual["output"].shape)

        assert actual.keys() == expected.keys()
        y = expected["output"]
        assert (actual["output"].shape, actual["output"].dtype) == (y.shape, y.dtype)
        # The one gradient that is a sum, of either sign, over all inputs.
        terms = {"gradient of input_range": step.grad}
        texts = {name: mismatch(actual[name], t, terms.get(name)) for name, t in expected.items()}
        wrong = {name: text for name, text in texts.items() if text}
        if wrong and self.rounds_a_tie(before, step, y.shape):
            self.tally.tied += 1
            return
        assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
        self._count(actual, expected)

    def _lightning(self, layer: nn.Module, step: Step, y: torch.Size) -> dict[str, Tensor | None]:
        layer.train(step.training)
        if self.spatial:
            y = torch.empty(y, device="meta").flatten(-self.spatial).mT.shape  # by patch
        draws = draws_of(layer, step.seed, y, self.dtype)
        with feeding(draws, layer.weight.dtype):
            return run(layer, step)

    def rounds_a_tie(self, before: dict[str, Tensor], step: Step, y: torch.Size) -> bool:
        """Whether Lightning, in float64, rounds a value that float32 cannot tell from a tie."""
        if self.dtype == torch.float64:
            return False
        wide = copy.deepcopy(self.oracle).double()
        load(wide, {name: t.double() for name, t in before.items()})
        rounded = []
        original = torch.Tensor.round

        def record(t: Tensor) -> Tensor:
            rounded.append(t.detach())
            return original(t)

        wide_step = Step(step.x.double(), step.grad.double(), step.training, step.seed)
        with mock.patch.object(torch.Tensor, "round", record):
            self._lightning(wide, wide_step, y)
        return any(_near_tie(t) for t in rounded)

    def _count(self, actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
        self.tally.steps += 1
        for name, t in expected.items():
            if t is not None:
                self.tally.tensors += 1
                self.tally.exact += torch.equal(actual[name].view_as(t).to(t.dtype), t)

    def within_domain(self) -> bool:
        """Whether Lightning computes as documented with the state that it is in.

        It inverts scales above 1, asserts that clips are not negative, and means nothing by a
        negative range.
        """
        values = state(self.oracle)
        signed = [values[n] for n in ("input_range", "learnable_weight_clip") if n in values]
        return bool(values["weight"].abs().max() < 1) and all(t.ge(0).all() for t in signed)


def _near_tie(t: Tensor) -> bool:
    if t.numel() == 0:
        return False
    ulp = torch.finfo(torch.float32).eps * t.abs().max()
    return bool(((t - t.floor() - 0.5).abs() <= TIE_ULPS * ulp).any())


# ----------------------------------------------------------------------------------- drawing

RANGE_MODES = ("disabled", "static", "fast", "dynamic")

# An odd number of states puts the end of a range on a tie, so only even ones.
_half_states = st.integers(1, 127)
RESOLUTIONS = _half_states.map(lambda n: 2.0 * n) | _half_states.map(lambda n: 0.5 / n)
# With these the last code of an ADC is its bound whatever the bound's own rounding.
BINARY_RESOLUTIONS = st.integers(1, 8).flatmap(lambda n: st.sampled_from([2.0**n, 0.5**n]))
# Bounds in no simple ratio to the ranges: with few input and weight states, outputs would often be
# on a tie or on the bound itself, up to rounding.
_bounds = st.floats(0.05, 12.0).map(lambda bound: bound * 0.9182736455463728)
_strengths = st.floats(1e-3, 0.3)


def _off_or(strategy: st.SearchStrategy[float], off: float) -> st.SearchStrategy[float]:
    return st.just(off) | strategy


@st.composite
def configs(draw, mode: str, inputs: int, out_res: st.SearchStrategy[float] = RESOLUTIONS):
    """Lightning's config objects, as far as Lightning runs them.

    Args:
        mode: one of RANGE_MODES.
        inputs: length of the axis that tiles cut.
    """
    config = TorchInferenceRPUConfig()
    ranges, io = config.pre_post.input_range, config.forward
    if mode != "disabled":
        ranges.enable, ranges.fast_mode = True, mode == "fast"
        ranges.dynamic = mode == "dynamic"
        ranges.learn_input_range = draw(st.booleans())
        ranges.init_value = draw(st.floats(0.25, 4.0))
        ranges.init_from_data = draw(st.integers(0, 3))
        ranges.init_std_alpha = draw(st.floats(0.5, 18.0))
        ranges.act_range_momentum = draw(st.sampled_from([-1, 0.0, 0.5, 0.95, 1.0]))
        ranges.decay = draw(_off_or(_strengths, 0.0))
        ranges.input_min_percentage = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
        io.inp_res = draw(_off_or(RESOLUTIONS, -1.0))
        io.out_bound = draw(_off_or(_bounds, 0.0))
        io.out_noise = draw(_off_or(_strengths, 0.0))
        io.out_noise_per_channel = draw(st.booleans())
        if io.out_bound:
            io.out_res = draw(_off_or(out_res, -1.0))

    config.clip.type, config.clip.sigma = draw(st.sampled_from(list(WeightClipType))), 2.5
    quantizers = set(WeightQuantizationType)
    if config.clip.type is WeightClipType.LEARNABLE_PER_CHANNEL:
        quantizers.remove(WeightQuantizationType.DISCRETIZE)
    modifier = config.modifier
    modifier.quantization_type = draw(st.sampled_from(sorted(quantizers, key=str)))
    modifier.res = draw(RESOLUTIONS)
    modifier.noise_type = draw(st.sampled_from(list(WeightNoiseInjectionType)))
    modifier.std_dev = draw(_off_or(_strengths, 0.0))
    config.mapping.max_input_size = draw(st.just(-1) | st.integers(1, inputs))
    return config


def divides_zero(config) -> bool:
    """Whether a row of zero weights gives 0 / 0 in Lightning: no bound, but noise to round."""
    per_channel = (WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, WeightClipType.LEARNABLE_PER_CHANNEL)
    noisy = config.modifier.std_dev or config.forward.out_noise
    return bool(config.clip.type in per_channel and config.forward.out_res > 0 and noisy)


@st.composite
def values(draw, shape: tuple[int, ...], dtype: torch.dtype, edge: float = 0.0) -> Tensor:
    """Inputs of a layer: of any size, with zeros, and with elements of exactly +-edge."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator, dtype=dtype)
    kind = draw(st.sampled_from(["plain", "small", "large", "edges", "zero rows", "zeros"]))
    if kind == "edges":
        chosen = torch.rand(shape, generator=generator) < 0.3
        x = torch.where(chosen, x.sign() * edge, x)
    elif kind == "zero rows" and x.dim() > 1:
        x[..., ::2, :] = 0
    return x * {"small": 0.1, "large": 10.0, "zeros": 0.0}.get(kind, 1.0)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory."""
    if layout == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout == "every second":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


LAYOUTS = st.sampled_from(["contiguous", "transposed", "every second"])
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def steps(draw, shape, out_shape, dtype, config) -> list[Step]:
    """Three steps, of which any may be an evaluation that is differentiated."""
    ranges = config.pre_post.input_range
    drawn = []
    for _ in range(3):
        training = draw(st.integers(0, 3)) > 0
        x = draw(values(shape, dtype, ranges.init_value))
        grad = 0.2 * draw(values(out_shape, dtype, 1.0))
        drawn.append(
            Step(
                strided(x, draw(LAYOUTS)),
                strided(grad, draw(LAYOUTS)),
                training,
                draw(st.integers(0, 2**32 - 1)),
            )
        )
    return drawn


def randomize(digital: nn.Module, seed: int, dead_row: bool) -> nn.Module:
    """Weights between -0.5 and 0.5, so that training leaves them below 1; one row may be 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in digital.parameters():
            p.uniform_(-0.5, 0.5, generator=generator)
        if dead_row:
            digital.weight[0] = 0
    return digital
