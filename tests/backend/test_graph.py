import sys
import warnings

import pytest
import torch
from compiled import Stack
from samples import mlp
from torch import nn

from analogfx.backend import graph as dynamo
from analogfx.errors import CaptureError


def compile_with(look, model, *inputs):
    """Run a model compiled; ``look`` sees Dynamo's graph, and what it returns is returned."""
    seen = []

    def backend(module, example_inputs):
        seen.append(look(module))
        return module.forward

    torch.compile(model, backend=backend)(*inputs)
    return seen


def names_of(model):
    return {id(p): n for n, p in model.named_parameters()}


def test_parameters_and_buffers_are_marked():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4).eval()

        def forward(self, x):
            return self.norm(self.layer(x))

    model = Normed()

    def look(module):
        weights = dynamo.mark_weights(module.graph, names_of(model))
        inputs = module.graph.find_nodes(op="placeholder")
        return weights, {n.meta.get("parameter", "input") for n in inputs}

    ((weights, names),) = compile_with(look, model, torch.randn(3, 4))
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert names == {*weights, None, "input"}  # None for buffers


def test_dynamos_own_graph_stays_as_it_is():
    def look(module):
        before = str(module.graph)
        made = dynamo.editable(module)
        made.graph.erase_node(next(n for n in reversed(made.graph.nodes) if n.op == "output"))
        dynamo.add_input(made.graph, "more", torch.empty(2))
        return before, str(module.graph)

    ((before, after),) = compile_with(look, mlp(), torch.randn(3, 8))
    assert before == after


def test_a_new_input_comes_last():
    graph = torch.fx.Graph()
    first = dynamo.add_input(graph, "a", torch.empty(1))
    second = dynamo.add_input(graph, "b", torch.empty(1))
    assert graph.find_nodes(op="placeholder") == [first, second]


def test_the_owner_of_a_parameter_is_the_module_that_holds_it():
    model = Stack(2, breaks=False)

    def look(module):
        weights = dynamo.mark_weights(module.graph, names_of(model))
        return {name: dynamo.owner_of(node).module for name, node in weights.items()}

    (owners,) = compile_with(look, model, torch.randn(3, 8))
    assert owners["blocks.1.key.weight"] is model.blocks[1].key
    assert len(owners) == 8


def test_a_parameter_without_a_module_has_no_owner():
    weight = nn.Parameter(torch.randn(4, 4))

    def look(module):
        (node,) = dynamo.mark_weights(module.graph, {}).values()
        with pytest.raises(CaptureError, match="cannot tell which module holds this parameter"):
            dynamo.owner_of(node)

    compile_with(look, lambda x: x @ weight, torch.randn(3, 4))


@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_the_model_that_is_compiled_is_found(how):
    model, seen = mlp(), []

    def backend(module, example_inputs):
        seen.append(dynamo.compiled_root())
        return module.forward

    if how == "wrapped":
        torch.compile(model, backend=backend)(torch.ones(2, 8))
    elif how == "in place":
        model.compile(backend=backend)
        nn.Sequential(model)(torch.ones(2, 8))
    else:
        torch.compile(lambda x: model(x), backend=backend)(torch.ones(2, 8))
    assert seen == [None if how == "function" else model]
    assert dynamo.compiled_root() is None


def test_no_other_frame_is_asked_for_its_variables():
    """A frame that was asked keeps them alive, and with them a model that was deleted."""
    frames = [*dynamo._locals(sys._getframe().f_code)]
    assert len(frames) == 1 and list(dynamo._locals((lambda: 0).__code__)) == []


@pytest.mark.parametrize(("limit", "told"), [(3, False), (2, True)])
def test_the_last_graph_is_told_of(limit, told):
    model, messages = mlp(), []

    def backend(module, example_inputs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dynamo.warn_of_last_graph()
        messages.append([str(w.message) for w in caught])
        return module.forward

    run = torch.compile(model, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=limit):
        run(torch.ones(2, 8)), run(torch.ones(3, 8))
    assert [bool(m) for m in messages] == [False, told]


def test_a_dynamo_that_counts_otherwise_is_no_error(monkeypatch):
    monkeypatch.setattr(dynamo, "_locals", lambda *_: iter([{"cache": 3}]))
    dynamo.warn_of_last_graph()


def test_graphs_inside_graphs_are_found_with_their_weights():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)

    model = Checkpointed()

    def look(module):
        made = dynamo.editable(module)
        dynamo.mark_weights(made.graph, names_of(model))
        return [
            (name, {n.meta.get("parameter") for n in graph.find_nodes(op="placeholder")})
            for name, graph in dynamo.inner_graphs(made)
        ]

    ((inner,),) = compile_with(look, model, torch.randn(3, 4))
    assert inner == ("tag_activation_checkpoint", {None, "layer.weight", "layer.bias"})
