"""One layer, digital and analog: what its forward and a whole training step cost.

The arms, the states in which they are timed, and the goals on each kind of device.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import roofline
import torch
from bench_devices import Call, Cpu, Cuda, Device, Row, Sample
from bench_rows import (
    DIGITAL,
    EXPERTS,
    RECURRENT,
    AnyShape,
    Contender,
    Goal,
    Routed,
    Sequences,
    failed_row,
    make_row,
    timed_rows,
)
from roofline import Shape
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

import analogfx
from analogfx import WeightNoiseInjectionType, WeightQuantizationType

LEARNING_RATE = 1e-4
SATURATING_RANGE = 2.0
"""Cuts 4.6 % of standard normal inputs: about where the recipe's decay leaves a learned range."""

# --------------------------------------------------------------------------------------- arms


class Subject(NamedTuple):
    """One contender: a module, and the optimizer whose step does all that its tool does."""

    module: nn.Module
    optimizer: Optimizer


def digital_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The digital layer as it is."""
    return Subject(layer, SGD(layer.parameters(), lr=LEARNING_RATE))


def analogfx_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The layer made analog by analogfx, clipped after every step."""
    analog = analogfx.analogize(layer, config)
    optimizer = SGD(analog.parameters(), lr=LEARNING_RATE)
    analogfx.clip_after_step(optimizer, analog)
    return Subject(analog, optimizer)


def lightning_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The layer made analog by AIHWKIT-Lightning, under its own optimizer, which clips."""
    # Imported here: a machine without it can measure the other arms.
    from aihwkit_lightning.nn.conversion import convert_to_analog
    from aihwkit_lightning.optim import AnalogOptimizer

    analog = convert_to_analog(layer, lightning_config(config))
    optimizer = AnalogOptimizer(SGD, analog.analog_layers, analog.parameters(), lr=LEARNING_RATE)
    return Subject(analog, optimizer)


def triton_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The same in AIHWKIT-Lightning's Triton mode, which an environment variable turns on."""
    from aihwkit_lightning.nn.modules.linear import TRITON_AVAIL

    if not TRITON_AVAIL:  # Lightning would run its torch mode
        raise RuntimeError("AIHWKIT-Lightning finds no GPU for its Triton mode")
    subject = lightning_arm(layer, config)

    def on(*_: Any) -> None:
        os.environ["AIHWKIT_USE_TRITON"] = "1"

    def off(*_: Any) -> None:
        os.environ.pop("AIHWKIT_USE_TRITON", None)

    subject.module.register_forward_pre_hook(on)
    subject.module.register_forward_hook(off, always_call=True)
    return subject


def lightning_config(config: analogfx.TorchInferenceRPUConfig) -> Any:
    """Lightning's config object with the values of ours."""
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig as LightningConfig

    target = LightningConfig()
    _copy_fields(config, target)
    return target


def _copy_fields(source: object, target: object) -> None:
    for name, old in vars(target).items():
        value = getattr(source, name)
        if isinstance(old, Enum):
            setattr(target, name, type(old)[value.name])
        elif hasattr(old, "__dict__"):
            _copy_fields(value, old)
        else:
            setattr(target, name, value)


LIGHTNING, TRITON = "lightning", "lightning, Triton"
ARMS = {
    DIGITAL: digital_arm,
    RECURRENT: digital_arm,
    EXPERTS: digital_arm,
    "analogfx": analogfx_arm,
    LIGHTNING: lightning_arm,
    TRITON: triton_arm,
}
PEERS = (LIGHTNING, TRITON)
"""Arms that may fail: then the others are measured, and the reason is recorded."""

# ------------------------------------------------------------------------------ what is timed


class Data(NamedTuple):
    """An input inside a network, so that its gradient is wanted, and the gradient that comes."""

    x: Tensor
    grad: Tensor


def make_data(shape: AnyShape, device: Device) -> Data:
    """Standard normal input and output gradient."""
    options: Any = {"device": device.place, "dtype": device.dtype}
    rows = (shape.steps, shape.rows) if isinstance(shape, Sequences) else (shape.rows,)
    x = torch.randn(*rows, shape.inputs, requires_grad=True, **options)
    outputs = shape.inputs if isinstance(shape, Routed) else shape.outputs
    return Data(x, torch.randn(*rows, outputs, **options))


