"""Graphs for the whole-graph passes, as a compiler would bring them, and a way to run them."""

from collections import Counter

import torch
from samples import captured, run

import analogfx
from analogfx.config import resolve
from analogfx.kernels import prepared
from analogfx.modules.capture import default_pattern
from analogfx.passes import pipeline
from analogfx.passes.contract import Context
from analogfx.passes.stationary import mark_stationary

PREPARED = (prepared.linear, prepared.conv)


class Inference(Context):
    """A context without gradients, whose ranges are known and may be compared."""

    def __init__(self, module, config, equal=True, gradients=False):
        super().__init__(resolve(config), training=False, gradients=gradients)
        self.module, self.equal = module, equal

    def attribute(self, graph, site, name):
        node = super().attribute(graph, site, name)
        if name.endswith("input_range"):
            mark_stationary(node, torch.empty(len(site.in_sizes), device="meta"), None)
        return node

    def same_value(self, first, second):
        return first is second or self.equal


class Case:
    """A module, the graph of its fused sites, and what has been made of it."""

    def __init__(self, module, config, **context):
        self.analog = analogfx.analogize(module, config).eval()
        self.context = Inference(module, config, **context)
        self.graph = captured(module)
        assert default_pattern(module) == ()
        pipeline.run(pipeline.EXPLICIT + pipeline.FUSED, self.graph, self.context)

    def apply(self, *passes):
        """Run passes; the count of each."""
        counts = []
        pipeline.run(passes, self.graph, self.context, lambda *made: counts.append(made[2]))
        return counts

    def __call__(self, *inputs):
        with torch.no_grad():
            return run(self.graph, self.analog, *inputs)

    def census(self):
        """How many calls of each function or method are left."""
        return Counter(n.target for n in self.graph.nodes if n.op.startswith("call"))

    def reasons(self, name):
        return [why for by, _, why in self.context.notes if by == name]

    def nodes(self, *targets):
        return [n for n in self.graph.nodes if n.target in targets]


def set_ranges(analog, value=1.0):
    """Ranges that clip some of what standard normal inputs are."""
    with torch.no_grad():
        for name, parameter in analog.named_parameters():
            if name.endswith("input_range"):
                parameter.fill_(value)
