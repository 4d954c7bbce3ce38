"""The backend: Dynamo's graph through the passes, then through Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch._guards import TracingContext, detect_fake_mode
from torch.fx import Graph, GraphModule

from analogfx.backend import graph as dynamo
from analogfx.backend.attention import expand_attention
from analogfx.backend.context import DynamoContext, derivation
from analogfx.backend.feed import Feed, Product
from analogfx.backend.frozen import Folded
from analogfx.backend.options import Options, parse
from analogfx.backend.state import Place
from analogfx.errors import ConfigError, Conflict
from analogfx.module import AnalogModule
from analogfx.passes import pipeline
from analogfx.passes.contract import Context, Decision
from analogfx.passes.normalize import normalize
from analogfx.passes.select import select
from analogfx.report import CompiledSite, SiteReport

After = Callable[[str, Graph, int], None]


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
    return compile_graph(module, inputs, chosen, _inner(chosen.compiler, mode))


def compile_graph(
    module: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    inner: Callable[[GraphModule, list[Any]], Callable[..., Any]],
    after: After | None = None,
    context: list[Context] | None = None,
) -> Callable[..., Any]:
    """Rewrite one graph and hand it to a compiler.

    Args:
        inner: compiles the rewritten graph.
        after: called after each pass, see ``pipeline.run``.
        context: where to put the context of the passes, for whoever reads its notes.
    """
    made = dynamo.editable(module)
    expand_attention(made.graph)
    fake_mode = detect_fake_mode(inputs) or TracingContext.get().fake_mode
    found = DynamoContext.of(made, options, fake_mode)
    if context is not None:
        context.append(found)
    _check(options, found)
    if options.rpu_config is not None:
        pipeline.run(pipeline.EXPLICIT, made.graph, found, after)
        pipeline.run(pipeline.FUSED, made.graph, found, after)
    feed = _feed(made, found, options)
    unfolded = _copy(made)
    pipeline.run(options.pipeline(), made.graph, found, after)
    made.recompile()
    if not any(n.meta.get("frozen") for n in made.graph.nodes):
        compiled = inner(made, [*inputs, *found.stand_ins()])
        _forget(made)

        def run(*args: Any) -> Any:
            feed.report(args)
            return compiled(*args, *feed.state(args))

        return run

    anchor = found.anchor() if found.equal else None
    folded = Folded(made, found.equal, anchor, found.real, fake_mode)
    new = made.graph.find_nodes(op="placeholder")[len(inputs) :]
    compiled = inner(made, [*inputs, *(n.meta["example_value"] for n in new)])
    if anchor is not None:
        dynamo.guard(anchor, folded.fits, "ranges that were equal still are")
    _forget(made)

    def run_folded(*args: Any) -> Any:
        feed.report(args)
        given = (*args, *feed.state(args))
        values = folded.values(given)
        if values is None:  # for other weights than it was made for: compiled anew next time
            return unfolded(*given)
        return compiled(*given, *values)

    return run_folded


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


def _inner(compiler: str, mode: str | None) -> Callable[[GraphModule, list[Any]], Any]:
    if compiler == "eager":
        return lambda module, inputs: module.forward
    if compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else None
    return lambda module, inputs: compile_fx(module, inputs, config_patches=patches)


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


# --------------------------------------------------------------------------------- the report


def _feed(module: GraphModule, context: DynamoContext, options: Options) -> Feed:
    """What the graph's calls need; its products are added to the report of the model."""
    if options.rpu_config is None:  # an analog model has its state and its report
        return Feed((), (), ())
    placeholders = module.graph.find_nodes(op="placeholder")
    products = [*_products(module, context), *_hidden(module)]
    weights = [placeholders.index(node) for node in context.weights.values()]
    feed = Feed(context.slots, products, weights)
    examples = [context.real(node) for node in placeholders]
    placed = feed.note(context.root, examples)
    if options.report and products:
        print(placed)
    return feed


def _products(module: GraphModule, context: DynamoContext) -> Iterator[Product]:
    placeholders = module.graph.find_nodes(op="placeholder")
    analog = {id(s.decision): (s.product, derivation(s.weight)) for s in context.sites}
    for node in module.graph.nodes:
        decision: Decision | None = node.meta.get("decision")
        if decision is None:
            continue
        weight = context.weights[decision.name]
        site = SiteReport(**vars(decision))
        if decision.status == "digital":
            chosen = context.chosen(node, weight)
            if chosen.config is None:
                site = replace(site, reason=chosen.reason, asked=chosen.asked)
        product, computed = analog.get(id(decision), (node, ""))
        place = context.place(product, weight)
        module, parameter = place.parts(decision.name)
        named = CompiledSite(module, computed, replace(site, name=parameter))
        yield Product(named, placeholders.index(weight), place)


def _hidden(module: GraphModule) -> list[Product]:
    """Products in graphs that an op of this graph runs, which stay digital."""
    found = []
    for name, graph in dynamo.inner_graphs(module):
        pipeline.run((normalize, select), graph, Context(None, False))
        for decision in pipeline.decisions(graph):
            reason = f"inside {name}, whose graph the passes do not enter"
            warnings.warn(f"{decision.name} stays digital: it is {reason}", stacklevel=2)
            path, parameter = Place().parts(decision.name)
            left = replace(decision, name=parameter, reason=reason, decided_by="capture")
            found.append(Product(CompiledSite(path, name, SiteReport(**vars(left))), None, Place()))
    return found
