import pytest
import torch
import torch.nn.functional as F
from samples import CONFIGS, IDENTITY, after, captured, product, run, text
from torch import nn

from analogfx.config import resolve
from analogfx.passes import pipeline
from analogfx.passes.contract import Context
from analogfx.passes.normalize import normalize
from analogfx.passes.select import select

GAUSSIAN = CONFIGS["gaussian clip"]


def two(self, x):
    return F.linear(F.linear(x, self.first), self.second.t())


def selected(module, config):
    return after((normalize, select), module, config)


def decisions(graph):
    return [n.meta["decision"] for n in graph.nodes if "decision" in n.meta]


def test_every_canonical_product_becomes_a_site():
    module = product(two, first=(6, 8), second=(6, 4))
    graph, context = selected(module, {"mapping": {"max_input_size": 5, "max_output_size": 3}})
    first, second = context.sites
    assert [n.meta["site"] for n in graph.nodes if "site" in n.meta] == [first, second]
    assert (first.in_sizes, first.out_sizes) == ((4, 4), (3, 3))
    assert (second.in_sizes, second.out_sizes) == ((3, 3), (2, 2))
    assert [s.index for s in context.sites] == [0, 1]
    for site, name, shape in ((first, "first", (6, 8)), (second, "second", (4, 6))):
        decision = site.decision
        assert (decision.name, decision.weight_shape, decision.kind) == (name, shape, "linear")
        assert (decision.status, decision.reason) == ("analog", "")
        assert (decision.decided_by, decision.tile_grid) == ("select", (2, 2))


def test_a_second_run_changes_nothing_and_the_graph_computes_the_same():
    module = product(two, first=(6, 8), second=(6, 4))
    graph, context = selected(module, IDENTITY)
    once = text(graph)
    assert select(graph, context) == 0
    assert text(graph) == once and len(context.sites) == 2
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(run(graph, module, x), module(x))


def test_groups_and_patches_count_as_inputs_of_a_tile():
    module = nn.Conv2d(4, 6, (3, 2), groups=2)
    _, context = selected(module, {"mapping": {"max_input_size": 7, "max_output_size": 4}})
    (site,) = context.sites
    assert site.groups == 2
    assert (site.in_sizes, site.out_sizes) == ((6, 6), (3, 3))  # 2 channels x 3 x 2 patches
    assert site.decision.weight_shape == (6, 2, 3, 2)


def names(*parameters):
    """Prefixes of the states of sites that multiply by these parameters."""

    def forward(self, x):
        for name in parameters:
            x = F.linear(x, getattr(self, name))
        return x

    _, context = selected(product(forward, **dict.fromkeys(parameters, (4, 4))), IDENTITY)
    return [site.state.prefix for site in context.sites]


def test_the_only_site_of_a_module_has_lightnings_names():
    assert names("w") == [""]


def test_several_sites_are_told_apart_by_their_weights():
    assert names("q", "k", "v") == ["q_", "k_", "v_"]
    assert names("w", "w", "w") == ["w_", "w_2_", "w_3_"]


def test_names_of_sites_never_clash():
    assert len(set(names("w", "w_2", "w"))) == 3


def test_a_parameter_of_a_child_names_its_site_without_dots():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(F.linear(x, self.a.weight), self.b.weight)

    _, context = selected(Reader(), IDENTITY)
    assert [s.state.prefix for s in context.sites] == ["a_weight_", "b_weight_"]
    assert [s.decision.name for s in context.sites] == ["a.weight", "b.weight"]


def test_without_a_config_every_product_is_digital():
    module = product(two, first=(6, 8), second=(6, 4))
    graph, context = selected(module, None)
    assert not context.sites
    assert {(d.status, d.reason) for d in decisions(graph)} == {
        ("digital", "left digital by the config")
    }


def written(self, x):
    weight = self.w.clone()
    weight.mul_(2)
    return F.linear(x, weight)


REFUSED = {
    # name: (forward, shapes, config, part of the reason)
    "no elements": (lambda s, x: F.linear(x, s.w), {"w": (0, 4)}, IDENTITY, "no elements"),
    "written in place": (written, {"w": (3, 4)}, IDENTITY, "in place"),
    "clip of a computed weight": (
        lambda s, x: F.linear(x, s.w * 2), {"w": (3, 4)}, GAUSSIAN, "computed"),
    "clip of a masked weight": (
        lambda s, x: F.linear(x, s.w * s.mask), {"w": (3, 4), "mask": (3, 4)}, GAUSSIAN,
        "computed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_digital_says_why_and_computes_the_same(name):
    forward, shapes, config, reason = REFUSED[name]
    module = product(forward, **shapes)
    graph, context = selected(module, config)
    (decision,) = decisions(graph)
    assert (decision.status, decision.decided_by) == ("digital", "select")
    assert reason in decision.reason
    assert not context.sites
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(run(graph, module, x), module(x))


def test_integer_weights_stay_digital():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.w)

    graph, _ = selected(Quantized(), IDENTITY)
    (decision,) = decisions(graph)
    assert "torch.int8" in decision.reason


VIEWS = {
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(0, 1),
    "T": lambda w: w.T,
    "view": lambda w: w.view(6, 4),
    "reshape": lambda w: w.reshape(6, 4),
    "chunk": lambda w: w.chunk(2, dim=1)[1],
    "split": lambda w: w.split(2, 1)[0],
    "slice": lambda w: w[1:3],
    "narrow": lambda w: torch.narrow(w, 0, 1, 2),
    "permute": lambda w: w.permute(1, 0).contiguous(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_parameter_can_be_clipped(name):
    view = VIEWS[name]
    module = product(lambda self, x: F.linear(x, view(self.w)), w=(4, 6))
    graph, context = selected(module, GAUSSIAN)
    assert len(context.sites) == 1 and not decisions(graph)


def test_a_product_that_another_pass_decided_about_is_left_alone():
    module = product(lambda self, x: x @ self.b @ self.w, b=(1, 2, 6, 4), w=(4, 3))
    graph = captured(module)
    context = Context(resolve(IDENTITY), training=False)
    pipeline.run((normalize, select), graph, context)
    assert [s.decision.name for s in context.sites] == ["w"]
    assert [d.decided_by for d in decisions(graph)] == ["normalize"]


def test_a_product_of_parameters_alone_computes_a_weight():
    module = product(lambda self, x: F.linear(x, F.linear(self.a, self.b)), a=(4, 3), b=(5, 3))
    graph, context = after((normalize, select), module, IDENTITY)
    (site,) = context.sites
    assert site.decision.weight_shape == (4, 5) and not site.rearranged
    assert [d.status for d in decisions(graph)] == []
