"""Models under ``torch.compile(backend="analogfx")``, and how they are held against analogize()."""

import pytest
import torch
from samples import CONFIGS, merged, modifier, ranged
from torch import nn

import analogfx

FIXED = {"pre_post": {"input_range": {"learn_input_range": False}}}
"""What a compiler may keep: ranges from statistics, that no optimizer learns."""

# Dynamo's own, where it goes on behind a graph break with a tensor that has a gradient function.
RESUMES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

DYNAMO_CONFIGS = {
    name: merged(config, FIXED) if "pre_post" in config else config
    for name, config in CONFIGS.items()
    if "clip" not in config
} | {
    "everything": merged(
        CONFIGS["output noise"], CONFIGS["DAC and ADC"], CONFIGS["weight noise"],
        modifier(quantization_type="DiscretizePerChannel", res=14), FIXED,
    ),
}  # fmt: skip
"""The configs that the backend takes."""

QUIET = merged(ranged(learn_input_range=False), {"forward": {"inp_res": 30, "out_res": 61}},
               {"forward": {"out_bound": 1.5}})  # fmt: skip
"""Ranges, DAC and ADC, and no noise."""


def compiled(model, config, compiler="eager", fullgraph=False, dynamic=None, **options):
    given = options | {"compiler": compiler}
    if config is not None:
        given["rpu_config"] = config
    return torch.compile(
        model, backend="analogfx", options=given, fullgraph=fullgraph, dynamic=dynamic
    )


def twins(model, config, **options):
    """A model compiled, and the same model analogized."""
    analog = analogfx.analogize(model, config)
    return compiled(model, config, **options), analog


def step(model, x, seed, update=True):
    """One training step of SGD: the output and every gradient."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    for parameter in model.parameters():
        parameter.grad = None
    (y * weights).sum().backward()
    grads = {
        name.removeprefix("_orig_mod."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and update:
                parameter.sub_(0.01 * parameter.grad)
    return [y.detach(), x.grad, grads]


def evaluated(model, x):
    """The output in eval mode without gradients."""
    model.eval()
    with torch.no_grad():
        return model(x)


def ranges(model):
    """The state of a compiled or analogized model, ranges alone."""
    analog = getattr(model, "_analog_chosen", None) is not None
    state = model.state_dict() if analog else analogfx.backend_state(model).state_dict()
    endings = ("input_range", "input_range_update_idx", "x_min", "x_max")
    return {name: value.detach().clone() for name, value in state.items() if name.endswith(endings)}


def assert_same(found, expected, exact=True):
    """Equal to the bit, or up to the order of sums."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)


def report_of(model):
    return {s.name: (s.status, s.reason) for s in analogfx.report(model).sites}


class Block(nn.Module):
    """Two products of one input, behind a graph break if asked for."""

    def __init__(self, width=8, breaks=False):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.breaks = breaks

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.query(x) * self.key(x)


class Stack(nn.Module):
    """Blocks of one class: with breaks Dynamo compiles one graph for all of them."""

    def __init__(self, depth=3, breaks=True):
        super().__init__()
        self.blocks = nn.ModuleList(Block(breaks=breaks) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def stack(breaks=True, depth=3):
    torch.manual_seed(0)
    return Stack(depth, breaks)
