import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET
from samples import TILES, merged, product, text
from whole_graph import PREPARED, Case, set_ranges

from analogfx.kernels import prepared
from analogfx.kernels.spec import encode
from analogfx.passes.convert_once import convert_once
from analogfx.passes.freeze import freeze
from analogfx.passes.sites import ANALOG_X, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

X = 2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def case_of(forward, config=QUIET, **context):
    module = product(forward, dtype=torch.float32, w=(8, 8), v=(8, 8), c=(4, 2, 3))
    case = Case(module, config, **context)
    set_ranges(case.analog)
    for view in case.nodes("view"):  # a compiler knows that it is a batch of images
        view.meta["example_value"] = torch.empty(3, 2, 8, device="meta")
    case.apply(freeze)
    return case


def image(x):
    return x.view(3, 2, 8)


SHARED = {
    "two products": lambda self, x: (F.linear(x, self.w), F.linear(x, self.v)),
    "a view": lambda self, x: (F.linear(x, self.w), F.linear(x.view(2, 3, 8), self.v)),
    "another view": lambda self, x: (
        F.linear(x, self.w), F.linear(x.unsqueeze(0).transpose(0, 1), self.v)),
    "two convolutions": lambda self, x: (lambda h: (
        F.conv1d(h, self.c), F.conv1d(h, self.c, stride=2)))(image(x)),
    "a product and a convolution": lambda self, x: (
        F.linear(x, self.w), F.conv1d(image(x), self.c)),
    "behind a relu": lambda self, x: (lambda h: (F.linear(h, self.w), F.linear(h, self.v)))(
        F.relu(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_sites_that_read_the_same_numbers_share_a_dac(name):
    case = case_of(SHARED[name])
    x = X.clone()
    x[0, 0] = float("nan")
    expected = case(x)
    assert case.apply(convert_once) == [1]
    assert case.census()[prepared.convert] == 1
    assert all(n.args[ANALOG_X] is not None for n in case.nodes(*PREPARED))
    torch.testing.assert_close(case(x), expected, rtol=0, atol=0, equal_nan=True)
    once = text(case.graph)
    assert case.apply(convert_once) == [0]
    assert text(case.graph) == once


@pytest.mark.parametrize("name", ["DAC", "dynamic", "fast"])
def test_on_tiles_they_share_it_in_one_shape(name):
    config = merged(DYNAMO_CONFIGS[name], TILES)
    case = case_of(SHARED["two products"], config)
    expected = case(X)
    assert case.apply(convert_once) == [1]
    assert all(map(torch.equal, case(X), expected))
    case = case_of(SHARED["a view"], config)
    assert case.apply(convert_once) == [0]
    assert "another cut of the inputs, beside" in case.reasons("convert_once")[0]


def test_other_ranges_and_resolutions_are_other_grids():
    case = case_of(SHARED["two products"], equal=False)
    assert case.apply(convert_once) == [0]
    assert "another range, beside" in case.reasons("convert_once")[0]
    case = case_of(SHARED["two products"])
    first, _ = case.nodes(prepared.linear)
    first.update_arg(7, encode(spec_of(first)._replace(inp_res=7.0)))
    assert case.apply(convert_once) == [0]
    assert "another resolution or range mode" in case.reasons("convert_once")[0]


def test_a_write_between_them_makes_other_numbers():
    def forward(self, x):
        h = torch.sin(x)
        y = F.linear(h, self.w)
        h.add_(1)
        return y, F.linear(h, self.v)

    case = case_of(forward)
    expected = case(X)
    assert case.apply(convert_once) == [0]
    assert "add_ stands between" in case.reasons("convert_once")[0]
    assert all(map(torch.equal, case(X), expected))


@pytest.mark.parametrize("config", ["identity", "dynamic"])
def test_without_a_dac_there_is_nothing_to_share(config):
    case = case_of(SHARED["a view"], DYNAMO_CONFIGS[config])
    assert case.apply(convert_once) == [0]


def behind_a_dac(change, resolution=30.0, mode="static"):
    """A site whose input an explicit DAC of the site's range has converted."""
    case = case_of(lambda self, x: F.linear(torch.sin(x), self.w))
    (site,) = case.nodes(prepared.linear)
    (source,) = case.nodes(torch.sin)
    with case.graph.inserting_after(source):
        tile = case.graph.call_function(torch.select, (site.args[5], 0, 0))
    with case.graph.inserting_after(tile):
        arguments = (source, tile, resolution, mode, 0.0, 0.0)
        dac = case.graph.call_function(torch.ops.analogfx.dac.default, arguments)
    with case.graph.inserting_after(dac):
        site.update_arg(0, change(case.graph, dac))
    return case


CHANGES = {
    "nothing": lambda graph, x: x,
    "a relu": lambda graph, x: graph.call_function(F.relu, (x,)),
    "a view": lambda graph, x: graph.call_method("reshape", (x, 2, 3, 8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_quantisations_to_one_grid_become_one(change):
    case = behind_a_dac(CHANGES[change])
    expected = case(X)
    assert case.apply(convert_once) == [1]
    (site,) = case.nodes(prepared.linear)
    assert site.args[ANALOG_X] is site.args[0]
    assert torch.equal(case(X), expected)
    assert case.apply(convert_once) == [0]


@pytest.mark.parametrize(
    "case",
    [
        lambda: behind_a_dac(CHANGES["nothing"], resolution=29.0),
        lambda: behind_a_dac(CHANGES["nothing"], mode="fast"),
        lambda: behind_a_dac(lambda graph, x: graph.call_function(torch.tanh, (x,))),
    ],
)
def test_another_grid_is_another_grid(case):
    case = case()
    expected = case(X)
    assert case.apply(convert_once) == [0]
    assert torch.equal(case(X), expected)
