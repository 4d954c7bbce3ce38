import pytest
import torch
from samples import (
    ALL_LAYERS,
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    TILES,
    after,
    layer_and_input,
    merged,
    roles,
    run,
    text,
)

import analogfx
from analogfx.passes.chain import PER_TILE
from analogfx.passes.contract import split_sizes
from analogfx.passes.insert import insert
from analogfx.passes.map_tiles import map_tiles
from analogfx.passes.normalize import normalize
from analogfx.passes.select import select

pytestmark = pytest.mark.usefixtures("one_thread")

PASSES = (normalize, select, insert, map_tiles)


def tiles_of(inputs=-1, outputs=-1):
    return {"mapping": {"max_input_size": inputs, "max_output_size": outputs}}


def mapped(module, config, training=False):
    graph, context = after(PASSES, module, config, training)
    return graph, context, analogfx.analogize(module, config)


@pytest.mark.parametrize("training", [True, False])
def test_every_tile_has_its_own_chain_and_the_rest_is_shared(training):
    module, _ = layer_and_input("linear")  # 12 inputs
    one, _, _ = mapped(module, EVERYTHING, training)
    three, _, _ = mapped(module, merged(EVERYTHING, tiles_of(4)), training)
    for role, count in roles(one).items():
        assert roles(three)[role] == count * (3 if role in PER_TILE else 1), role
    assert roles(three)["accumulate"] == 2


@pytest.mark.parametrize("config", [IDENTITY, EVERYTHING], ids=["identity", "everything"])
def test_what_fits_one_tile_is_left_alone(config):
    module, _ = layer_and_input("linear")
    graph, context = after(PASSES[:-1], module, merged(config, tiles_of(12, 7)), training=True)
    before = text(graph)
    assert map_tiles(graph, context) == 0
    assert text(graph) == before


@pytest.mark.parametrize("limits", [(5, -1), (-1, 3), (5, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_a_second_run_changes_nothing(limits, training):
    module, _ = layer_and_input("grouped")
    config = merged(CONFIGS["everything, dynamic"], tiles_of(*limits))
    graph, context, _ = mapped(module, config, training)
    once = text(graph)
    assert map_tiles(graph, context) == 0
    assert text(graph) == once


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_tiles_of_an_identity_config_sum_to_the_product(layer):
    module, x = layer_and_input(layer)
    graph, context, analog = mapped(module, merged(IDENTITY, TILES))
    site = context.sites[0]
    assert len(site.in_sizes) * len(site.out_sizes) > 1
    torch.testing.assert_close(run(graph, analog, x), module(x), rtol=1e-12, atol=1e-12)


def test_outputs_are_cut_in_the_maxima_alone():
    module, _ = layer_and_input("linear")  # 7 outputs
    config = merged(CONFIGS["discrete"], tiles_of(outputs=3))
    graph, _, _ = mapped(module, config)
    assert roles(graph)["mvm"] == 1
    (maximum,) = (n for n in graph.nodes if n.meta.get("made", ("", ""))[1] == "tile_max")
    assert maximum.args[1] == [3, 2, 2]


def quantized(weight, res):
    step = 2 * weight.abs().max() / res
    return (weight / step).round() * step


def test_every_tile_scales_by_its_own_largest_weight():
    module, x = layer_and_input("linear")
    config = merged(CONFIGS["discrete"], tiles_of(5, 3))
    graph, _, analog = mapped(module, config)
    expected = module.bias.clone()
    for start, columns in zip((0, 4, 8), module.weight.split(4, dim=1), strict=True):
        tiles = [quantized(tile, 14) for tile in columns.split([3, 2, 2])]
        expected = expected + x[:, start : start + 4] @ torch.cat(tiles).T
    torch.testing.assert_close(run(graph, analog, x), expected, rtol=1e-12, atol=1e-12)


def test_every_tile_has_its_own_range():
    module, x = layer_and_input("linear")
    x[:, 4:8] *= 10
    graph, _, analog = mapped(module, merged(CONFIGS["DAC"], tiles_of(4)), training=True)
    run(graph, analog, x)
    expected = 3 * torch.stack([part.std() for part in x.split(4, dim=1)])
    torch.testing.assert_close(analog.input_range.detach(), expected)
    assert analog.input_range_update_idx.tolist() == [1, 1, 1]


def test_output_noise_is_shared_out_between_tiles_and_drawn_apart():
    module, _ = layer_and_input("linear")
    graph, _, _ = mapped(module, merged(CONFIGS["output noise"], tiles_of(4)), training=True)
    made = [n for n in graph.nodes if "made" in n.meta]
    streams = [n.args[2] for n in made if n.meta["made"][1] == "output_normal"]
    strengths = [n.args[4] for n in made if n.meta["made"][1] == "output_noise"]
    assert streams == [1, 2, 3]
    assert strengths == [0.05 / 3**0.5] * 3


def test_weight_noise_is_drawn_once_for_the_whole_matrix():
    module, _ = layer_and_input("linear")
    graph, _, _ = mapped(module, merged(CONFIGS["weight noise"], tiles_of(4)), training=True)
    assert roles(graph)["weight_normal"] == 1 and roles(graph)["weight_noise"] == 3


@pytest.mark.parametrize("size", [1, 5, 11, 12])
def test_uneven_tiles_cover_every_input_once(size):
    module, _ = layer_and_input("linear")
    graph, context, _ = mapped(module, tiles_of(size))
    assert list(context.sites[0].in_sizes) == split_sizes(12, size)
    spans = sorted({tuple(n.args[2:]) for n in graph.nodes if n.target is torch.narrow})
    covered = [i for start, length in spans for i in range(start, start + length)]
    assert covered == (list(range(12)) if size < 12 else [])