@torch.no_grad()
def forward(subject: Subject, data: Data) -> None:
    """Inference."""
    subject.module(data.x)


def step(subject: Subject, data: Data) -> None:
    """Forward, backward to weights, ranges and input, and the tool's whole optimizer step."""
    subject.optimizer.zero_grad()
    data.x.grad = None
    subject.module(data.x).backward(data.grad)
    subject.optimizer.step()


class Mode(NamedTuple):
    """A call to time, and the state of the layer in which it is timed."""

    call: Callable[[Subject, Data], None]
    training: bool = True
    closed: bool = True
    """Whether the input ranges have been set from data, the state of almost all of training."""
    input_range: float | None = None
    """Value of the ranges, None for the one that data gave."""
    weight_states: int = 0
    """States of the weights, 0 for weights and their noise as in the recipe."""
    noise: bool = True
    """Whether the weights are noisy in training."""


MODES = {
    "forward": Mode(forward, training=False),
    "8-bit forward": Mode(forward, training=False, weight_states=254),
    "step": Mode(step),
    "noiseless step": Mode(step, noise=False),
    "saturated step": Mode(step, input_range=SATURATING_RANGE),
    "initialisation step": Mode(step, closed=False),
}


def afm(shape: AnyShape, tiles: int, weight_states: int = 0) -> analogfx.TorchInferenceRPUConfig:
    """The recipe of the Analog Foundation Models, on a number of tiles."""
    config = analogfx.recipes.afm()
    if tiles > 1:
        config.mapping.max_input_size = -(-shape.inputs // tiles)
    if weight_states:
        config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
        config.modifier.res = weight_states
    return config


class Outputs(nn.Module):
    """An LSTM that returns its outputs alone."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.layer = nn.LSTM(inputs, outputs, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(T, N, inputs) to (T, N, outputs)."""
        y: Tensor = self.layer(x)[0]
        return y


class Block(nn.Module):
    """A router and experts, as Mixtral has them, on rows."""

    def __init__(self, inputs: int, outputs: int, experts: int) -> None:
        super().__init__()
        # Imported here: the other suites do without it.
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=inputs, intermediate_size=outputs, num_local_experts=experts
        )
        config._experts_implementation = "grouped_mm"
        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, inputs)."""
        y: Tensor = self.block(x.unsqueeze(0)).squeeze(0)
        return y


def make_layer(shape: AnyShape, device: Device) -> nn.Module:
    """The digital layer that a shape is of."""
    layer: nn.Module
    if isinstance(shape, Sequences):
        layer = Outputs(shape.inputs, shape.outputs)
    elif isinstance(shape, Routed):
        layer = Block(shape.inputs, shape.outputs, shape.experts)
    else:
        layer = nn.Linear(shape.inputs, shape.outputs)
    return layer.to(device.place, device.dtype)


def make_subject(
    contender: Contender, shape: AnyShape, data: Data, mode: Mode, device: Device
) -> Subject:
    """A contender in the state that a mode asks for; all of them hold the same weights."""
    torch.manual_seed(0)
    config = afm(shape, contender.tiles, mode.weight_states)
    if not mode.noise:
        config.modifier.noise_type = WeightNoiseInjectionType.NONE
    subject = ARMS[contender.arm](make_layer(shape, device), config)
    subject.module(data.x)  # in training: the ranges see data
    if mode.closed:
        close_ranges(subject.module, config.pre_post.input_range.init_from_data, mode.input_range)
    subject.module.train(mode.training)
    return subject


@torch.no_grad()
def close_ranges(module: nn.Module, count: int, value: float | None) -> None:
    """End the initialisation of input ranges; both tools keep them under the same names."""
    for name, tensor in module.state_dict().items():  # tensors that share the module's storage
        if "input_range_update_idx" in name:
            tensor.fill_(count)
        elif "input_range" in name and value is not None:
            tensor.fill_(value)


# ------------------------------------------------------------------------------------- suites

LINEAR = Contender(DIGITAL, 0)
ONE, EIGHT = Contender("analogfx", 1), Contender("analogfx", 8)
PEER_ONE, PEER_EIGHT = Contender(LIGHTNING, 1), Contender(LIGHTNING, 8)
TRITON_ONE, TRITON_EIGHT = Contender(TRITON, 1), Contender(TRITON, 8)

CPU_GOALS = (
    Goal("forward", ONE, LINEAR, 1.15),
    Goal("forward", EIGHT, LINEAR, 1.15),
    Goal("step", ONE, LINEAR, 1.4),
    Goal("step", EIGHT, ONE, 1.3),
    Goal("step", ONE, PEER_ONE, 0.7),
    Goal("step", EIGHT, PEER_EIGHT, 0.7),
)
SMALL_GOALS = (Goal("forward", ONE, PEER_ONE, 0.75), Goal("step", ONE, PEER_ONE, 0.75))
LSTM = Contender(RECURRENT, 0)
RECURRENT_GOALS = (
    Goal("forward", ONE, PEER_ONE, 0.333),
    Goal("step", ONE, PEER_ONE, 0.333),
    Goal("noiseless step", ONE, PEER_ONE, 0.333),
)
MIXTURE = Contender(EXPERTS, 0)
EXPERT_GOALS = (Goal("forward", ONE, MIXTURE, 1.15), Goal("step", ONE, MIXTURE, 1.4))
GPU_GOALS = (
    Goal("step", ONE, LINEAR, 1.1),
    Goal("step", EIGHT, LINEAR, 1.25),
    Goal("step", EIGHT, ONE, 1.15),
    Goal("step", ONE, PEER_ONE, 0.4),
    Goal("step", ONE, TRITON_ONE, 0.4),
    Goal("step", EIGHT, PEER_EIGHT, 0.2),
    Goal("step", EIGHT, TRITON_EIGHT, 0.2),
    Goal("8-bit forward", ONE, LINEAR, 0.8),
    Goal("8-bit forward", EIGHT, LINEAR, 0.8),
    *(Goal("saved beyond nn.Linear", own, None, 2) for own in (ONE, EIGHT)),
    *(Goal("host syncs", own, None, 0) for own in (ONE, EIGHT)),
)


@dataclass(frozen=True)
class Suite:
    """What is raced on one kind of device."""

    shapes: tuple[AnyShape, ...]
    contenders: tuple[Contender, ...] = (LINEAR, ONE, EIGHT, PEER_ONE, PEER_EIGHT)
    modes: tuple[str, ...] = ("forward", "step", "saturated step", "initialisation step")
    repeats: int = 30
    warmup: int = 3
    goals: tuple[Goal, ...] = CPU_GOALS


SUITES = {
    "cpu": Suite(shapes=(Shape(512, 1024, 1024), Shape(512, 2048, 2048), Shape(64, 4096, 4096))),
    "cpu-small": Suite(
        shapes=(Shape(1, 16, 16), Shape(32, 64, 64)),
        contenders=(LINEAR, ONE, PEER_ONE),
        modes=("forward", "step"),
        repeats=500,
        warmup=50,
        goals=SMALL_GOALS,
    ),
    "cpu-recurrent": Suite(
        shapes=(Sequences(32, 256, 256, 64), Sequences(16, 512, 512, 128)),
        contenders=(LSTM, ONE, PEER_ONE),
        modes=("forward", "step", "noiseless step"),
        repeats=7,
        warmup=1,
        goals=RECURRENT_GOALS,
    ),
    "cpu-experts": Suite(
        shapes=(Routed(1, 512, 1024, 8), Routed(256, 512, 1024, 8), Routed(512, 1024, 1024, 4)),
        contenders=(MIXTURE, ONE),
        modes=("forward", "step"),
        repeats=15,
        goals=EXPERT_GOALS,
    ),
    "cuda": Suite(
        shapes=roofline.SHAPES,
        contenders=(LINEAR, ONE, EIGHT, PEER_ONE, PEER_EIGHT, TRITON_ONE, TRITON_EIGHT),
        modes=tuple(what for what in MODES if what != "noiseless step"),
        goals=GPU_GOALS,
    ),
}

# ------------------------------------------------------------------------------- measurements


def race(
    title: str, calls: Sequence[Call], repeats: int, warmup: int, device: Device
) -> list[list[Sample]]:
    """Samples of every call, all of them once a round, in an order drawn for each round."""
    samples: list[list[Sample]] = [[] for _ in calls]
    order = random.Random(0)
    for _ in tqdm(range(warmup + repeats), desc=title, leave=False):
        for index in order.sample(range(len(calls)), len(calls)):
            before = samples[index][-1] if samples[index] else None
            samples[index].append(device.measure(calls[index], before))
    return [of_one[warmup:] for of_one in samples]


def saved_bytes(subject: Subject, data: Data) -> int:
    """Bytes that a forward keeps for its backward, without the parameters and the input.

    Every storage counts once, however many tensors show it.
    """
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.module(data.x)
    for known in (data.x, *subject.module.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def aten_ops(subject: Subject, data: Data) -> int:
    """ATen ops that a training forward calls, without those that ATen itself calls for them.

    The profiler sees inside analogfx's own ops, which a dispatch mode does not. It follows one
    thread, so there is only one meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            subject.module(data.x)
    finally:
        torch.set_num_threads(threads)
    events = profile.function_events
    return sum(_is_aten(event) and not _is_aten(event.cpu_parent) for event in events)


