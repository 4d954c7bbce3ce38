import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET
from samples import LAYERS, TILES, layer_and_input, merged, product, text
from whole_graph import PREPARED, Case, set_ranges

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode
from analogfx.passes.freeze import freeze, is_frozen
from analogfx.passes.sites import fused_sites

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen(case):
    return [n.target for n in case.graph.nodes if n.meta.get("frozen")]


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("config", ["identity", "DAC and ADC", "discrete rows", "bound alone"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_site_is_prepared_and_gives_the_same_bits(layer, config, tiles):
    module, x = layer_and_input(layer, torch.float32)
    case = Case(module, merged(DYNAMO_CONFIGS[config], tiles))
    set_ranges(case.analog)
    expected = case(x)
    assert case.apply(freeze) == [1]
    assert len(case.nodes(*PREPARED)) == len(case.nodes(prepared.prepare)) == 1
    assert not list(fused_sites(case.graph))
    assert torch.equal(case(x), expected)


def test_a_second_run_changes_nothing():
    case = Case(layer_and_input("conv2d")[0], QUIET)
    case.apply(freeze)
    once = text(case.graph)
    assert case.apply(freeze) == [0]
    assert text(case.graph) == once


def test_all_that_depends_on_weights_alone_comes_first_and_nothing_else_is_marked():
    module = product(lambda self, x: (x @ self.a).relu() @ self.b, a=(8, 4), b=(4, 3))
    case = Case(module, QUIET)
    case.apply(freeze)
    kept = frozen(case)
    assert kept.count(prepared.prepare) == 2 and kept.count("abs") == 2
    assert not {"relu", *PREPARED} & {*kept}
    marks = [bool(n.meta.get("frozen")) for n in case.graph.nodes if n.op != "placeholder"]
    assert marks == sorted(marks, reverse=True)


def test_gradients_stand_in_its_way():
    case = Case(layer_and_input("linear")[0], QUIET, gradients=True)
    before = text(case.graph)
    assert case.apply(freeze) == [0]
    assert text(case.graph) == before
    assert "gradients are on" in case.reasons("freeze")[0]


def test_training_stands_in_its_way():
    module, _ = layer_and_input("linear")
    case = Case(module, QUIET)
    (site,) = fused_sites(case.graph)
    keeping = site.spec._replace(keep=True)
    site.node.update_arg(len(site.node.args) - 1, encode(keeping))
    assert case.apply(freeze) == [0]
    assert case.reasons("freeze") == ["the site is in training mode"]


def test_a_random_weight_is_not_frozen():
    case = Case(product(lambda self, x: x @ (self.w * torch.rand_like(self.w)), w=(8, 4)), QUIET)
    assert case.apply(freeze) == [0]
    assert "is not computed from weights alone, or not always the same" in case.reasons("freeze")[0]


def test_a_weight_that_is_cast_to_the_inputs_dtype_is_not_frozen():
    case = Case(product(lambda self, x: F.linear(x, self.w.to(x.dtype)), w=(4, 8)), QUIET)
    assert case.apply(freeze) == [0]
    (site,) = fused_sites(case.graph)
    assert not is_frozen(site.node.args[1])


def test_only_the_results_that_are_used_are_taken():
    case = Case(layer_and_input("linear")[0], DYNAMO_CONFIGS["discrete"])  # no bound, so no scale
    case.apply(freeze)
    taken = [n.args[1] for n in case.nodes(operator.getitem) if n.args[0].target is
             prepared.prepare]  # fmt: skip
    assert taken == [0]
