import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import QUIET
from samples import TILES, merged, product, text
from whole_graph import Case, set_ranges

from analogfx.kernels import prepared
from analogfx.passes.convert_once import convert_once
from analogfx.passes.epilogue import epilogue
from analogfx.passes.freeze import freeze
from analogfx.passes.share_input import share_input
from analogfx.passes.sites import spec_of
from analogfx.passes.skip_conversion import skip_conversion

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def case_of(forward, config=QUIET, dtype=torch.float32):
    case = Case(product(forward, dtype=dtype, w=(8, 8), b=(8,)), config)
    set_ranges(case.analog)
    case.apply(freeze)
    return case


TAKEN = {
    "relu": (lambda self, x: F.relu(F.linear(x, self.w, self.b)), "relu", 1),
    "relu method": (lambda self, x: F.linear(x, self.w).relu(), "relu", 1),
    "relu in place": (lambda self, x: F.relu(F.linear(x, self.w), inplace=True), "relu", 1),
    "relu_ method": (lambda self, x: F.linear(x, self.w).relu_(), "relu", 1),
    "gelu": (lambda self, x: F.gelu(F.linear(x, self.w)), "gelu", 1),
    "gelu tanh": (lambda self, x: F.gelu(F.linear(x, self.w), approximate="tanh"), "gelu_tanh", 1),
    "silu": (lambda self, x: F.silu(F.linear(x, self.w)), "silu", 1),
    "residual": (lambda self, x: F.linear(x, self.w, self.b) + x, "", 1),
    "residual first": (lambda self, x: x + F.linear(x, self.w), "", 1),
    "method add": (lambda self, x: F.linear(x, self.w).add(x), "", 1),
    "wider residual": (lambda self, x: F.linear(x, self.w) + x.unsqueeze(0), "", 1),
    "residual of another dtype": (lambda self, x: F.linear(x, self.w) + x.double(), "", 1),
    "computed after": (lambda self, x: F.linear(x, self.w) + torch.sin(x), "", 1),
    "both": (lambda self, x: F.gelu(F.linear(x, self.w)) + x, "gelu", 2),
}  # fmt: skip


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_follows_a_site_goes_into_it(name, tiles):
    forward, activation, count = TAKEN[name]
    case = case_of(forward, merged(QUIET, tiles))
    expected, before = case(X), len(case.graph.nodes)
    assert case.apply(epilogue) == [count]
    assert len(case.graph.nodes) == before - count
    (node,) = case.nodes(prepared.linear)
    assert spec_of(node).activation == activation
    found = case(X)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("name", TAKEN)
def test_a_second_run_changes_nothing(name):
    case = case_of(TAKEN[name][0])
    case.apply(epilogue)
    once = text(case.graph)
    assert case.apply(epilogue) == [0]
    assert text(case.graph) == once


def two_users(self, x):
    y = F.linear(x, self.w)
    return F.relu(y) + y


UNKNOWN = "follows, which is no activation or residual that sites know"
LEFT = {
    "two users": (two_users, "2 nodes read its output"),
    "a scalar": (lambda self, x: F.linear(x, self.w) + 1.0, UNKNOWN),
    "itself": (lambda self, x: (lambda y: y + y)(F.linear(x, self.w)), UNKNOWN),
    "a scaled sum": (lambda self, x: torch.add(F.linear(x, self.w), x, alpha=2), UNKNOWN),
    "activation behind residual": (lambda self, x: F.relu((F.linear(x, self.w) + x) * 1), None),
    "unknown activation": (lambda self, x: torch.tanh(F.linear(x, self.w)), f"tanh {UNKNOWN}"),
    "sum into a tensor": (lambda self, x: x.clone().add_(F.linear(x, self.w)), UNKNOWN),
    "sum in place, dtype unknown": (lambda self, x: F.linear(x, self.w).add_(x), UNKNOWN),
    "nothing": (lambda self, x: F.linear(x, self.w), "nothing follows"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_last_step_stays_and_the_reason_says_so(name):
    forward, reason = LEFT[name]
    case = case_of(forward)
    expected = case(X)
    allowed = 1 if name == "activation behind residual" else 0  # the residual itself
    assert case.apply(epilogue) == [allowed]
    assert torch.equal(case(X), expected)
    if reason is not None:
        (found,) = case.reasons("epilogue")
        assert found.endswith(reason)


def test_products_that_are_joined_end_apart():
    def forward(self, x):
        return F.relu(F.linear(x, self.w)) + F.relu(F.linear(x, self.w, self.b))

    case = case_of(forward)
    assert case.apply(share_input, epilogue) == [1, 0]
    (reason,) = case.reasons("epilogue")
    assert reason == "several sites are joined in it, and its output is split"


@pytest.mark.parametrize("rule", [share_input, convert_once, epilogue, skip_conversion])
def test_what_is_not_prepared_is_said_to_be_not(rule):
    case = Case(product(TAKEN["both"][0], w=(8, 8), b=(8,)), QUIET)
    assert case.apply(rule) == [0]
    assert case.reasons(rule.__name__) == ["its weights are not prepared: see freeze"]


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.float64, 0)])
def test_a_sum_in_place_is_taken_where_it_keeps_the_dtype(dtype, count):
    case = case_of(lambda self, x: F.linear(x, self.w).add_(torch.sin(x)))
    (total,) = (n for n in case.graph.nodes if n.target == "add_")
    total.meta["example_value"] = torch.empty(6, 8, device="meta")
    total.args[1].meta["example_value"] = torch.empty(6, 8, device="meta", dtype=dtype)
    expected = case(X)
    assert case.apply(epilogue) == [count]
    assert torch.equal(case(X), expected)


def test_a_write_before_the_last_step_keeps_it_out():
    def forward(self, x):
        h = torch.sin(x)
        y = F.linear(h, self.w)
        h.add_(1)
        return F.relu(y) + h

    case = case_of(forward)
    expected = case(X)
    assert case.apply(epilogue) == [0]
    assert case.reasons("epilogue") == ["add_ stands between"]
    assert torch.equal(case(X), expected)


@pytest.mark.parametrize(("dims", "count"), [(3, 2), (2, 0), (None, 0)])
def test_it_goes_into_convolutions_of_batches_too(dims, count):
    def forward(self, x):
        return F.relu(F.conv1d(x, self.kernel, self.bias, padding=1)) + x

    case = Case(product(forward, kernel=(4, 4, 3), bias=(4,)), QUIET)
    set_ranges(case.analog)
    (image,) = case.graph.find_nodes(op="placeholder")
    if dims is not None:  # what a compiler knows of it
        image.meta["example_value"] = torch.empty((2, 4, 5)[-dims:], device="meta")
    x = torch.randn((2, 4, 5)[-(dims or 3) :], dtype=torch.float64)
    expected = case(x)
    assert case.apply(freeze, epilogue) == [1, count]
    assert torch.equal(case(x), expected)
    assert case.census()[operator.add] == (count == 0)
