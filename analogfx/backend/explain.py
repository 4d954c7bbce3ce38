"""What the passes make of a model's graphs, one by one, and why those that did nothing did not."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from analogfx.backend.state import backend_state
from analogfx.errors import AnalogfxError, CaptureError
from analogfx.modules.capture import source


@dataclass(frozen=True)
class Step:
    """One pass over one graph."""

    name: str
    count: int
    """How many sites the pass changed."""
    code: str = field(repr=False)
    """The graph after it, as Python."""


@dataclass
class GraphExplanation:
    """The passes over one of the graphs that a model was captured in."""

    captured: str
    """The graph before the first pass, as Python."""
    steps: list[Step] = field(default_factory=list)
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """(pass, node, reason) where a pass could have fired and did not."""


@dataclass(frozen=True)
class Explanation:
    """All graphs of a model. Printing it gives every graph after every pass."""

    graphs: tuple[GraphExplanation, ...]

    def summary(self) -> str:
        """Counts and reasons alone."""
        lines = []
        for number, graph in enumerate(self.graphs, 1):
            lines.append(f"graph {number} of {len(self.graphs)}")
            for step in graph.steps:
                lines.append(f"  {step.name}: {step.count} changed")
                reasons = Counter(reason for name, _, reason in graph.notes if name == step.name)
                lines += [f"    not at {count}: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.summary()]
        for number, graph in enumerate(self.graphs, 1):
            lines.append(f"\n# graph {number}, as captured\n{graph.captured}")
            for step in graph.steps:
                if step.count:
                    lines.append(f"# graph {number}, after {step.name}\n{step.code}")
        return "\n".join(lines)


def explain(
    model: nn.Module, rpu_config: Any = None, *inputs: Any, passes: Any = None, **keywords: Any
) -> Explanation:
    """Run the passes of ``torch.compile(model, backend="analogfx")`` and show what each did.

    A copy of the model runs once, in the mode and with the gradients that are on; whole-graph
    passes want ``model.eval()`` and ``torch.no_grad()``. Nothing of the model changes.

    Args:
        rpu_config: as for :func:`analogfx.analogize`; None for a model that is analog already.
        inputs, keywords: what the model's forward takes.
        passes: as the backend's option of the same name.

    Raises:
        ConfigError, CaptureError: as the backend; CaptureError, too, if Dynamo compiles nothing.
        TypeError: an input stands in the place of the config.
    """
    import torch._dynamo
    from torch._dynamo.exc import BackendCompilerFailed

    from analogfx.backend.compiler import finish, rewrite
    from analogfx.backend.options import parse

    if isinstance(rpu_config, torch.Tensor):
        raise TypeError("explain() takes a config before the inputs: explain(analog, None, x)")
    options = parse({"rpu_config": rpu_config, "passes": passes})
    found: list[GraphExplanation] = []

    def record(module: GraphModule, stand_ins: Any) -> Any:
        graph = GraphExplanation(source(module.graph))
        found.append(graph)

        def after(name: str, rewritten: Graph, count: int) -> None:
            graph.steps.append(Step(name, count, source(rewritten)))

        made = rewrite(module, stand_ins, options, after)
        graph.notes = made.context.notes
        return finish(made, lambda rewritten, _: rewritten.forward)

    model = getattr(model, "_orig_mod", model)
    twin = copy.deepcopy(model)
    backend_state(twin).load_state_dict(backend_state(model).state_dict())
    try:
        # One call more of code that other models share must not be the one too many.
        with torch.random.fork_rng(), torch._dynamo.config.patch(recompile_limit=sys.maxsize):
            torch.compile(twin, backend=record)(*inputs, **keywords)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, AnalogfxError):
            raise error.inner_exception from None
        raise
    if not found:
        raise CaptureError(
            f"Dynamo compiled nothing of {type(model).__name__}: its forward has no tensor op, or "
            "Dynamo has given its code up; torch.compiler.reset() lets it try again"
        )
    return Explanation(tuple(found))
