import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET
from samples import TILES, merged, product, text
from whole_graph import Case, set_ranges

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode
from analogfx.passes.convert_once import convert_once
from analogfx.passes.epilogue import epilogue
from analogfx.passes.freeze import freeze
from analogfx.passes.sites import spec_of
from analogfx.passes.skip_conversion import skip_conversion

pytestmark = pytest.mark.usefixtures("one_thread")

X = 2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def case_of(forward, config=QUIET):
    case = Case(product(forward, dtype=torch.float32, w=(8, 8), v=(8, 8)), config)
    set_ranges(case.analog)
    case.apply(freeze)
    return case


NONNEGATIVE = {
    "relu": lambda self, x: F.linear(F.relu(x), self.w),
    "softmax": lambda self, x: F.linear(x.softmax(-1), self.w),
    "through views": lambda self, x: F.linear(x.relu().view(2, 3, 8).transpose(0, 1), self.w),
    "through a pool": lambda self, x: F.linear(F.max_pool1d(F.relu(x), 1), self.w),
}


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("name", NONNEGATIVE)
def test_a_clamp_behind_what_is_not_negative_has_one_side(name, tiles):
    case = case_of(NONNEGATIVE[name], merged(QUIET, tiles))
    x = X.clone()
    x[0, 0] = float("nan")
    expected = case(x)
    assert case.apply(skip_conversion) == [1]
    (node,) = case.nodes(prepared.linear)
    assert spec_of(node).nonnegative
    torch.testing.assert_close(case(x), expected, rtol=0, atol=0, equal_nan=True)
    once = text(case.graph)
    assert case.apply(skip_conversion) == [0]
    assert text(case.graph) == once


def test_a_site_that_ends_in_a_relu_counts():
    case = case_of(lambda self, x: F.linear(F.relu(F.linear(x, self.w)), self.v))
    expected = case(X)
    assert case.apply(epilogue, skip_conversion) == [1, 1]
    assert torch.equal(case(X), expected)


def test_a_shared_dac_counts_once():
    case = case_of(lambda self, x: (lambda h: (F.linear(h, self.w), F.linear(h, self.v)))(x.relu()))
    first, _ = case.nodes(prepared.linear)
    first.update_arg(7, encode(spec_of(first)._replace(out_res=7.0)))  # so that they cannot join
    case.apply(convert_once)
    expected = case(X)
    assert case.apply(skip_conversion) == [1]
    (dac,) = case.nodes(prepared.convert)
    assert spec_of(dac).nonnegative
    assert all(map(torch.equal, case(X), expected))
    assert case.apply(skip_conversion) == [0]


NEGATIVE = {
    "the input": lambda self, x: F.linear(x, self.w),
    "gelu": lambda self, x: F.linear(F.gelu(x), self.w),
    "a sum behind": lambda self, x: F.linear(F.relu(x) - 1, self.w),
    "bits": lambda self, x: F.linear(F.relu(x).view(torch.float32), self.w),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_may_be_negative_keeps_both_sides(name):
    case = case_of(NEGATIVE[name])
    expected = case(X)
    assert case.apply(skip_conversion) == [0]
    assert case.reasons("skip_conversion") == ["its input may be below 0"]
    assert torch.equal(case(X), expected)


def test_a_residual_behind_a_relu_may_be_negative():
    case = case_of(lambda self, x: F.linear(F.relu(F.linear(x, self.w)) + x, self.v))
    assert case.apply(epilogue, skip_conversion) == [2, 0]


def test_a_write_behind_the_relu_keeps_both_sides():
    def forward(self, x):
        h = F.relu(x)
        h.sub_(3)
        return F.linear(h, self.w)

    case = case_of(forward)
    expected = case(X)
    assert case.apply(skip_conversion) == [0]
    assert case.reasons("skip_conversion") == ["sub_ stands between"]
    assert torch.equal(case(X), expected)


@pytest.mark.parametrize("name", ["dynamic", "discrete"])
def test_without_a_clamp_there_is_nothing_to_drop(name):
    case = case_of(NONNEGATIVE["relu"], DYNAMO_CONFIGS[name])
    assert case.apply(skip_conversion) == [0]
    assert case.reasons("skip_conversion") == []
