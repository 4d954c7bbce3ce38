import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET
from samples import TILES, merged, product, text
from whole_graph import Case, set_ranges

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode
from analogfx.passes.freeze import freeze
from analogfx.passes.share_input import share_input
from analogfx.passes.sites import spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def three(self, x):
    return F.linear(x, self.q, self.b), x @ self.k, F.linear(x, self.v)


def attention(config=QUIET, forward=three, **options):
    module = product(forward, q=(5, 8), k=(8, 4), v=(4, 8), b=(5,))
    case = Case(module, config, **options)
    set_ranges(case.analog)
    case.apply(freeze)
    return case


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize(
    "name", ["DAC", "DAC and ADC", "bound alone", "dynamic", "discrete", "fast"]
)
def test_products_of_one_input_become_one(name, tiles):
    case = attention(merged(DYNAMO_CONFIGS[name], tiles))
    expected = case(X)
    assert case.census()[prepared.linear] == 3
    assert case.apply(share_input) == [2]
    assert case.census()[prepared.linear] == case.census()[torch.split] == 1
    (wide,) = case.nodes(prepared.linear)
    assert sum(spec_of(wide).out_sizes) == 13
    # One product of more rows sums in another order.
    torch.testing.assert_close(case(X), expected, rtol=1e-12, atol=1e-12)


def test_rows_of_tiles_keep_their_own_bounds():
    """A bound of a tile's largest weight: joined, a small product must not get a large one's."""
    case = attention(DYNAMO_CONFIGS["DAC and ADC"])
    with torch.no_grad():
        case.analog.q.mul_(100)
    expected = case(X)
    case.apply(share_input)
    torch.testing.assert_close(case(X), expected, rtol=1e-12, atol=1e-12)


def test_a_second_run_changes_nothing():
    case = attention()
    case.apply(share_input)
    once = text(case.graph)
    assert case.apply(share_input) == [0]
    assert text(case.graph) == once


def test_a_product_without_a_bias_gets_zeros():
    case = attention()
    case.apply(share_input)
    assert case.census()[prepared.no_bias] == 2
    plain = attention(forward=lambda self, x: (x @ self.k, F.linear(x, self.v)))
    plain.apply(share_input)
    (wide,) = plain.nodes(prepared.linear)
    assert wide.args[3] is None


def test_other_ranges_stay_apart_and_the_reason_says_so():
    case = attention(equal=False)
    assert case.apply(share_input) == [0]
    assert case.census()[prepared.linear] == 3
    assert [why.split(",")[0] for why in case.reasons("share_input")] == ["another range"] * 3


def test_sites_with_other_outputs_stay_apart():
    case = attention()
    first, *_ = case.nodes(prepared.linear)
    first.update_arg(7, encode(spec_of(first)._replace(out_res=7.0)))
    expected = case(X)
    assert case.apply(share_input) == [1]
    assert case.census()[prepared.linear] == 2
    assert "another resolution or bound of the outputs" in case.reasons("share_input")[0]
    torch.testing.assert_close(case(X), expected, rtol=1e-12, atol=1e-12)
    assert case.apply(share_input) == [0]


def test_nothing_is_left_that_nobody_reads():
    case = attention()
    case.apply(share_input)
    unread = [n for n in case.graph.nodes if not n.users and n.op.startswith("call")]
    assert unread == []


def test_another_cut_of_the_inputs_stays_apart():
    case = attention()
    first, *_ = case.nodes(prepared.linear)
    first.update_arg(7, encode(spec_of(first)._replace(inp_res=7.0)))
    assert case.apply(share_input) == [1]
    assert "another resolution, range mode or cut" in case.reasons("share_input")[0]


def test_other_inputs_are_other_inputs():
    case = attention(forward=lambda self, x: (F.linear(x, self.v), F.linear(x + 1, self.q)))
    assert case.apply(share_input) == [0]


@pytest.mark.parametrize("write", ["add_", operator.iadd, operator.setitem])
def test_a_write_between_them_keeps_them_apart(write):
    case = attention(forward=lambda self, x: (F.linear(x, self.v), F.linear(x, self.q)))
    expected = case(X.clone())
    first, second = case.nodes(prepared.linear)
    (source,) = case.graph.find_nodes(op="placeholder")
    with case.graph.inserting_before(second):
        if write == "add_":
            case.graph.call_method("add_", (source, 1.0))
        elif write is operator.iadd:
            case.graph.call_function(write, (source, 1.0))
        else:
            case.graph.call_function(write, (source, slice(None), 1.0))
    changed = case(X.clone())
    assert not torch.equal(changed[1], expected[1])
    assert case.apply(share_input) == [0]
    assert "stands between" in case.reasons("share_input")[0]
    assert torch.equal(case(X.clone())[1], changed[1])
    assert first in case.graph.nodes
