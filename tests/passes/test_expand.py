import torch
import torch.nn.functional as F
from samples import IDENTITY, after, captured, product, run, text
from torch import nn

from analogfx.config import resolve
from analogfx.passes.contract import Context
from analogfx.passes.expand import expand


def attends(self, x):
    return F.multi_head_attention_forward(
        x, x, x, 8, 2, self.w, None, None, None, False, 0.0, self.out, None, need_weights=False
    )[0]


def test_what_stands_for_a_call_is_the_same_and_a_second_run_changes_nothing():
    module = product(attends, w=(24, 8), out=(8, 8))
    graph, context = after((expand,), module, IDENTITY)
    assert F.multi_head_attention_forward not in {n.target for n in graph.nodes}
    assert len(graph.find_nodes(op="call_function", target=F.linear)) == 4
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(run(graph, module, x), module(x))
    once = text(graph)
    assert expand(graph, context) == 0
    assert text(graph) == once


def test_other_graphs_are_left_alone():
    graph = captured(nn.Linear(2, 2))
    before = text(graph)
    assert expand(graph, Context(resolve(IDENTITY), training=False)) == 0
    assert text(graph) == before
