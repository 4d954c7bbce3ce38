import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET
from samples import IDENTITY, LAYERS, TILES, layer_and_input, merged, text
from whole_graph import Case

from analogfx.passes.sites import fused_sites
from analogfx.passes.skip_identity import skip_identity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("config", [IDENTITY, DYNAMO_CONFIGS["weight noise"]])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_site_that_changes_nothing_is_the_plain_product(layer, config):
    module, x = layer_and_input(layer)
    case = Case(module, config)
    expected = case(x)
    assert case.apply(skip_identity) == [1]
    assert not list(fused_sites(case.graph))
    plain = case.census()[F.linear] + case.census()[torch.convolution]
    assert plain == 1
    # With its bias, and in one product for all tiles, it sums in another order.
    torch.testing.assert_close(case(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(case(x), module(x), rtol=1e-12, atol=1e-12)
    once = text(case.graph)
    assert case.apply(skip_identity) == [0]
    assert text(case.graph) == once


def test_tiles_that_only_add_up_are_one_product():
    module, x = layer_and_input("linear")
    case = Case(module, TILES)
    expected = case(x)
    assert case.apply(skip_identity) == [1]
    torch.testing.assert_close(case(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "layer", "reason"),
    [
        (QUIET, "linear", "inputs have a static range"),
        (DYNAMO_CONFIGS["fast"], "linear", "inputs have a fast range"),
        (DYNAMO_CONFIGS["dynamic"], "linear", "inputs have a dynamic range"),
        (DYNAMO_CONFIGS["discrete"], "linear", "are not those of the plain product"),
        ({"mapping": {"max_input_size": 3}}, "grouped", "a grouped product on patches"),
    ],
)
def test_what_changes_something_stays(config, layer, reason):
    module, x = layer_and_input(layer)
    case = Case(module, merged(config))
    before, expected = text(case.graph), case(x)
    assert case.apply(skip_identity) == [0]
    assert text(case.graph) == before and torch.equal(case(x), expected)
    assert reason in case.reasons("skip_identity")[0]
