"""What a graph's call needs and the report says, read off the graph once its sites are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node

from analogfx.backend import graph as dynamo
from analogfx.backend.context import DynamoContext, derivation
from analogfx.backend.feed import Feed, Product
from analogfx.backend.options import Options
from analogfx.backend.state import Place
from analogfx.passes import pipeline
from analogfx.passes.contract import Context, Decision, SiteReport, decisions_of
from analogfx.passes.expand import expand
from analogfx.passes.normalize import normalize
from analogfx.passes.respell import respell
from analogfx.passes.select import select
from analogfx.report import CompiledSite


def feed_of(module: GraphModule, context: DynamoContext, options: Options) -> Feed:
    """What the graph's calls need; its products are added to the report of the model."""
    if options.rpu_config is None:  # an analog model has its state and its report
        return Feed((), (), ())
    placeholders = module.graph.find_nodes(op="placeholder")
    products = [*_products(module, context), *_hidden(module)]
    weights = [placeholders.index(node) for node in context.weights.values()]
    feed = Feed(context.slots, products, weights)
    examples = [context.real(node) for node in placeholders]
    feed.note(context.root, examples)
    return feed


def _products(module: GraphModule, context: DynamoContext) -> Iterator[Product]:
    placeholders = module.graph.find_nodes(op="placeholder")
    analog = {id(site.decision): site for site in context.sites}
    products = ((node, d) for node in module.graph.nodes for d in decisions_of(node))
    for node, decision in products:
        weight = context.weights[decision.name]
        site = SiteReport(**vars(decision))
        if decision.status == "digital":
            chosen = context.chosen(node, weight)
            if chosen.config is None:
                site = replace(site, reason=chosen.reason, asked=chosen.asked)
        chosen_site = analog.get(id(decision))
        place = context.place(chosen_site.product if chosen_site else node, weight)
        operand = chosen_site.weight if chosen_site else _operand(node, decision)
        yield Product(_compiled_site(site, operand, place), placeholders.index(weight), place)


def _compiled_site(site: SiteReport, operand: Node, place: Place) -> CompiledSite:
    """A product under the path of its module, with how its weight is computed."""
    module, parameter = place.parts(site.name)
    return CompiledSite(module, derivation(operand), replace(site, name=parameter))


def _operand(product: Node, decision: Decision) -> Node:
    """The weight of a product that stayed digital."""
    operands = (n.meta.get("cut_from", n) for n in product.all_input_nodes)
    return next(n for n in operands if n.meta.get("parameter") == decision.name)


def _hidden(module: GraphModule) -> list[Product]:
    """Products in graphs that an op of this graph runs, which stay digital."""
    found = []
    for name, graph in dynamo.inner_graphs(module):
        pipeline.run((expand, respell, normalize, select), graph, Context(None, False))
        for node, decision in ((n, d) for n in graph.nodes for d in decisions_of(n)):
            reason = f"inside {name}, whose graph the passes do not enter"
            warnings.warn(
                f"{decision.name} stays digital: it is {reason}. analogize() makes it analog",
                stacklevel=2,
            )
            left = SiteReport(**vars(replace(decision, reason=reason, decided_by="capture")))
            operand = _operand(node, decision)
            found.append(Product(_compiled_site(left, operand, Place()), None, Place()))
    return found