def _is_aten(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def make_subjects(
    shape: AnyShape, suite: Suite, data: Data, mode: Mode, device: Device
) -> tuple[dict[Contender, Subject], dict[Contender, str]]:
    """Every contender that runs, after a first call, and why the others do not."""
    subjects, failed = {}, {}
    for contender in suite.contenders:
        try:
            subject = make_subject(contender, shape, data, mode, device)
            mode.call(subject, data)
            device.synchronize()
        except Exception as error:
            if contender.arm not in PEERS:
                raise
            device.synchronize()  # what failed may have broken the device for all others
            reason = (str(error).strip().splitlines() or [""])[-1]
            failed[contender] = f"{type(error).__name__}: {reason}"
        else:
            subjects[contender] = subject
    return subjects, failed


def measure(shape: AnyShape, suite: Suite, device: Device) -> Iterator[Row]:
    """The rows of one shape."""
    for what in suite.modes:
        mode = MODES[what]
        torch.manual_seed(0)
        data = make_data(shape, device)
        subjects, failed = make_subjects(shape, suite, data, mode, device)
        calls = [partial(mode.call, subject, data) for subject in subjects.values()]
        samples = race(f"{what}, {shape}", calls, suite.repeats, suite.warmup, device)
        times = [[sample.ms for sample in of_one] for of_one in samples]
        yield from timed_rows(what, shape, subjects, times)
        for contender, reason in failed.items():
            yield failed_row(what, shape, contender, "ms", reason)
        if isinstance(device, Cuda) and what == "step":
            times = [[sample.host_ms for sample in of_one] for of_one in samples]
            yield from timed_rows("step, host", shape, subjects, times)
        if what == "step":
            for contender, subject in subjects.items():
                yield from counted_rows(shape, contender, subject, data, device)


def counted_rows(
    shape: AnyShape, contender: Contender, subject: Subject, data: Data, device: Device
) -> Iterator[Row]:
    """Rows of what training costs besides time; exact, and so counted once."""
    saved = saved_bytes(subject, data)
    yield make_row("saved for backward", shape, contender, "bytes", [saved])
    if isinstance(device, Cpu):
        yield make_row("training forward", shape, contender, "ATen ops", [aten_ops(subject, data)])
        return
    digital = (shape.rows + shape.outputs) * shape.inputs * data.x.element_size()
    share = 100 * saved / digital
    yield make_row("saved beyond nn.Linear", shape, contender, "%", [share])
    subject.optimizer.zero_grad()
    data.x.grad = None
    call = partial(step, subject, data)
    yield make_row("peak memory of a step", shape, contender, "MB", [device.peak_bytes(call) / 1e6])
    yield make_row("host syncs", shape, contender, "syncs", [device.host_syncs(call)])
