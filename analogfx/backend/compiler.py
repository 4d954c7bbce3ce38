"""The backend: Dynamo's graph through the passes, then through Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch._guards import TracingContext, detect_fake_mode
from torch.fx import Graph, GraphModule

from analogfx.backend import graph as dynamo
from analogfx.backend.context import DynamoContext
from analogfx.backend.feed import Feed
from analogfx.backend.folded import Folded
from analogfx.backend.options import Options, parse
from analogfx.backend.placement import feed_of
from analogfx.backend.recompute import inline_checkpoints, keep_results
from analogfx.errors import ConfigError, Conflict
from analogfx.modules.analog_module import AnalogModule
from analogfx.passes import pipeline
from analogfx.report import note_passes, report_of_graph

# Dynamo leaves a whole function as it is, digital, where a recurrent layer is called in it.
torch._dynamo.config.allow_rnn = True

After = Callable[[str, Graph, int], None]
Inner = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def backend(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="analogfx")`` calls for every graph of a model.

    Dynamo runs digitally whatever it does not compile: code around a graph break that it gives up
    on, and, with a warning from here, calls beyond ``torch._dynamo.config.recompile_limit``.
    :func:`analogfx.report` lists what no graph has contained; ``fullgraph=True`` raises.

    Args:
        module: Dynamo's graph.
        inputs: stand-ins for its inputs.
        options: see :class:`~analogfx.backend.options.Options`.
        mode: one of torch's, as for Inductor.

    Returns:
        A function of the graph's inputs.

    Raises:
        ConfigError: an option or a config cannot be, or wants what an optimizer must own.
        CaptureError: Dynamo hides what the passes must know.
    """
    chosen = parse(options)
    if chosen.rpu_config is not None:
        dynamo.warn_of_last_graph()
    return finish(rewrite(module, inputs, chosen), _inner(chosen, mode))


@dataclass
class Rewritten:
    """A graph of Dynamo's after the passes, and what it takes to run it."""

    module: GraphModule
    unfolded: GraphModule
    """The graph before the whole-graph passes, for weights that those are not right for."""
    inputs: list[Any]
    """Stand-ins for the inputs that Dynamo passes."""
    context: DynamoContext
    feed: Feed


def rewrite(
    module: GraphModule, inputs: Sequence[Any], options: Options, after: After | None = None
) -> Rewritten:
    """Run the passes over a copy of a graph.

    Args:
        after: called after each pass, see ``pipeline.run``.
    """
    made = dynamo.editable(module)
    inline_checkpoints(made)
    fake_mode = detect_fake_mode(inputs) or TracingContext.get().fake_mode
    context = DynamoContext.of(made, options, fake_mode)
    _check(options, context)
    counts: dict[str, int] = {}

    def note(name: str, graph: Graph, count: int) -> None:
        counts[name] = count
        if after is not None:
            after(name, graph, count)

    if options.rpu_config is not None:
        pipeline.run(pipeline.EXPLICIT + pipeline.FUSED, made.graph, context, after)
    feed = feed_of(made, context, options)
    unfolded = _copy(made)
    pipeline.run(options.pipeline(), made.graph, context, note)
    keep_results(made)
    made.recompile()
    note_passes(context.root, counts)
    if options.report:
        print(report_of_graph(context.root, feed.sites(), counts))
    return Rewritten(made, unfolded, [*inputs], context, feed)


def finish(made: Rewritten, inner: Inner) -> Callable[..., Any]:
    """Compile a rewritten graph.

    Args:
        inner: what compiles a graph for stand-ins of its inputs.

    Returns:
        A function of the inputs that Dynamo passes.
    """
    if any(n.meta.get("frozen") for n in made.module.graph.nodes):
        return _folded(made, inner)
    compiled = inner(made.module, [*made.inputs, *made.context.stand_ins()])
    feed = made.feed
    _forget(made.module)

    def run(*args: Any) -> Any:
        feed.report(args)
        return compiled(*args, *feed.state(args))

    return run


def _folded(made: Rewritten, inner: Inner) -> Callable[..., Any]:
    """Compile a graph without its frozen part, whose values are passed to it."""
    context, feed, unfolded = made.context, made.feed, made.unfolded
    anchor = context.anchor() if context.equal else None
    folded = Folded(made.module, context.equal, anchor, context.real, context.fake_mode)
    new = made.module.graph.find_nodes(op="placeholder")[len(made.inputs) :]
    compiled = inner(made.module, [*made.inputs, *(n.meta["example_value"] for n in new)])
    if anchor is not None:
        dynamo.guard(anchor, folded.fits, "ranges that were equal still are")
    _forget(made.module)

    def run(*args: Any) -> Any:
        feed.report(args)
        given = (*args, *feed.state(args))
        values = folded.values(given)
        if values is None:  # for other weights than it was made for: compiled anew next time
            return unfolded(*given)
        return compiled(*given, *values)

    return run


def _copy(module: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = GraphModule(module, graph)
    _forget(copied)
    return copied


def _forget(module: GraphModule) -> None:
    """Drop the notes on nodes: they hold the model, which what is compiled must not keep alive."""
    for node in module.graph.nodes:
        node.meta.clear()


def _inner(options: Options, mode: str | None) -> Inner:
    """What compiles the rewritten graphs."""
    if options.compiler == "eager":
        return lambda module, inputs: module.forward
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    mode = mode or options.mode
    settings = {**(list_mode_options(mode) if mode else {}), **(options.inductor or {})}
    inductor: Callable[..., Any] = compile_fx
    return lambda module, inputs: inductor(module, inputs, config_patches=settings or None)


def _check(options: Options, context: DynamoContext) -> None:
    """Refuse a model that was analogized and has a config, or is digital and has none.

    Raises:
        ConfigError: naming the option.
    """
    models = [context.root] if context.root is not None else dynamo.models_of(context.weights)
    analog = any(isinstance(m, AnalogModule) for model in models for m in model.modules())
    if options.rpu_config is None and (models or context.weights) and not analog:
        valid = "a config: the model is digital (or pass what analogize() returned)"
        raise ConfigError([Conflict("options['rpu_config']", None, valid)])
    if options.rpu_config is not None and analog:
        valid = "None: the model is analog already, with configs of its own"
        raise ConfigError([Conflict("options['rpu_config']", options.rpu_config, valid)])
