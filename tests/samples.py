"""Configs, layers and small modules that several tests run over."""

import contextlib
import copy
from collections import Counter

import torch
from torch import nn

import analogfx
from analogfx.config import resolve
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.capture import bind, capture, default_pattern
from analogfx.modules.program import explicit_level
from analogfx.passes import pipeline
from analogfx.passes.contract import Context

IDENTITY = {"forward": {}}
COARSE = {"pre_post": {"input_range": {"enable": True}}, "forward": {"inp_res": 6}}
"""3-bit inputs: what passes through an analog layer is visibly not digital."""


def merged(*configs):
    """One config as nested dicts, later fields over earlier ones."""
    out = {}
    for config in configs:
        for name, value in copy.deepcopy(config).items():
            old = out.get(name)
            out[name] = merged(old, value) if isinstance(old, dict) else value
    return out


def ranged(**fields):
    """A config with an input range."""
    return {"pre_post": {"input_range": {"enable": True, "init_from_data": 3, **fields}}}


def modifier(**fields):
    return {"modifier": fields}


def clip(kind, **fields):
    return {"clip": {"type": kind, **fields}}


# An odd output resolution: no output rounds to its bound, whose gradient hangs on the last bit.
_IO = {"forward": {"inp_res": 30, "out_res": 61, "out_bound": 1.5}}
_NOISE = modifier(noise_type="AddNormal", std_dev=0.1)
_OUT_NOISE = {"forward": {"out_noise": 0.05}}
_DISCRETE_ROWS = modifier(quantization_type="DiscretizePerChannel", res=14)

TILES = {"mapping": {"max_input_size": 5, "max_output_size": 3}}

CONFIGS = {
    "identity": IDENTITY,
    "static range": ranged(),
    "DAC": merged(ranged(), {"forward": {"inp_res": 30}}),
    "DAC and ADC": merged(ranged(init_std_alpha=1.5), _IO),
    "frozen range": merged(ranged(learn_input_range=False), _IO),
    "bound alone": merged(ranged(), {"forward": {"out_bound": 1.0}}),
    "fast": merged(ranged(fast_mode=True, act_range_momentum=0.7), _IO),
    "fast, ever seen": merged(ranged(fast_mode=True, act_range_momentum=-1), _IO),
    "dynamic": merged(ranged(dynamic=True), _IO),
    "dynamic, no DAC": merged(ranged(dynamic=True), {"forward": {"out_bound": 1.0}}),
    "weight noise": _NOISE,
    "weight noise by row": modifier(noise_type="AddNormalPerChannel", std_dev=0.1),
    "output noise": merged(ranged(), _OUT_NOISE),
    "output noise by row": merged(
        ranged(), _OUT_NOISE, {"forward": {"out_noise_per_channel": True}}
    ),
    "discrete": modifier(quantization_type="Discretize", res=14),
    "discrete rows": _DISCRETE_ROWS,
    "gaussian clip": merged(ranged(), _IO, clip("LayerGaussian", sigma=2.0)),
    "gaussian clip by row": merged(ranged(), _IO, clip("LayerGaussianPerChannel", sigma=2.0)),
    "learned clip": merged(ranged(), _IO, clip("LearnablePerChannel")),
    "learned clip, discrete": merged(_DISCRETE_ROWS, clip("LearnablePerChannel")),
    "everything": merged(
        ranged(init_std_alpha=1.5), _IO, _OUT_NOISE, _NOISE, _DISCRETE_ROWS,
        clip("LearnablePerChannel"),
    ),
    "everything, dynamic": merged(
        ranged(dynamic=True), _IO, _OUT_NOISE, _NOISE,
        modifier(quantization_type="Discretize", res=14)
    ),
}  # fmt: skip
EVERYTHING = CONFIGS["everything"]


