import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import QUIET
from samples import layer_and_input, product
from torch.fx import Graph
from whole_graph import Case

from analogfx.kernels import prepared
from analogfx.passes.freeze import freeze
from analogfx.passes.sites import fence_between, fused_sites, prepared_sites, raw_input
from analogfx.passes.stationary import writes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fused_sites_are_found_in_order_with_their_scalars():
    module = product(lambda self, x: x @ self.a @ self.b, a=(8, 4), b=(4, 3))
    found = list(fused_sites(Case(module, QUIET).graph))
    assert [site.spec.in_sizes for site in found] == [[8], [4]]
    assert [site.is_conv for site in found] == [False, False]
    assert all(site.y.args == (site.node, 0) for site in found)


def test_a_site_whose_other_results_are_used_is_none():
    case = Case(layer_and_input("conv2d")[0], QUIET)
    (site,) = fused_sites(case.graph)
    assert site.is_conv
    with case.graph.inserting_after(site.node):
        case.graph.call_function(operator.getitem, (site.node, 1))
    assert not list(fused_sites(case.graph))


def test_prepared_sites_follow():
    case = Case(layer_and_input("linear")[0], QUIET)
    assert prepared_sites(case.graph) == []
    case.apply(freeze)
    (node,) = prepared_sites(case.graph)
    assert node.target is prepared.linear
    (x,) = case.graph.find_nodes(op="placeholder")
    assert raw_input(node.args[0]) is x


def between(insert):
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.sin, (x,))
    made = insert(graph, x)
    last = graph.call_function(torch.cos, (x,))
    graph.output(last)
    return fence_between(first, last), made


@pytest.mark.parametrize(
    "insert",
    [
        lambda g, x: g.call_method("add_", (x, 1)),
        lambda g, x: g.call_function(operator.iadd, (x, 1)),
        lambda g, x: g.call_function(operator.setitem, (x, 0, 1)),
        lambda g, x: g.call_function(torch.ops.aten.copy_.default, (x, x)),
        lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}),
        lambda g, x: g.call_function(F.relu, (x, True)),
        lambda g, x: g.call_function(torch.add, (x, 1), {"out": x}),
        lambda g, x: g.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu",)),
        lambda g, x: g.call_function(torch._C._set_grad_enabled, (True,)),
        lambda g, x: g.call_function(torch.ops.higher_order.cond, (x,)),
    ],
)
def test_writes_and_changes_of_mode_are_fences(insert):
    fence, made = between(insert)
    assert fence == f"{made.name} stands between"


@pytest.mark.parametrize(
    "insert",
    [
        lambda g, x: g.call_method("add", (x, 1)),
        lambda g, x: g.call_method("__add__", (x, 1)),
        lambda g, x: g.call_function(F.relu, (x,), {"inplace": False}),
        lambda g, x: g.call_function(F.relu, (x, False)),
        lambda g, x: g.call_function(F.dropout, (x, 0.5, True)),
        lambda g, x: g.call_function(operator.getitem, (x, 0)),
    ],
)
def test_other_calls_are_none(insert):
    fence, made = between(insert)
    assert fence == "" and not writes(made)
