import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET, compiled
from samples import LAYERS, TILES, layer_and_input, merged, product, text
from torch import nn
from whole_graph import PREPARED, Case, set_ranges

from analogfx.kernels import dispatch, prepared
from analogfx.kernels.spec import encode
from analogfx.passes.freeze import freeze
from analogfx.passes.frozen import is_frozen
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


def test_a_weight_that_serves_twice_is_prepared_once():
    def forward(self, x):
        return (x @ self.w).relu() @ self.w + x @ self.v

    case = Case(product(forward, w=(8, 8), v=(8, 8)), QUIET)
    set_ranges(case.analog)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = case(x)
    assert case.apply(freeze) == [3]
    assert len(case.nodes(prepared.prepare)) == 2
    assert len(case.nodes(prepared.limits)) == 3  # every use of a weight has its own range
    assert torch.equal(case(x), expected)


def test_a_layer_that_is_called_twice_has_its_limits_once():
    model = nn.Linear(8, 8).eval()
    graphs = []

    def look(graph, context):
        graphs.append([n.target for n in graph.nodes])
        return 0

    run = compiled(lambda x: model(torch.tanh(model(x))), QUIET, passes=["freeze", look])
    with torch.no_grad():
        run(torch.randn(3, 8))
    (called,) = graphs
    assert called.count(prepared.prepare) == called.count(prepared.limits) == 1
    assert called.count(prepared.linear) == 2


def test_limits_are_kept_unless_the_range_is_dynamic():
    for name, count in (("DAC and ADC", 1), ("dynamic", 0)):
        case = Case(layer_and_input("linear")[0], DYNAMO_CONFIGS[name])
        case.apply(freeze)
        assert frozen(case).count(prepared.limits) == count


@pytest.fixture
def triton():
    before = dispatch.use("triton")
    yield
    dispatch.use(before)


def with_examples(case, x):
    """What a compiler knows of a graph's inputs."""
    (node,) = case.graph.find_nodes(op="placeholder")
    node.meta["example_value"] = x
    for weight in case.graph.find_nodes(op="get_attr"):
        weight.meta["example_value"] = getattr(case.analog, weight.target, None)
    return case


@pytest.mark.skipif(dispatch._refused_device(torch.device("cpu")) == "triton is not installed",
                    reason="the kernels are Triton's")  # fmt: skip
def test_what_the_kernels_serve_stays_one_op(triton):
    x = torch.randn(3, 8)
    module = product(lambda self, x: F.linear(x, self.w), dtype=torch.float32, w=(4, 8))
    case = with_examples(Case(module, QUIET), x)
    assert case.apply(freeze) == [0]
    assert case.reasons("freeze") == ["the Triton kernels serve it as one op"]
    dispatch.use("auto")
    assert case.apply(freeze) == [1]  # which serves CUDA tensors alone


def test_what_the_kernels_refuse_is_no_torch_under_use_triton(triton):
    module, x = layer_and_input("linear", torch.float64)
    case = with_examples(Case(module, QUIET), x)
    with pytest.raises(dispatch.KernelError, match=r'use\("triton"\), but'):
        case.apply(freeze)


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_convolution_of_torch_holds_its_weights_though_the_kernels_would_make_them(
    dtype, whole, monkeypatch
):
    monkeypatch.setattr(dispatch, "_refused_device", lambda device: "")
    module, image = nn.Conv2d(2, 16, 2, dtype=dtype), torch.randn(1, 2, 4, 4, dtype=dtype)
    case = with_examples(Case(module, QUIET), image)
    assert case.apply(freeze) == [0 if whole else 1]