class Routed(nn.Module):
    """Rows that pick one of four matrices, by the signs of their first two numbers."""

    def __init__(self, inputs=12, outputs=7, experts=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(experts, outputs))

    def forward(self, x):
        ids = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        return torch.einsum("ni,noi->no", x, self.weight[ids]) + self.bias[ids]


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "linear of 3-D": (lambda: nn.Linear(12, 7, bias=False), (2, 3, 12)),
    "linear of 1-D": (lambda: nn.Linear(12, 7), (12,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 6, (3, 2), padding=(1, 0), dilation=(1, 2)), (2, 2, 5, 6)),
    "conv2d without batch": (lambda: nn.Conv2d(3, 4, 2, bias=False), (3, 4, 4)),
    "conv2d same": (lambda: nn.Conv2d(2, 4, (1, 3), padding="same"), (2, 2, 4, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 2)), (1, 2, 2, 3, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 4, 3)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=2), (2, 4, 6)),
}  # fmt: skip
"""Name to (makes the layer, shape of its input)."""
ALL_LAYERS = {**LAYERS, "experts": (Routed, (9, 12))}
"""Those, and one whose weight is a stack of matrices."""


def layer_and_input(name, dtype=torch.float64, seed=0):
    make, shape = ALL_LAYERS[name]
    torch.manual_seed(seed)
    return make().to(dtype), torch.randn(shape, dtype=dtype)


def product(forward, seed=0, dtype=torch.float64, buffers=(), **shapes):
    """A module with parameters (or ``buffers``) of the given shapes and a forward of its own."""
    module = type("Product", (nn.Module,), {"forward": forward})()
    torch.manual_seed(seed)
    for name, shape in shapes.items():
        value = torch.randn(shape, dtype=dtype)
        if name in buffers:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value))
    return module


class MLP(nn.Module):
    """Two linear layers, and a state dict to look at."""

    def __init__(self, inputs=8, hidden=12, outputs=4):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def mlp(seed=0, **sizes):
    torch.manual_seed(seed)
    return MLP(**sizes)


class Deep(nn.Module):
    """Names to choose by: layers.0.up, layers.0.down, layers.1.up, ..., head."""

    def __init__(self, depth=3, width=4):
        super().__init__()
        kinds = ("up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict({kind: nn.Linear(width, width) for kind in kinds}) for _ in range(depth)
        )
        self.head = nn.Linear(width, width)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x))
        return self.head(x)


# ---------------------------------------------------------------------------------- models


def analog_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, AnalogModule)]


def statuses(model):
    return {site.name: site.status for site in analogfx.report(model).sites}


# ---------------------------------------------------------------------------------- graphs


def captured(module, training=False):
    """The graph of a module's own digital forward."""
    return capture(module, training, default_pattern(module))


def after(passes, module, config, training=False):
    """A module's graph after some passes, and their context."""
    graph = captured(module, training)
    context = Context(None if config is None else resolve(config), training)
    pipeline.run(passes, graph, context)
    return graph, context


def run(graph, module, *inputs):
    """Run a graph; every call draws the same noise."""
    torch.manual_seed(99)
    return bind(graph)(module, *inputs)


def text(graph):
    """A graph as text that two equal graphs share."""
    return graph.python_code("self").src


def roles(graph):
    """How many nodes of each role the passes made."""
    return Counter(n.meta["made"][1] for n in graph.nodes if "made" in n.meta)


def targets(graph):
    """How many calls of each function or method."""
    called = [n.target for n in graph.nodes if n.op in ("call_function", "call_method")]
    return Counter(called)


def result(analog, x, explicit):
    """Two training steps and an eval forward: everything that they show."""
    x, shown = x.clone().requires_grad_(), []
    for training in (True, True, False):
        analog.train(training)
        torch.manual_seed(5)
        with explicit_level() if explicit else contextlib.nullcontext():
            y = analog(x)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
        shown.append(y.detach())
    grads = {name: p.grad for name, p in analog.named_parameters()}
    return {"outputs": shown, "x": x.grad, "grads": grads, "state": analog.state_dict()}
